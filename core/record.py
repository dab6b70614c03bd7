"""The tar record: a tar stream without its files' payloads, from which its exact bytes can be made again.

Applying a layer can write such a record: header blocks, padding and extended headers as they came, and in place of
each payload the file it was written to, with its pieces and a CRC-32. `rebuild` puts record and tree together again.

On disk a record is a zstd stream of items, each a tag byte, a 32-bit length (both little-endian) and a body:

==========  =============================================================================================
``RAW``     bytes of the archive
``FILE``    a payload: CRC-32, number of pieces, pieces (offset, length), path of the file that has it
``SAVED``   what follows in ``CONTENT`` items is the content of the last ``FILE`` of this path, which a later
            entry of the same archive took the place of: size, path
``CONTENT`` such bytes: offset, data; what is between them is holes
``END``     length and SHA-256 of the whole archive
==========  =============================================================================================
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import zstandard
from isal import isal_zlib

from layerfs import beneath
from layerfs.errors import Damaged, refused
from layerfs.tar.header import label

_MAGIC: Final = b"layerfs record 1\n"
_ITEM = struct.Struct("<BI")
_FILE = struct.Struct("<II")
_END = struct.Struct("<q32s")
_PIECE = struct.Struct("<qq")
_OFFSET = struct.Struct("<q")
_RAW, _FILE_TAG, _SAVED, _CONTENT, _END_TAG = 1, 2, 3, 4, 5

_CHUNK: Final = 1 << 18
_LONGEST: Final = 1 << 28  # an item; a sparse map of 2^20 pieces and a path fit


@contextmanager
def created(path: Path) -> Iterator[BinaryIO]:
    """A file to write a record to, which is whole on disk when the body is done."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


class RecordWriter:
    """Writes a record to ``out`` while a layer is applied."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._zstd = zstandard.ZstdCompressor(1, write_checksum=True).compressobj()
        self._raw = bytearray()
        self._items = bytearray(_MAGIC)

    def raw(self, data: bytes) -> None:
        """Bytes of the archive that are in no file."""
        self._raw += data
        if len(self._raw) > _CHUNK:
            self._flush_raw()

    def file(self, path: bytes, size: int, segments: array[int] | None, checksum: int) -> None:
        """A payload that now is the file ``path`` (or, with ``segments``, the pieces of it that are no holes)."""
        self._flush_raw()
        if segments is None:
            pieces, count = _PIECE.pack(0, size), 1
        else:
            pieces, count = struct.pack(f"<{len(segments)}q", *segments), len(segments) // 2
        self._item(_FILE_TAG, _FILE.pack(checksum, count) + pieces + path)

    def saved(self, path: bytes, fd: int) -> None:
        """Keep the content of the file ``path``, open as ``fd``, because it will not be in the tree."""
        self._flush_raw()
        size = os.fstat(fd).st_size
        self._item(_SAVED, _OFFSET.pack(size) + path)
        at = 0
        while at < size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return  # a hole up to the end
            hole = os.lseek(fd, at, os.SEEK_HOLE)
            while at < hole and (data := os.pread(fd, min(_CHUNK, hole - at), at)):
                self._item(_CONTENT, _OFFSET.pack(at) + data)
                at += len(data)

    def finish(self, digest: str, size: int) -> None:
        """End the record; ``digest`` is the archive's SHA-256 in hexadecimal."""
        self._flush_raw()
        self._item(_END_TAG, _END.pack(size, bytes.fromhex(digest)))
        self._write(self._zstd.compress(bytes(self._items)) + self._zstd.flush())

    def _item(self, tag: int, body: bytes | bytearray) -> None:
        self._items += _ITEM.pack(tag, len(body))
        self._items += body
        if len(self._items) > _CHUNK:
            self._write(self._zstd.compress(bytes(self._items)))
            self._items.clear()

    def _write(self, data: bytes) -> None:
        try:
            self._out.write(data)
        except OSError as error:
            raise refused("writing the tar record", error) from error

    def _flush_raw(self) -> None:
        if self._raw:
            self._item(_RAW, self._raw)
            self._raw.clear()


@dataclass(frozen=True, slots=True)
class Payload:
    """A file's payload that a record refers to.

    Attributes:
        path: where in the tree the payload is, without a leading slash.
        pieces: (offset, length) of each piece, in the order of the archive.
        checksum: CRC-32 of all pieces.
    """

    path: bytes
    pieces: tuple[tuple[int, int], ...]
    checksum: int

    @property
    def size(self) -> int:
        return sum(length for _, length in self.pieces)


