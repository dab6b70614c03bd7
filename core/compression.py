"""Blobs in and out: gzip and zstd, read ahead and hashed in a thread beside the work on their content.

Both compressions of the OCI image spec are read, in one or many members or frames (RFC 1952, RFC 8878), with the
amount of decompressed data in memory bounded whatever a blob claims. Reading, decompressing and hashing release the
interpreter lock, so that they run on another core than the caller.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import queue
import secrets
import select
import stat
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final, Protocol, Self

import zstandard
from isal import igzip_lib, isal_zlib

from layerfs.errors import BadLayer, InvalidArgument, refused

BLOCK: Final = 1 << 20
"""Bytes handed on at once: enough that passing the interpreter lock between the threads does not count."""

# The stub calls it an instance.
_IsalError: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]

_AHEAD = 8  # blocks between the two threads

_FOREIGN = {b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2", b"\x04\x22\x4d\x18": "lz4"}


def detect(head: bytes) -> str:
    """The compression that a blob's first bytes show: ``gzip``, ``zstd`` or ``none``. Raises `BadLayer` for others."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return "zstd"
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            raise BadLayer(f"the blob is compressed with {name}; image layers are plain, gzip or zstd")
    return "none"


class _Input:
    """The raw bytes of a stream, with a way to stop a thread that waits for them.

    A plain file or pipe is read by its descriptor, so that a wait can be broken off; any other object by its
    ``read``, which has to return by itself.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.count = 0
        self._stopped = False
        self._wake: tuple[int, int] | None = None
        self._fd: int | None = None
        self._read: Callable[[int], bytes] = stream.read
        # Exactly these types: a subclass or wrapper may have a reason to see every read.
        if type(stream) in (io.BufferedReader, io.BufferedRandom, io.FileIO):
            plain = stream.read if type(stream) is io.FileIO else stream.read1  # type: ignore[attr-defined]
            # One read of more than its buffer leaves the buffer empty and the descriptor where the reader stands.
            self._head = plain(BLOCK) or b""
            self._fd = stream.fileno()
            mode = os.fstat(self._fd).st_mode
            if stat.S_ISREG(mode):
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            else:
                self._wake = os.pipe2(os.O_CLOEXEC)
                with contextlib.suppress(OSError):  # no pipe, or more than this user may have
                    fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, BLOCK)
        else:
            self._head = stream.read(BLOCK)
        self.count = len(self._head)
        while 0 < len(self._head) < 8 and (more := self._more()):  # detection needs the longest magic number
            self._head += more

    @property
    def head(self) -> bytes:
        return self._head

    def read(self, _size: int = BLOCK) -> bytes:
        """Some more bytes, at most ``_size`` or a block; empty at the end and after `stop`."""
        if head := self._head:
            self._head = head[_size:]
            return head[:_size]
        return self._more(min(_size, BLOCK))

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read():
            yield data

    def _more(self, size: int = BLOCK) -> bytes:
        if self._stopped:
            return b""
        if self._fd is None:
            data = self._read(size)
        else:
            if self._wake is not None:
                poller = select.poll()
                poller.register(self._fd, select.POLLIN)
                poller.register(self._wake[0], select.POLLIN)
                if any(fd == self._wake[0] for fd, _ in poller.poll()):
                    return b""
            data = os.read(self._fd, size)
        self.count += len(data)
        return data

    def stop(self) -> None:
        self._stopped = True
        if self._wake is not None:
            os.write(self._wake[1], b"x")

    def close(self) -> None:
        if self._wake is not None:
            os.close(self._wake[0])
            os.close(self._wake[1])
            self._wake = None


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress gzip members one after another; zero bytes may follow them (gzip's manual, tapes)."""
    decoder = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)
    fresh, started = True, False  # fresh: no byte of this member was seen
    for data in chunks:
        while True:
            if fresh:
                data = data.lstrip(b"\0") if started else data
                if not data:
                    break
                if started and data[0] != 0x1F:
                    raise BadLayer("the gzip blob is followed by garbage")
            fresh, started = False, True
            try:
                out = decoder.decompress(data, BLOCK)
            except (_IsalError, EOFError, ValueError) as error:
                raise BadLayer(f"the gzip blob is damaged: {error}") from error
            if out:
                yield out
            if decoder.eof:
                data = decoder.unused_data
                decoder = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)
                fresh = True
            elif decoder.needs_input:
                break
            else:
                data = b""
    if not fresh:
        raise BadLayer("the gzip blob is cut off")


class _Sealed:
    """The frames of a zstd blob, and after them one more frame that is known.

    python-zstandard does not tell the end of the input from the end of a frame. Where the blob is cut off, the known
    frame is taken for the rest of the one before it, and its content does not come out at the end.
    """

    def __init__(self, source: _Input) -> None:
        self.seal = secrets.token_bytes(16)
        self._source = source
        self._last = zstandard.ZstdCompressor(write_checksum=True).compress(self.seal)

    def read(self, size: int) -> bytes:
        if data := self._source.read(size):
            return data
        data, self._last = self._last, b""
        return data


def _unzstd(source: _Input) -> Iterator[bytes]:
    sealed = _Sealed(source)
    tail = b""
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(
            sealed,  # type: ignore[arg-type]
            read_size=1 << 16,
            read_across_frames=True,
            closefd=False,
        ) as reader:
            while data := reader.read(BLOCK):
                if len(data) < 16:
                    tail += data
                    continue
                if tail:
                    yield tail
                tail = data
    except zstandard.ZstdError as error:
        raise BadLayer(f"the zstd blob is damaged or cut off: {error}") from error
    if not tail.endswith(sealed.seal):
        raise BadLayer("the zstd blob is cut off")
    if rest := tail[:-16]:
        yield rest


