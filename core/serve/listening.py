"""The unix socket of a server: private, or handed over by systemd; and telling systemd that the server is ready."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn, TypeVar

from layerfs import signals
from layerfs.errors import AlreadyExists, InvalidArgument, refused

log = logging.getLogger("layerfs.serve")

_FIRST_HANDED_OVER: Final = 3  # sd_listen_fds(3)
_LONGEST: Final = 107  # bytes of a path in struct sockaddr_un
_APART: Final = len("/.12345678/s")
_CHUNK: Final = 1 << 16
_CLOSED: Final = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK)
_PAUSE: Final = 0.1
"""Seconds after which a connection is accepted that could not be."""

LAST: Final = 10.0
"""Seconds that requests have to end after they were broken off; with what they had before, less than systemd gives."""

_Made = TypeVar("_Made")


def handed_over() -> socket.socket | None:
    """The listening socket that systemd has opened for this process, see sd_listen_fds(3); None where it has not."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not os.environ.get("LISTEN_FDS", "0").isdigit():
        return None
    count = int(os.environ["LISTEN_FDS"])
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    if count != 1:
        raise InvalidArgument(f"systemd has handed over {count} sockets; the server takes one")
    try:
        os.set_inheritable(_FIRST_HANDED_OVER, False)
        return socket.socket(fileno=_FIRST_HANDED_OVER)
    except OSError as error:
        raise InvalidArgument(f"what systemd has handed over is no socket: {error.strerror}") from error


@contextmanager
def bound(path: Path, bind: Callable[[Path], _Made]) -> Iterator[_Made]:
    """What ``bind`` makes of the path that it is given, listening at ``path`` with mode 0600 until the body is done.

    The directory of ``path`` is made where there is none, and a socket that a killed server has left is removed. The
    own one is removed at the end, and never what another server has put in its place since. Raises `AlreadyExists`
    where a server listens at ``path``, `InvalidArgument` where something else is there, or where a socket cannot be.
    """
    if max(len(os.fsencode(path)), len(os.fsencode(path.parent)) + _APART) > _LONGEST:
        raise InvalidArgument(f"{str(path)!r} is too long for a socket; the system allows {_LONGEST} bytes")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_free(path)
        # Apart, so that nobody connects before the mode is right, and because gRPC removes what it finds by the name
        # that it has bound, whoever has made it.
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as apart:
            made = bind(Path(apart, "s"))
            os.chmod(Path(apart, "s"), 0o600)
            os.link(Path(apart, "s"), path)
        own = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)  # no other gets its number while this is open
    except OSError as error:
        raise refused(f"making the socket {str(path)!r}", error) from error
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(own), path.lstat()):
                path.unlink()
        os.close(own)


def _make_free(path: Path) -> None:
    try:
        kind = stat.S_IFMT(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if kind != stat.S_IFSOCK:
        raise InvalidArgument(f"{str(path)!r} is there and is no socket; choose another path")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                path.unlink()
                return
            raise
    raise AlreadyExists(f"a server is listening at {str(path)!r} already; stop it, or choose another path")


def notify(text: str) -> None:
    """Tell systemd (``READY=1``, ``STOPPING=1``), where it has started this process; see sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] in ("/", "@"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
            there.connect("\0" + address[1:] if address[0] == "@" else address)
            there.sendall(text.encode())


@contextmanager
def stop_signals() -> Iterator[Callable[[], None]]:
    """A function that waits for a signal to end. In the main thread.

    It waits for what the interpreter's own handler writes: a lock would go on to sleep where the system has given the
    signal to another thread.
    """
    wanted = signals.ending()
    here, there = socket.socketpair()
    with here, there:
        there.setblocking(False)

        def wait() -> None:
            while not set(here.recv(64)).intersection(wanted):
                pass

        fd_before = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda *_: None) for number in wanted}
        try:
            yield wait
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(fd_before)


def break_off() -> NoReturn:
    """End the process at once, for requests that do not end; the next start sees to what they leave, as after a crash.

    The store must not be closed under them: others would take what they are at work on for left.
    """
    log.warning("stopped; requests that did not end are broken off")
    logging.shutdown()
    os._exit(1)


class Relay:
    """Passes what comes in at a listening socket on to the socket at ``path``: gRPC cannot take one that is open."""

    def __init__(self, listening: socket.socket, path: Path) -> None:
        self._listening = listening
        self._path = path

    def start(self) -> None:
        """Begin, in threads that end with the process."""
        threading.Thread(target=self._accept, daemon=True, name="relay").start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True, name="relay").start()
            except (OSError, RuntimeError) as error:  # the latter where no thread can be started
                if isinstance(error, OSError) and error.errno in _CLOSED:
                    return
                time.sleep(_PAUSE)  # too many files are open, or memory is short, for now; or the client has gone

    def _pass_on(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as server:
            server.connect(str(self._path))
            with selectors.DefaultSelector() as waiting:
                waiting.register(client, selectors.EVENT_READ, server)
                waiting.register(server, selectors.EVENT_READ, client)
                while waiting.get_map():
                    for key, _ in waiting.select():
                        source, sink = key.fileobj, key.data
                        assert isinstance(source, socket.socket)
                        if data := source.recv(_CHUNK):
                            sink.sendall(data)
                        else:
                            waiting.unregister(source)
                            sink.shutdown(socket.SHUT_WR)
