"""Starting a guest on the host, passing on what it says, and making sure that nothing of it stays."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO

import layerfs
from layerfs.errors import InvalidArgument, LayerfsError, refused
from layerfs.guest import environment, sandbox
from layerfs.guest.kind import Kind, Wires, find_program
from layerfs.guest.qemu import Qemu
from layerfs.guest.request import Request, TimedOut
from layerfs.guest.uml import Uml
from layerfs.sizes import format_size

_KINDS: dict[str, type[Kind]] = {"uml": Uml, "qemu": Qemu}

_GRACE = 10.0  # seconds that an interrupted command has for ending by itself
_LAST_WORDS = 12  # lines of the console in a message


def run(request: Request, *, output: int = 1, errors: int = 2) -> int:
    """Run a command in a guest and return its exit code: 128 and the signal's number if a signal ended it.

    What the command prints is passed on as it comes; it has no standard input. On KeyboardInterrupt the command is
    interrupted too, and ended with its guest if that takes long. However this process ends, the guest ends with it.

    Args:
        output, errors: descriptors for the command's standard output and standard error. Where one is a terminal, the
            command sees a terminal too.

    Raises `EnvironmentUnfit` where the host lacks something, naming the package; `InvalidArgument`; `TimedOut`; and
    `LayerfsError` with what the console said last if the guest ended before its command did.
    """
    if request.kind not in _KINDS:
        raise InvalidArgument(f"there is no kind of guest {request.kind!r}; the kinds are {', '.join(_KINDS)}")
    if not request.command:
        raise InvalidArgument("a guest needs a command to run")
    kind = _KINDS[request.kind](request)
    with ExitStack() as stack:
        disks = [_disk(size, request.place, stack) for size in (request.scratch, *request.disks)]
        _make_filesystem(disks[0])
        return _Running(kind, disks, output, errors, stack).result()


class _Running:
    """A guest that is running; it is gone when the stack is left."""

    def __init__(self, kind: Kind, disks: Sequence[int], output: int, errors: int, stack: ExitStack) -> None:
        self._request = request = kind.request
        self._console: deque[str] = deque(maxlen=_LAST_WORDS)
        self._report = b""
        self._readers: list[threading.Thread] = []
        self._blocked = False  # nobody reads what the command prints any more
        out_read, out_write = _pipe(stack)
        err_read, err_write = _pipe(stack)
        said_read, said_write = _pipe(stack)
        self._control, control = map(stack.enter_context, socket.socketpair())
        job = stack.enter_context(_memory_file(_job(kind, output, errors)))
        wires = Wires(out_write.fileno(), err_write.fileno(), control.fileno())
        line = sandbox.command(
            kind.command(wires, disks, sandbox.PRIVATE),
            job=job.fileno(),
            writable=_writable(request),
            readable=_kept(kind),
        )
        theirs = (out_write, err_write, said_write, control, job)
        self._process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=said_write,
            stderr=said_write,
            pass_fds=[*(end.fileno() for end in theirs), *disks],
            env={**os.environ, **kind.environment},
            start_new_session=True,  # a terminal's Ctrl-C is for us alone
        )
        stack.callback(self._end)
        self._readers += [
            threading.Thread(target=self._pass_on, args=(out_read, output), daemon=True),
            threading.Thread(target=self._pass_on, args=(err_read, errors), daemon=True),
            threading.Thread(target=self._read_report, daemon=True),
            threading.Thread(target=self._read_console, args=(said_read,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        for end in theirs:
            end.close()

    def result(self) -> int:
        """The command's exit code, when the guest has ended."""
        limit = self._request.timeout
        try:
            self._process.wait(limit)
        except subprocess.TimeoutExpired:
            what = shlex.join(self._request.command)
            raise TimedOut(f"the guest had not finished {what!r} after {limit:g} s and was ended") from None
        except KeyboardInterrupt:
            self._interrupt()
            raise
        for reader in self._readers:
            reader.join()
        if self._blocked:
            raise BrokenPipeError
        words = self._report.split()
        if words[:1] == [b"exit"] and len(words) == 2:
            return int(words[1])
        said = " | ".join(self._console) or "nothing"
        raise LayerfsError(f"the {self._request.kind} guest ended before its command did; its console said: {said}")

    def _interrupt(self) -> None:
        """Let the command clean up after itself, as it would on the host."""
        with contextlib.suppress(OSError, KeyboardInterrupt, subprocess.TimeoutExpired):
            self._control.sendall(f"{int(signal.SIGINT)}\n".encode())
            self._process.wait(_GRACE)

    def _end(self) -> None:
        # bubblewrap's death is the death of all processes in its namespace.
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(_GRACE)  # whoever reads what we pass on may have stopped doing so

    def _pass_on(self, source: IO[bytes], target: int) -> None:
        while data := source.read(1 << 16):
            try:
                while data:
                    data = data[os.write(target, data) :]
            except OSError:
                self._blocked = True
                self._process.kill()
                return

    def _read_report(self) -> None:
        with contextlib.suppress(ConnectionResetError):  # it ended with orders unread
            while data := self._control.recv(1 << 12):
                self._report += data

    def _read_console(self, source: IO[bytes]) -> None:
        for line in source:
            text = line.decode(errors="replace").strip()
            if text:
                self._console.append(text)
            if os.environ.get("LAYERFS_DEBUG"):
                sys.stderr.write(text + "\n")


