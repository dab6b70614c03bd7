"""The manifests and configurations of a store's images, as files named by their digests.

They are kept under ``ROOT/blobs/sha256``; layers' blobs are not kept, since layers can be written again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path

from layerfs import digest
from layerfs.errors import Damaged, refused


class ImageBlobs:
    """The blobs below ``root``, a store's root directory."""

    def __init__(self, root: Path) -> None:
        self._path = root / "blobs" / digest.ALGORITHM
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def locked(self, *, alone: bool = False) -> Iterator[None]:
        """Hold off others while images come or are read (shared), or while something is taken away (alone).

        What an import has found or written, but not yet recorded, must not be collected as garbage meanwhile.
        """
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield
        finally:
            os.close(fd)

    def put(self, data: bytes) -> str:
        """Keep a blob; its digest. Whole on disk when this returns. Raises `OutOfSpace`, `KernelRefused`."""
        name = digest.of(data)
        path = self._path / digest.encoded(name)
        try:
            if not self._holds(path, data):
                with tempfile.NamedTemporaryFile(dir=self._path, prefix="new-", delete=False) as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    os.rename(file.name, path)
        except OSError as error:
            raise refused(f"keep the blob {name}", error) from error
        return name

    @staticmethod
    def _holds(path: Path, data: bytes) -> bool:
        """Whether the blob is there as it should be; one that was damaged is written again."""
        try:
            return path.read_bytes() == data
        except FileNotFoundError:
            return False

    def get(self, name: str) -> bytes:
        """A blob's bytes, verified. Raises `Damaged`."""
        try:
            data = (self._path / digest.encoded(name)).read_bytes()
        except FileNotFoundError:
            raise Damaged(f"the blob {name} is missing; import the image again") from None
        except OSError as error:
            raise refused(f"read the blob {name}", error) from error
        if digest.of(data) != name:
            raise Damaged(f"the blob {name} is damaged; remove the image and import it again")
        return data

    def sweep(self, used: Container[str]) -> Iterator[str]:
        """Remove what is not ``used`` (digests), and what a crash left half written; give the names of the files."""
        for name in sorted(os.listdir(self._path)):
            if f"{digest.ALGORITHM}:{name}" not in used:
                (self._path / name).unlink()
                yield name
