"""A seekable tar as a container of files: an index of its members, which are read in place and never extracted.

Names and links are only ever looked up in that index, so that nothing in the archive can point at a file of the host.
"""

from __future__ import annotations

import io
import os
import posixpath
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Self

from layerfs.compression import detect, open_blob
from layerfs.errors import BadLayer, refused
from layerfs.tar import header
from layerfs.tar.reader import TarReader

_MOST: Final = 200_000  # members of one archive
_LINKS: Final = 8
_LONGEST: Final = 4096
_NOTHING: Final = bytes(1 << 20)


@dataclass(frozen=True, slots=True)
class _Member:
    offset: int
    size: int
    link: str | None = None


class _Feeder:
    """Gives a tar reader the headers of an archive, and zeros of the right length for each payload."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._length = os.fstat(fd).st_size
        self.offset = 0
        self.payload = 0

    def next_block(self) -> bytes:
        if self.payload:
            size = min(self.payload, len(_NOTHING), self._length - self.offset)
            self.payload -= size
            self.offset += size
            return _NOTHING[:size]
        data = os.pread(self._fd, header.BLOCK, self.offset)
        self.offset += len(data)
        return data


class Archive:
    """An archive's members by name.

    Args:
        path: a tar, or one compressed with gzip or zstd; that is first decompressed into a file without a name.
        scratch: directory for that file.

    Raises `BadLayer` where it is no tar, is cut off, or has more members than an image needs.
    """

    def __init__(self, path: Path, scratch: Path) -> None:
        self._path = path
        self._file = self._plain(path, scratch)
        try:
            self._members = self._index()
        except BadLayer as error:
            self.close()
            raise BadLayer(f"{path} cannot be read as an archive: {error}") from error
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _plain(path: Path, scratch: Path) -> BinaryIO:
        try:
            raw = path.open("rb")
        except OSError as error:
            raise refused(f"open {path}", error) from error
        try:
            head = raw.read(16)
            raw.seek(0)
            if detect(head) == "none":
                return raw
            with raw, open_blob(raw) as content:
                plain = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - it is kept open and closed with the archive
                try:
                    while data := content.read(1 << 20):
                        plain.write(data)
                    plain.flush()
                except BaseException:
                    plain.close()
                    raise
            return plain
        except OSError as error:
            raw.close()
            raise refused(f"decompress {path}", error) from error
        except BadLayer as error:
            raw.close()
            raise BadLayer(f"{path} cannot be read: {error}") from error

    def _index(self) -> dict[str, _Member]:
        members: dict[str, _Member] = {}
        feeder = _Feeder(self._file.fileno())
        for entry in TarReader(feeder.next_block):
            if len(entry.name) > _LONGEST:
                raise BadLayer(f"{header.label(entry.name[:100])} is too long a name")
            name = _plain_name(os.fsdecode(entry.name))
            if entry.kind in (b"1", b"2"):
                target = os.fsdecode(entry.link)
                base = posixpath.dirname(name) if entry.kind == b"2" else ""
                members[name] = _Member(0, 0, _plain_name(posixpath.join(base, target)))
            elif entry.kind == b"0" and entry.segments is None:
                members[name] = _Member(feeder.offset, entry.stored)
            else:
                members.pop(name, None)
            feeder.payload = entry.stored + -entry.stored % header.BLOCK
            if len(members) > _MOST:
                raise BadLayer(f"it has more than {_MOST} members")
        return members

    def _find(self, name: str) -> _Member | None:
        """The file of this name; links lead to other members and nowhere else."""
        for _ in range(_LINKS):
            member = self._members.get(_plain_name(name))
            if member is None or member.link is None:
                return member
            name = member.link
        return None

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none of that name."""
        member = self._find(name)
        return None if member is None else member.size

    def identity(self, name: str) -> object:
        """The same for all names of one file, and for no other."""
        return self._find(name)

    def open(self, name: str) -> io.BufferedReader:
        """A file's content; each reader has its own position, so that several threads can read at once.

        Raises `BadLayer` where there is none of that name.
        """
        member = self._find(name)
        if member is None:
            raise BadLayer(f"{self._path} has no file {name!r}")
        return io.BufferedReader(_Part(os.dup(self._file.fileno()), member.offset, member.size), 1 << 18)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Part(io.RawIOBase):
    """A piece of a file, from its own descriptor."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd = fd
        self._offset = offset
        self._left = size
        self._closing = threading.Lock()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        size = os.preadv(self._fd, [view[: self._left]], self._offset) if self._left else 0
        self._offset += size
        self._left -= size
        return size

    def close(self) -> None:
        with self._closing:
            if not self.closed:
                os.close(self._fd)
            super().close()


def _plain_name(name: str) -> str:
    """One spelling for all forms of a name; one that climbs out keeps its ``..`` and is found nowhere."""
    return posixpath.normpath(name).lstrip("/")