def _items(record: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The items of a record, from its beginning. Raises `Damaged`."""
    record.seek(0)
    with zstandard.ZstdDecompressor().stream_reader(record, closefd=False) as stream:

        def read(size: int) -> bytes:
            parts = []
            while size and (data := stream.read(min(size, _CHUNK))):
                parts.append(data)
                size -= len(data)
            if size:
                raise Damaged("the tar record is cut off")
            return b"".join(parts)

        try:
            if read(len(_MAGIC)) != _MAGIC:
                raise Damaged("the tar record is of an unknown format")
            tag = 0
            while tag != _END_TAG:
                tag, length = _ITEM.unpack(read(_ITEM.size))
                if length > _LONGEST or not _RAW <= tag <= _END_TAG:
                    raise Damaged("the tar record is damaged")
                yield tag, read(length)
        except (zstandard.ZstdError, struct.error) as error:
            raise Damaged(f"the tar record is damaged: {error}") from error


def _payload(body: bytes) -> Payload:
    checksum, count = _FILE.unpack_from(body)
    end = _FILE.size + count * _PIECE.size
    if end > len(body):
        raise Damaged("the tar record is damaged")
    return Payload(body[end:], tuple(_PIECE.iter_unpack(body[_FILE.size : end])), checksum)


def entries(record: BinaryIO) -> Iterator[Payload]:
    """Every payload that the record refers to, in the order of the archive. ``record`` has to be seekable.

    Raises `Damaged` where the record itself is.
    """
    for tag, body in _items(record):
        if tag == _FILE_TAG:
            yield _payload(body)


class _Saved:
    """Payloads that are in the record itself, by the number of the ``FILE`` item that they belong to."""

    def __init__(self, record: BinaryIO, spool: int) -> None:
        self._where: dict[int, tuple[int, int]] = {}
        last: dict[bytes, int] = {}
        number = -1
        base = end = 0
        for tag, body in _items(record):
            if tag == _FILE_TAG:
                number += 1
                last[_payload(body).path] = number
            elif tag == _SAVED:
                base, end = end, end + _OFFSET.unpack_from(body)[0]
                if (owner := last.pop(body[_OFFSET.size :], None)) is not None:
                    self._where[owner] = (base, end - base)
            elif tag == _CONTENT:
                os.pwrite(spool, body[_OFFSET.size :], base + _OFFSET.unpack_from(body)[0])
        if end:
            os.ftruncate(spool, end)

    def find(self, number: int) -> tuple[int, int] | None:
        return self._where.get(number)


def rebuild(record: BinaryIO, tree: int, out: BinaryIO) -> str:
    """Write the archive that ``record`` was made of to ``out`` and return its diff ID (``sha256:…``).

    Args:
        record: seekable.
        tree: directory descriptor of the layer's tree, as it was when the archive had been applied.

    Raises `Damaged`, naming the first file whose payload is another one; what was written until then is of no use.
    """
    digest = hashlib.sha256()
    size = 0

    def write(data: bytes) -> None:
        nonlocal size
        digest.update(data)
        size += len(data)
        out.write(data)

    with tempfile.TemporaryFile() as spool:
        saved = _Saved(record, spool.fileno())
        number = -1
        for tag, body in _items(record):
            if tag == _RAW:
                write(body)
            elif tag == _FILE_TAG:
                number += 1
                payload = _payload(body)
                kept = saved.find(number)
                checksum = 0
                for data in _content(tree, payload) if kept is None else _pieces(spool.fileno(), payload, *kept):
                    checksum = isal_zlib.crc32(data, checksum)
                    write(data)
                if checksum != payload.checksum:
                    raise Damaged(f"{_name(payload)} is not what was applied: its content differs")
            elif tag == _END_TAG:
                wanted_size, wanted = _END.unpack(body)
                if digest.digest() != wanted or size != wanted_size:
                    raise Damaged("the layer's archive cannot be made again: the result has another digest")
    return f"sha256:{digest.hexdigest()}"


def _name(payload: Payload) -> str:
    return label(payload.path).replace("entry", "file", 1)


def _content(tree: int, payload: Payload) -> Iterator[bytes]:
    """The pieces of a payload from the file in the tree, which must not be reached through a link."""
    above, _, name = payload.path.rpartition(b"/")
    try:
        with beneath.directory(tree, above) as directory:
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        raise Damaged(f"{_name(payload)} is not what was applied: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{_name(payload)} is not what was applied: it is no regular file")
        yield from _pieces(fd, payload, 0, status.st_size)
    finally:
        os.close(fd)


def _pieces(fd: int, payload: Payload, start: int, size: int) -> Iterator[bytes]:
    for offset, length in payload.pieces:
        if offset + length > size:
            raise Damaged(f"{_name(payload)} is not what was applied: it has {size} bytes")
        end = offset + length
        while offset < end:
            data = os.pread(fd, min(_CHUNK, end - offset), start + offset)
            if not data:
                raise Damaged(f"{_name(payload)} is not what was applied: it ends early")
            offset += len(data)
            yield data
