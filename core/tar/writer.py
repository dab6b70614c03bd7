"""Writes tar archives: headers as bytes that depend on nothing but what they describe, and payloads fast.

The format is POSIX.1-2017 pax: plain ustar headers, with an extended header in front only where a field of ustar is
too small. Names go as the bytes that they are. A thread computes the archive's digest beside the reading and writing.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import io
import os
import queue
import struct
import threading
import zlib
from collections.abc import Mapping
from functools import lru_cache
from types import TracebackType
from typing import BinaryIO, Final, Self
from urllib.parse import quote_from_bytes

from isal import isal_zlib

from layerfs.errors import refused
from layerfs.record import RecordWriter
from layerfs.tar.header import BLOCK, ZEROS

_CHUNK: Final = 1 << 20
"""Bytes handed on at once: each time costs the threads a turn of the interpreter's lock."""
_CHUNKS: Final = 8
_PATIENCE: Final = 1.0  # seconds

_NAME_SIZE: Final = 100
_PREFIX_SIZE: Final = 155
_LARGEST_ID: Final = 0o7777777
_LARGEST_SIZE: Final = 0o77777777777

# kind, link, magic+version, uname+gname, major+minor, prefix
_TAIL: Final = struct.Struct("1s100s8s64s16s167s")
_MAGIC: Final = b"ustar\x0000"
_NO_DEVICE: Final = b"0000000\x000000000\0"
_BLANKS: Final = 8 * ord(" ")
"""What the checksum's own field counts as."""
_EXTENDED_NAME: Final = b"././@PaxHeader"


class SizeChanged(Exception):
    """A file is shorter or longer than its header says."""


def header(
    name: bytes,
    kind: bytes,
    mode: int,
    uid: int,
    gid: int,
    mtime: int,
    xattrs: Mapping[str, bytes],
    *,
    size: int = 0,
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
) -> bytes:
    """The header of an entry, with the extended header in front where it needs one.

    Args:
        kind: type flag, see `layerfs.tar.header`.
        mode: permission bits with setuid, setgid and sticky.
        mtime: nanoseconds since the epoch.
        xattrs: extended attributes by name.
        size: bytes of payload that follow.
        link: target of a hard or symbolic link.
        device: major and minor number.
    """
    extended: dict[bytes, bytes] = {}
    prefix, short = b"", name
    if len(name) > _NAME_SIZE:
        prefix, short = _split(name)
        if not prefix:
            extended[b"path"] = name
    if len(link) > _NAME_SIZE:
        extended[b"linkpath"] = link
    if uid > _LARGEST_ID:
        extended[b"uid"] = b"%d" % uid
        uid = 0
    if gid > _LARGEST_ID:
        extended[b"gid"] = b"%d" % gid
        gid = 0
    if size > _LARGEST_SIZE:
        extended[b"size"] = b"%d" % size
        size = 0
    seconds, fraction = divmod(mtime, 1_000_000_000)
    if fraction or not 0 <= seconds <= _LARGEST_SIZE:
        extended[b"mtime"] = _time(mtime)
        seconds = min(max(seconds, 0), _LARGEST_SIZE)
    if xattrs:
        extended.update(_attribute(key, value) for key, value in xattrs.items())
    rest = _rest(kind, link, device, prefix) if link or prefix or device != (0, 0) else _plain_rest(kind)
    block = _block(short, _owner(mode, uid, gid), size, seconds, rest)
    return _extension(extended) + block if extended else block


def _split(name: bytes) -> tuple[bytes, bytes]:
    """A long name as ustar's prefix and name, or (nothing, its end) where that is not possible."""
    cut = name.rfind(b"/", 0, min(_PREFIX_SIZE + 1, len(name) - 1))
    if cut > 0 and len(name) - cut - 1 <= _NAME_SIZE:
        return name[:cut], name[cut + 1 :]
    return b"", name[-_NAME_SIZE:]


