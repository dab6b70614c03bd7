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
from layerfs.guest import sandbox
from layerfs.guest.kind import Kind, Wires, find_program
from layerfs.guest.qemu import Qemu
from layerfs.guest.request import Request, TimedOut
from layerfs.guest.uml import Uml

_KINDS: dict[str, type[Kind]] = {"uml": Uml, "qemu": Qemu}

_GRACE = 10.0  # seconds that an interrupted command has for ending by itself
_LAST_WORDS = 12  # lines of the console in a message
# These name places that a guest has anew.
_NOT_PASSED = frozenset({"TEMP", "TMP", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "LAYERFS_GUEST"})


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
        disks = [_disk(size, stack) for size in (request.scratch, *request.disks)]
        _make_filesystem(disks[0])
        return _Running(kind, disks, output, errors, stack).result()


class _Running:
    """A guest that is running; it is gone when the stack is left."""

    def __init__(self, kind: Kind, disks: Sequence[int], output: int, errors: int, stack: ExitStack) -> None:
        self._request = request = kind.request
        self._console: deque[str] = deque(maxlen=_LAST_WORDS)
        self._report = b""
        self._blocked = False  # nobody reads what the command prints any more
        out_read, out_write = _pipe(stack)
        err_read, err_write = _pipe(stack)
        self._control, control = socket.socketpair()
        stack.callback(self._control.close)
        stack.callback(control.close)
        wires = Wires(output=out_write, errors=err_write, control=control.fileno())
        job = _memory_file(_job(kind, output, errors), stack)
        line = sandbox.command(
            kind.command(wires, disks, sandbox.PRIVATE),
            job=job,
            writable=_writable(request),
            readable=_kept(kind),
        )
        inherited = [out_write, err_write, control.fileno(), job, *disks]
        self._process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=inherited,
            env={**os.environ, **kind.environment},
            start_new_session=True,  # a terminal's Ctrl-C is for us alone
        )
        stack.callback(self._end)
        control.close()
        for descriptor in (out_write, err_write, job):
            os.close(descriptor)
        assert self._process.stdout is not None
        self._readers = [
            threading.Thread(target=self._pass_on, args=(out_read, output), daemon=True),
            threading.Thread(target=self._pass_on, args=(err_read, errors), daemon=True),
            threading.Thread(target=self._read_report, daemon=True),
            threading.Thread(target=self._read_console, args=(self._process.stdout,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

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
            reader.join()

    def _pass_on(self, source: int, target: int) -> None:
        while data := os.read(source, 1 << 16):
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
    environment = dict(os.environ if request.environment is None else request.environment)
    for name in _NOT_PASSED:
        environment.pop(name, None)
    environment |= {
        "DM_DISABLE_UDEV": "1",  # there is no udev that would answer libdevmapper
        "LAYERFS_GUEST": request.kind,
        "LAYERFS_GUEST_DISKS": " ".join(devices.disks),
        "TMPDIR": "/var/tmp",  # noqa: S108 - on the scratch disk itself; /tmp is the host's with the disk over it
        "PATH": f"{environment.get('PATH', os.defpath)}:/usr/sbin:/sbin",
    }
    size = shutil.get_terminal_size()
    job = {
        "command": list(request.command),
        "directory": str(request.directory),
        "environment": environment,
        "terminal": {"output": os.isatty(output), "errors": os.isatty(errors)},
        "window": [size.columns, size.lines],
        "writable": [str(path) for path in _writable(request)],
        "kept": [str(path) for path in _kept(kind)],
        "modules": str(kind.modules) if kind.modules else None,
        "drivers": list(kind.drivers),
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
    return sorted(path for path in wanted if path.is_dir())


def _pipe(stack: ExitStack) -> tuple[int, int]:
    """A pipe whose ends are closed with the stack, if they are not by then."""
    ends = os.pipe()
    for end in ends:
        stack.callback(_close, end)
    return ends


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _memory_file(contents: bytes, stack: ExitStack) -> int:
    descriptor = os.memfd_create("layerfs-guest")
    stack.callback(_close, descriptor)
    os.write(descriptor, contents)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _disk(size: int, stack: ExitStack) -> int:
    """A sparse file without a name, so that nothing can stay of it."""
    place = os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108 - on a disk everywhere (hier(7)), and nameless
    try:
        file = stack.enter_context(tempfile.TemporaryFile(dir=place))  # noqa: SIM115 - closed with the stack
        os.truncate(file.fileno(), size)
    except OSError as error:
        raise refused(f"making a disk of {size} bytes for the guest in {place!r}", error) from error
    return file.fileno()


def _make_filesystem(disk: int) -> None:
    program = find_program("mkfs.ext4", "e2fsprogs")
    command = [program, "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", f"/proc/self/fd/{disk}"]
    done = subprocess.run(command, pass_fds=[disk], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LayerfsError(f"making the file system of the guest's disk: {done.stderr.strip()}")