def _job(kind: Kind, output: int, errors: int) -> bytes:
    """What `layerfs.guest.inside` reads."""
    request, devices = kind.request, kind.devices
    size = shutil.get_terminal_size()
    job = {
        "command": list(request.command),
        "directory": str(request.directory),
        "environment": dict(environment.of_command(request, devices.disks)),
        "terminal": {"output": os.isatty(output), "errors": os.isatty(errors)},
        "window": [size.columns, size.lines],
        "writable": [str(path) for path in _writable(request)],
        "kept": [str(path) for path in _kept(kind)],
        "modules": str(kind.modules) if kind.modules else None,
        "drivers": list(kind.drivers),
        # The sandbox of an unprivileged user shows root's set-user-ID programs as nobody's.
        "trusted": os.geteuid() == 0,
        "roots": [asdict(root) for root in kind.roots],
        "devices": asdict(devices),
        "name": f"{request.kind}-guest",
    }
    return json.dumps(job).encode()


def _writable(request: Request) -> list[Path]:
    return [Path(os.path.realpath(path)) for path in request.writable]


def _kept(kind: Kind) -> list[Path]:
    """The directories that must be readable in the guest at the host's own path, wherever they are."""
    given = (sys.prefix, sys.base_prefix, os.path.dirname(layerfs.__file__), *filter(None, sys.path))
    wanted = {Path(os.path.realpath(path)) for path in (*map(Path, given), kind.request.directory)}
    return sorted(path for path in wanted if os.path.isdir(path))


def _pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """A pipe whose ends are closed with the stack, if they are not by then."""
    source, sink = os.pipe()
    return stack.enter_context(open(source, "rb", 0)), stack.enter_context(open(sink, "wb", 0))


def _memory_file(contents: bytes) -> IO[bytes]:
    file = open(os.memfd_create("layerfs-guest"), "r+b", 0)  # noqa: SIM115 - the caller closes it
    file.write(contents)
    file.seek(0)
    return file


def _disk(size: int, place: Path, stack: ExitStack) -> int:
    """A sparse file without a name, so that nothing can stay of it."""
    try:
        file = stack.enter_context(tempfile.TemporaryFile(dir=place))  # noqa: SIM115 - closed with the stack
        os.truncate(file.fileno(), size)
    except OSError as error:
        raise refused(f"making a disk of {format_size(size)} for the guest in {str(place)!r}", error) from error
    return file.fileno()


def _make_filesystem(disk: int) -> None:
    program = find_program("mkfs.ext4", "e2fsprogs")
    command = [program, "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", f"/proc/self/fd/{disk}"]
    done = subprocess.run(command, pass_fds=[disk], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LayerfsError(f"making the file system of the guest's disk: {done.stderr.strip()}")