class ReadAhead:
    """The content of a blob in blocks, made by a thread that runs a few MiB ahead.

    Args:
        stream: the blob: plain, gzip or zstd; read from where it stands. Its position afterwards is not defined.
        digest: also compute the SHA-256 of the content.

    Always `close` it (or use ``with``): that ends the thread at once, also where it waits for a pipe.
    """

    def __init__(self, stream: BinaryIO, *, digest: bool = False) -> None:
        self._hash = hashlib.sha256() if digest else None
        self._input = _Input(stream)
        self._blocks: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(_AHEAD)
        self._stopped = False
        self._ended = False
        try:
            kind = detect(self._input.head)
            source: Iterator[bytes] = iter(self._input)
            if kind == "gzip":
                source = _gunzip(source)
            elif kind == "zstd":
                source = _unzstd(self._input)
            self._thread = threading.Thread(target=self._run, args=(source,), name="layerfs-read", daemon=True)
            self._thread.start()
        except BaseException:
            self._input.close()
            raise

    @property
    def consumed(self) -> int:
        """Bytes read from the stream until now."""
        return self._input.count

    def _run(self, source: Iterator[bytes]) -> None:
        update = None if self._hash is None else self._hash.update
        try:
            for block in source:
                self._room.acquire()
                if self._stopped:
                    return
                self._blocks.put(block)
                if update is not None:
                    update(block)
            self._blocks.put(b"")
        except BaseException as error:  # it is raised in the thread that asks for the block
            self._blocks.put(error)

    def next(self) -> bytes:
        """The next block; empty at the end. Raises `BadLayer` where the blob is damaged, cut off or not known."""
        if self._ended:
            return b""
        block = self._blocks.get()
        self._room.release()
        if isinstance(block, bytes):
            self._ended = not block
            return block
        self._ended = True
        if isinstance(block, OSError):
            raise refused("reading the layer's stream", block) from block
        raise block

    def hexdigest(self) -> str:
        """SHA-256 of the whole content; only after `next` has given the end."""
        assert self._hash is not None
        self._thread.join()
        return self._hash.hexdigest()

    def close(self) -> None:
        """End the thread. Idempotent."""
        if not self._stopped:
            self._stopped = True
            self._input.stop()
            self._room.release()
            self._thread.join()
            self._input.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Blob(io.RawIOBase):
    """What `open_blob` gives: `ReadAhead` as a file."""

    def __init__(self, ahead: ReadAhead) -> None:
        self._ahead = ahead
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        if not self._rest:
            self._rest = memoryview(self._ahead.next())
        size = min(len(view), len(self._rest))
        view[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def close(self) -> None:
        self._ahead.close()
        super().close()


def open_blob(raw: BinaryIO) -> BinaryIO:
    """The content of a blob as a file to read from: gzip and zstd are detected and decompressed in a thread.

    Closing it ends the thread and leaves ``raw`` open. Reading raises `BadLayer` where the blob is damaged.
    """
    return io.BufferedReader(_Blob(ReadAhead(raw)), BLOCK)


class _Encoder(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


class _Plain:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _encoder(kind: str, level: int | None) -> _Encoder:
    if kind == "gzip":  # isal writes no time and no name into the header, so that equal input gives equal bytes
        encoder: _Encoder = isal_zlib.compressobj(2 if level is None else level, wbits=31)
        return encoder
    if kind == "zstd":
        return zstandard.ZstdCompressor(3 if level is None else level, write_checksum=True).compressobj()
    if kind == "none":
        return _Plain()
    raise InvalidArgument(f"compression {kind!r} is not known; there are gzip, zstd and none")


class Compressor(io.RawIOBase):
    """A file to write to, which compresses into ``out`` in a thread of its own.

    Equal bytes written give equal bytes out (for one version of the libraries), in whatever pieces they are written.

    Args:
        out: takes the compressed bytes; it is not closed.
        kind: ``gzip``, ``zstd`` or ``none``.
        level: the library's own scale (gzip 0 to 3, zstd 1 to 22).

    `close` finishes the blob; leaving ``with`` by an exception does not write more. Errors of ``out`` are raised by a
    later `write` or by `close`.
    """

    def __init__(self, out: BinaryIO, kind: str, level: int | None = None) -> None:
        self._encoder = _encoder(kind, level)
        self._out = out
        self._pending = bytearray()
        self._queue: queue.Queue[bytes | None] = queue.Queue(8)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="layerfs-compress", daemon=True)
        self._thread.start()

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        before = len(self._pending)
        self._pending += memoryview(data).cast("B")  # type: ignore[arg-type]
        size = len(self._pending) - before
        while len(self._pending) >= BLOCK:  # pieces of one size, so that the output does not depend on the callers'
            self._hand_on(bytes(self._pending[:BLOCK]))
            del self._pending[:BLOCK]
        return size

    def _hand_on(self, block: bytes | None) -> None:
        self._raise()
        self._queue.put(block)

    def _run(self) -> None:
        while (block := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._out.write(self._encoder.compress(block))
                except BaseException as error:  # it is raised in the thread that writes
                    self._error = error

    def _raise(self) -> None:
        if (error := self._error) is None:
            return
        if isinstance(error, OSError):
            raise refused("writing the compressed layer", error) from error
        raise error

    def close(self) -> None:
        """Finish the blob and end the thread."""
        if self.closed:
            return
        try:
            if self._pending and self._error is None:
                self._queue.put(bytes(self._pending))
            self._end()
            self._raise()
            self._out.write(self._encoder.flush())
        finally:
            super().close()

    def abandon(self) -> None:
        """End the thread and leave the blob unfinished."""
        if not self.closed:
            self._end()
            super().close()

    def _end(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()
