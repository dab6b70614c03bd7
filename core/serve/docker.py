"""The server for Docker: its graph-driver plugin protocol, which is HTTP on a unix socket, until it is told to stop."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import socket as sockets
import socketserver
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, BinaryIO, Final, cast
from urllib.parse import parse_qs, urlsplit

from layerfs.errors import InvalidArgument, LayerfsError, told
from layerfs.serve import listening
from layerfs.serve.graphdriver import GraphDriver
from layerfs.serve.requests import Requests
from layerfs.store import Store

log = logging.getLogger("layerfs.serve")

_TYPE: Final = "application/vnd.docker.plugins.v1.2+json"
_CALLS: Final = frozenset(
    [
        *("Init", "Capabilities", "Create", "CreateReadWrite", "Remove", "Get", "Put", "Exists", "Status"),
        *("GetMetadata", "Cleanup", "Changes", "DiffSize"),
    ]
)
_LARGEST: Final = 1 << 20
"""Bytes of a request in JSON."""
_LINE: Final = 1 << 10
_CHUNK: Final = 1 << 18
_GRACE: Final = 30.0
"""Seconds that clients have to send, and to take, what belongs to requests under way when the server is stopped."""


def serve(store: Store, socket: Path, requests: Requests) -> None:
    """Serve until a signal to end, then finish the requests under way. Called in the main thread.

    Where one of them does not end, the process does, see `listening.break_off`.

    Where systemd hands a socket over, that one is served and ``socket`` is left alone.
    Raises `AlreadyExists` (another server is there), `InvalidArgument` (no place for a socket).
    """
    driver = GraphDriver(store)
    given = listening.handed_over()
    with listening.stop_signals() as wait_for_stop:
        with ExitStack() as stack:
            if given is None:
                server = stack.enter_context(listening.bound(socket, lambda at: _Server(str(at), driver, requests)))
            else:
                server = _Server("", driver, requests, bind=False)
                server.socket.close()
                server.socket = given
            stack.callback(server.server_close)
            threading.Thread(target=server.serve_forever, daemon=True, name="listen").start()
            listening.notify("READY=1")
            log.info("ready: %s on %s at %s", store.driver.name, store.root, socket)
            wait_for_stop()
            listening.notify("STOPPING=1")
            log.info("stopping; requests under way are finished")
            server.shutdown()
        if not server.finish(_GRACE):
            listening.break_off()
    log.info("stopped")


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """One thread for each connection; idle ones do not hold up the end."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: str, driver: GraphDriver, requests: Requests, *, bind: bool = True) -> None:
        self.driver = driver
        self.requests = requests
        self._working: set[sockets.socket] = set()
        self._stopping = False
        self._changed = threading.Condition()
        super().__init__(path, _Handler, bind_and_activate=bind)

    @contextmanager
    def working(self, connection: sockets.socket) -> Iterator[bool]:
        """A request is at work for the body; it must not be where this is False, for the server is stopping."""
        with self._changed:
            taken = not self._stopping
            if taken:
                self._working.add(connection)
        try:
            yield taken
        finally:
            with self._changed:
                self._working.discard(connection)
                self._changed.notify_all()

    def shutdown(self) -> None:
        """Take no more connections, and no more requests by those that there are."""
        with self._changed:
            self._stopping = True
        super().shutdown()

    def finish(self, seconds: float) -> bool:
        """Wait until no request is at work, which is returned.

        Those whose clients keep them waiting for longer are broken off.
        """
        with self._changed:
            if self._changed.wait_for(lambda: not self._working, seconds):
                return True
            for connection in self._working:
                with contextlib.suppress(OSError):
                    connection.shutdown(sockets.SHUT_RDWR)
            return self._changed.wait_for(lambda: not self._working, listening.LAST)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone away is no matter; a fault of ours has been logged."""


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer's head and body are sent at once, so that Docker wakes up once
    server: _Server

    def do_POST(self) -> None:
        self._answered = False
        body = _Body(cast("BinaryIO", self.rfile), self.headers)
        with self.server.working(self.connection) as taken:
            if taken:
                self._work(body)
                return
        self.close_connection = True
        body.drain()
        self._answer({"Err": "the server is stopping; try again when it has been started again"}, 503)

    def _work(self, body: _Body) -> None:
        url = urlsplit(self.path)
        start = time.perf_counter()
        name, subject = url.path.removeprefix("/GraphDriver."), ""
        try:
            if url.path == "/GraphDriver.ApplyDiff":
                subject = parse_qs(url.query).get("id", [""])[0]
                answer = self.server.driver.applydiff(subject, cast("BinaryIO", body))
                self._answer(answer)
            else:
                request = _json(body)
                subject = str(request.get("ID", ""))
                self._dispatch(url.path, name, request)
        except Exception as error:
            self.server.requests.failed(name, subject, time.perf_counter() - start, error)
            if isinstance(error, ConnectionError):  # it is broken, or the answer has begun
                self.close_connection = True
                return
            body.drain()  # who is still sending does not listen yet
            text = str(told(error) or f"a fault in layerfs: {error!r}")
            self._answer({"Err": text}, 500 if name == "Diff" else 200)
        else:
            self.server.requests.done(name, subject, time.perf_counter() - start)
        body.drain()

    def _dispatch(self, path: str, name: str, request: Mapping[str, Any]) -> None:
        if path == "/Plugin.Activate":
            self._answer({"Implements": ["GraphDriver"]})
        elif name == "Diff":
            out = _Chunked(self)
            try:
                self.server.driver.diff(request, cast("BinaryIO", out))
            except LayerfsError as error:
                if out.begun:  # only an end before its time can still tell
                    raise ConnectionAbortedError(str(error)) from error
                raise
            out.end()
        elif name == "Put":
            self._answer(self.server.driver.put(request, begun=lambda: self._answer({})))
        elif name in _CALLS:
            self._answer(getattr(self.server.driver, name.lower())(request))
        else:
            self._answer({"Err": f"there is no call {path!r}"}, 404)

    def _answer(self, document: Mapping[str, Any], status: int = 200) -> None:
        if self._answered:  # early, and what came of it since is in the log
            return
        self._answered = True
        data = json.dumps({"Err": "", **document}).encode()
        self.send_response(status)
        self.send_header("Content-Type", _TYPE)
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def handle_expect_100(self) -> bool:
        """Tell a client that waits for it to send its body."""
        goes_on = super().handle_expect_100()
        self.wfile.flush()
        return goes_on

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Requests are logged with what they are about, see `Requests`."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        log.info(format, *args)


def _json(body: _Body) -> dict[str, Any]:
    data = b""
    while len(data) <= _LARGEST and (more := body.read(_CHUNK)):
        data += more
    if len(data) > _LARGEST:
        raise InvalidArgument(f"a request is longer than {_LARGEST} bytes")
    try:
        request = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"a request is no JSON: {error}") from error
    if request is None:
        return {}
    if not isinstance(request, dict):
        raise InvalidArgument("a request is no JSON object")
    return request


class _Body(io.RawIOBase):
    """The body of a request: of a length that was told, or in chunks (RFC 9112)."""

    def __init__(self, stream: BinaryIO, headers: Message) -> None:
        self._stream = stream
        self._chunked = headers.get("Transfer-Encoding", "").lower() == "chunked"
        length = headers.get("Content-Length", "0")
        self._left = int(length) if length.isdigit() and not self._chunked else 0
        self._ended = not self._chunked and not self._left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left and self._chunked and not self._ended:
            self._next_chunk()
        if self._ended:
            return 0
        data = self._stream.read1(min(len(buffer), self._left))  # type: ignore[attr-defined]
        if not data:
            raise ConnectionResetError("the client has gone in the middle of a request")
        buffer[: len(data)] = data
        self._left -= len(data)
        if not self._left:
            if self._chunked:
                self._stream.readline(_LINE)
            else:
                self._ended = True
        return len(data)

    def drain(self) -> None:
        """Read what nobody has read, so that the next request on the connection is found."""
        with contextlib.suppress(OSError):
            while self.read(_CHUNK):
                pass

    def _next_chunk(self) -> None:
        line = self._stream.readline(_LINE)
        try:
            self._left = int(line.split(b";")[0], 16)
        except ValueError:
            raise ConnectionResetError("the client has sent a malformed chunk") from None
        if not self._left:
            self._ended = True
            while self._stream.readline(_LINE).strip():  # trailers
                pass


class _Chunked(io.RawIOBase):
    """Takes a tar and sends it in chunks. The answer begins with the first of them, so that an early error is told."""

    def __init__(self, handler: _Handler) -> None:
        self._handler = handler
        self._waiting = bytearray()
        self.begun = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        """Send data, or keep it until there is more."""
        self._waiting += data
        if len(self._waiting) >= _CHUNK:
            self._send()
        return len(data)

    def end(self) -> None:
        """Send what is left, and the end."""
        self._send()
        self._handler.wfile.write(b"0\r\n\r\n")
        self._handler.wfile.flush()

    def _send(self) -> None:
        if not self.begun:
            self.begun = True
            self._handler.send_response(200)
            self._handler.send_header("Content-Type", "application/x-tar")
            self._handler.send_header("Transfer-Encoding", "chunked")
            self._handler.end_headers()
        if self._waiting:
            self._handler.wfile.write(b"%x\r\n%b\r\n" % (len(self._waiting), bytes(self._waiting)))
            self._waiting.clear()
