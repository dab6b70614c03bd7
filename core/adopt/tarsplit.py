"""tar-split (github.com/vbatts/tar-split): an archive without the contents of its files, and the archive again.

It is a line of JSON for each piece, one after the other: a *segment* (type 2) has bytes of the archive in base64, a
*file* (type 1) says which file's content comes next and how long it is.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from layerfs.adopt.files import opened_within
from layerfs.compression import open_blob
from layerfs.errors import BadLayer

_FILE, _SEGMENT = 1, 2
_LONGEST: Final = 64 << 20
"""Bytes of a line: a segment is a few headers."""
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Split:
    """One archive that is kept split.

    Attributes:
        record: gives the tar-split file, compressed or not.
        tree: gives a descriptor of the directory that the files are in; it is closed with the archive.
        what: the layer, for error texts.
    """

    record: Callable[[], BinaryIO]
    tree: Callable[[], int]
    what: str

    def size(self) -> int:
        """The archive's bytes. Raises `BadLayer`."""
        return sum(len(data) if name is None else size for name, data, size in self._pieces())

    def open(self) -> BinaryIO:
        """The archive, put together while it is read. Reading raises `BadLayer` where a file is not as it was."""
        tree = self.tree()
        return io.BufferedReader(_Joined(self._joined(tree), tree), _CHUNK)

    def _pieces(self) -> Iterator[tuple[bytes | None, bytes, int]]:
        """Bytes of the archive, or the name and size of a file."""
        with self.record() as raw, open_blob(raw) as lines:
            while line := lines.readline(_LONGEST + 1):
                try:
                    yield _piece(json.loads(line) if len(line) <= _LONGEST else None)
                except (ValueError, TypeError, KeyError, RecursionError, binascii.Error):
                    raise BadLayer(f"{self.what}: its tar-split record is damaged") from None

    def _joined(self, tree: int) -> Generator[bytes, None, None]:
        for name, data, size in self._pieces():
            if name is None:
                yield data
            elif size:
                yield from self._content(tree, name, size)

    def _content(self, tree: int, name: bytes, size: int) -> Iterator[bytes]:
        what = f"{self.what}: the file {os.fsdecode(name)!r}"
        try:
            with opened_within(tree, name.lstrip(b"/") or b".") as file:
                if (found := os.fstat(file.fileno()).st_size) != size:
                    raise BadLayer(f"{what} has {found} bytes, but had {size} when it was unpacked")
                while size:
                    data = file.read(min(size, _CHUNK))
                    if not data:
                        raise BadLayer(f"{what} has become shorter meanwhile")
                    size -= len(data)
                    yield data
        except OSError as error:
            raise BadLayer(f"{what} cannot be read: {error.strerror or error}") from error


def _piece(entry: dict[str, Any] | None) -> tuple[bytes | None, bytes, int]:
    if entry is None:
        raise ValueError
    if entry["type"] == _SEGMENT:
        return None, base64.b64decode(entry.get("payload") or "", validate=True), 0
    size = entry.get("size", 0)
    if entry["type"] != _FILE or not isinstance(size, int) or size < 0:
        raise ValueError
    raw = entry.get("name_raw")  # where the name is no UTF-8
    return base64.b64decode(raw) if raw else entry.get("name", "").encode(), b"", size


class _Joined(io.RawIOBase):
    """What a generator gives, as a file; ``tree`` is a descriptor that is closed with it."""

    def __init__(self, pieces: Generator[bytes, None, None], tree: int) -> None:
        self._pieces = pieces
        self._tree = tree
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            self._pieces.close()
            os.close(self._tree)
        super().close()