def _time(nanoseconds: int) -> bytes:
    """Seconds as a decimal number without needless digits."""
    seconds, fraction = divmod(abs(nanoseconds), 1_000_000_000)
    sign = b"-" if nanoseconds < 0 else b""
    return b"%b%d.%09d" % (sign, seconds, fraction) if fraction else b"%b%d" % (sign, seconds)


def _attribute(key: str, value: bytes) -> tuple[bytes, bytes]:
    """SCHILY's record takes any value, but no "=" in the name; libarchive's takes any name."""
    name = os.fsencode(key)
    if b"=" in name:
        return b"LIBARCHIVE.xattr." + quote_from_bytes(name).encode(), base64.b64encode(value)
    return b"SCHILY.xattr." + name, value


def _extension(records: Mapping[bytes, bytes]) -> bytes:
    data = b"".join(_record(key, records[key]) for key in sorted(records))
    head = _block(_EXTENDED_NAME, _owner(0, 0, 0), len(data), 0, _plain_rest(b"x"))
    return head + data + bytes(-len(data) % BLOCK)


def _record(key: bytes, value: bytes) -> bytes:
    """``length key=value``, where the length counts its own digits."""
    rest = len(key) + len(value) + 3  # blank, equals sign, line end
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, key, value)


@lru_cache(maxsize=256)
def _owner(mode: int, uid: int, gid: int) -> bytes:
    """The fields of mode, uid and gid: most entries of a layer have the same few."""
    return b"%07o\0%07o\0%07o\0" % (mode, uid, gid)


def _rest(kind: bytes, link: bytes, device: tuple[int, int], prefix: bytes) -> tuple[bytes, int]:
    """The fields after the checksum, and what they add to it."""
    devices = _NO_DEVICE if device == (0, 0) else b"%07o\0%07o\0" % device
    fields = _TAIL.pack(kind, link, _MAGIC, b"", devices, prefix)
    return fields, _sum(fields[:256]) + _sum(fields[256:])


@lru_cache(maxsize=16)
def _plain_rest(kind: bytes) -> tuple[bytes, int]:
    """The same for what has no link, device or prefix: nearly all entries."""
    return _rest(kind, b"", (0, 0), b"")


def _block(name: bytes, owner: bytes, size: int, seconds: int, rest: tuple[bytes, int]) -> bytes:
    head = b"%b%b%011o\0%011o\0" % (name.ljust(_NAME_SIZE, b"\0"), owner, size, seconds)
    fields, total = rest
    return b"%b%06o\0 %b" % (head, _sum(head) + _BLANKS + total, fields)


def _sum(data: bytes) -> int:
    """The sum of up to 256 bytes: the low half of an Adler-32 is it plus one, modulo 65521, which they do not reach."""
    return (zlib.adler32(data) & 0xFFFF) - 1


