"""SHA-256 digests as OCI writes them: checked, computed while bytes pass, and chained.

The form is ``sha256:`` and 64 lower-case hexadecimal digits (OCI image spec, *Descriptors*). SHA-512, which the spec
allows and nobody uses for images, is refused with a sentence of its own.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable
from typing import BinaryIO, Final

from layerfs.errors import BadLayer

ALGORITHM: Final = "sha256"
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_OTHER: Final = re.compile(r"[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[0-9a-zA-Z=_-]+")


def checked(text: object, what: str) -> str:
    """``text`` if it is a digest; ``what`` says where it stands. Safe as a file name after the colon.

    Raises `BadLayer`.
    """
    if isinstance(text, str):
        if _DIGEST.fullmatch(text):
            return text
        if _OTHER.fullmatch(text) and not text.startswith("sha256:"):
            raise BadLayer(f"{what} uses the digest {text[:40]!r}; only sha256 is supported")
    raise BadLayer(f"{what} has a malformed digest: {repr(text)[:100]}")


def encoded(digest: str) -> str:
    """The hexadecimal part of a digest."""
    return digest.removeprefix("sha256:")


def of(data: bytes) -> str:
    """The digest of some bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def chain_ids(diff_ids: Iterable[str]) -> list[str]:
    """The chain ID of each layer of an image, bottom layer first (OCI image spec, *Layer ChainID*)."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return chain


class VerifyingReader(io.RawIOBase):
    """Reads a blob and refuses it at its end (or before) where its size or digest is not what it should be.

    Args:
        raw: the blob; it is closed with the reader.
        digest, size: what its descriptor says; None for a digest that somebody else will check.
        what: what it is, for error texts.
        counted: is called with the number of bytes of each read.

    The whole blob has to be read for the verdict: only the read that finds the end tells.
    """

    def __init__(
        self, raw: BinaryIO, digest: str | None, size: int, what: str, counted: Callable[[int], object] | None = None
    ) -> None:
        self._raw = raw
        self._digest = digest
        self._size = size
        self._what = what
        self._counted = counted
        self._hash = hashlib.sha256()
        self._seen = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes, empty at the end. Raises `BadLayer`."""
        if size < 0:
            return self.readall()
        data = self._raw.read(size)
        self._seen += len(data)
        if self._seen > self._size:
            raise BadLayer(f"{self._what} is longer than the {self._size} bytes that its descriptor says")
        if data:
            if self._digest is not None:
                self._hash.update(data)
            if self._counted is not None:
                self._counted(len(data))
        elif size:
            self._finish()
        return data

    def readall(self) -> bytes:
        parts: list[bytes] = []
        while data := self.read(1 << 20):
            parts.append(data)
        return b"".join(parts)

    def _finish(self) -> None:
        if self._seen != self._size:
            raise BadLayer(f"{self._what} has {self._seen} bytes, but its descriptor says {self._size}")
        actual = f"sha256:{self._hash.hexdigest()}"
        if self._digest is not None and actual != self._digest:
            raise BadLayer(f"{self._what} is damaged: its digest is {actual}, but should be {self._digest}")

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class HashingWriter(io.RawIOBase):
    """Passes what is written on to ``out`` and keeps its digest and size; ``out`` is not closed."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._hash = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        self._out.write(view)
        self._hash.update(view)
        self.size += len(view)
        return len(view)

    @property
    def digest(self) -> str:
        """The digest of all that was written until now."""
        return f"sha256:{self._hash.hexdigest()}"