class TarWriter:
    """Writes entries to a stream; a context manager, because a thread stands behind it.

    Args:
        out: is given pieces of one reused buffer, which it must be done with when its ``write`` returns. That thread
            calls it.
        record: takes the tar record (see `layerfs.record`).
        digest: whether to compute the archive's SHA-256, which takes longer than anything else.
    """

    def __init__(self, out: BinaryIO, record: RecordWriter | None = None, *, digest: bool = True) -> None:
        self._out = out
        _widen(out)
        self._record = record
        self._raw = isinstance(out, io.RawIOBase)  # which may write less than it is given
        self._size = 0
        self._used = 0
        self._digest = hashlib.sha256() if digest else None
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[bytearray, int] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._given_up = False
        for _ in range(_CHUNKS):
            self._free.put(bytearray(_CHUNK))
        self._take_free()
        self._thread = threading.Thread(target=self._write_out, name="layerfs-archive", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given_up = True
        self._full.put(None)
        # Who was interrupted does not wait for a reader that may never read on.
        self._thread.join(_PATIENCE if error is not None and not isinstance(error, Exception) else None)

    def header(self, data: bytes) -> None:
        """Append bytes that are no payload."""
        if self._record is not None:
            self._record.raw(data)
        self._append(data)

    def payload(self, fd: int, size: int, path: bytes) -> None:
        """Append the file ``fd`` with its padding. Raises `SizeChanged` where it has not ``size`` bytes.

        ``path`` is what the tar record finds it by.
        """
        read = self._read_small if size < _CHUNK - self._used else self._read_large
        checksum = read(fd, size)
        if self._record is not None:
            self._record.file(path, size, None, checksum)
        if pad := -size % BLOCK:
            self.header(ZEROS[:pad])

    def finish(self) -> tuple[str, int]:
        """End the archive; returns its SHA-256 in hexadecimal, where it was wanted, and its size in bytes."""
        self.header(ZEROS + ZEROS)
        self._full.put((self._buffer, self._used))
        self._full.put(None)
        self._thread.join()
        self._check()
        digest = self._digest.hexdigest() if self._digest else ""
        if self._record is not None:
            self._record.finish(digest, self._size)
        return digest, self._size

    def _read_small(self, fd: int, size: int) -> int:
        """Into what is free of the chunk, in one call; the CRC-32 of it."""
        used = self._used
        if os.readv(fd, [self._chunk[used : used + size + 1]]) != size:
            raise SizeChanged
        self._used = used + size
        return 0 if self._record is None else isal_zlib.crc32(self._chunk[used : used + size])

    def _read_large(self, fd: int, size: int) -> int:
        checksum = 0
        left = size
        ended = False
        while left:
            if self._used == _CHUNK:
                self._hand_over()
            used = self._used
            wanted = min(left + 1, _CHUNK - used)
            count = os.readv(fd, [self._chunk[used : used + wanted]])
            if not 0 < count <= left:
                raise SizeChanged
            ended = count < wanted
            if self._record is not None:
                checksum = isal_zlib.crc32(self._chunk[used : used + count], checksum)
            left -= count
            self._used += count
        if not ended and os.read(fd, 1):
            raise SizeChanged
        return checksum

    def _append(self, data: bytes) -> None:
        end = self._used + len(data)
        if end <= _CHUNK:
            self._chunk[self._used : end] = data
            self._used = end
            return
        at = 0
        while at < len(data):
            if self._used == _CHUNK:
                self._hand_over()
            count = min(len(data) - at, _CHUNK - self._used)
            self._chunk[self._used : self._used + count] = data[at : at + count]
            self._used += count
            at += count

    def _hand_over(self) -> None:
        self._full.put((self._buffer, self._used))
        self._take_free()
        self._check()

    def _take_free(self) -> None:
        self._buffer = self._free.get()
        self._chunk = memoryview(self._buffer)
        self._used = 0

    def _check(self) -> None:
        """Raise what stopped the thread."""
        if isinstance(self._error, OSError) and not isinstance(self._error, BrokenPipeError):
            raise refused("writing the archive", self._error) from self._error
        if self._error is not None:
            raise self._error  # a reader that has seen enough, or what the stream itself raises

    def _write_out(self) -> None:
        """Write and digest what is handed over, until something goes wrong, which `_check` tells."""
        while (item := self._full.get()) is not None:
            buffer, used = item
            if self._error is None and not self._given_up:
                try:
                    self._write(memoryview(buffer)[:used])
                except Exception as error:
                    self._error = error
            self._free.put(buffer)

    def _write(self, piece: memoryview) -> None:
        written = self._out.write(piece)
        while self._raw and written < len(piece):
            written += self._out.write(piece[written:])
        if self._digest:
            self._digest.update(piece)
        self._size += len(piece)


def _widen(out: BinaryIO) -> None:
    """Let a pipe take as much as one may ask for without privileges: one side waits less often for the other."""
    with contextlib.suppress(OSError, AttributeError):  # no pipe, or nothing with a descriptor
        fcntl.fcntl(out.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)
