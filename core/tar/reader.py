"""Reads a tar stream entry by entry, in every dialect that image layers are found in.

Understood are v7, ustar, PAX (local and global headers), GNU long names, and the four kinds of sparse files (old GNU
and GNU.sparse 0.0, 0.1, 1.0). Nothing is seeked and nothing but one entry's headers is held in memory. What a layer
may not be (cut off, checksums wrong, garbage after the end, numbers out of range) is `BadLayer`, naming the entry.
"""

from __future__ import annotations

import base64
import binascii
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Final
from urllib.parse import unquote_to_bytes

from layerfs.errors import BadLayer
from layerfs.tar import header
from layerfs.tar.header import BLOCK, ZEROS, Entry, label

_LIMIT: Final = 1 << 20  # bytes of one entry's extended headers; Go's archive/tar allows as much for each
_SEGMENTS: Final = 1 << 20  # of one sparse file
_PADDING: Final = 1 << 26  # bytes after the end; GNU tar's largest blocks have 2^21
_LARGEST: Final = (1 << 63) - 1
_LAST_ID: Final = (1 << 32) - 2
_HEADER_ONLY = frozenset(b"1 2 3 4 5 6".split())
_REGULAR = frozenset((b"0", b"\0", b"7"))
_KNOWN = _REGULAR | _HEADER_ONLY | {b"S"}
_NO_XATTRS: Mapping[str, bytes] = {}


class _Extended:
    """What extended headers say about the next entry."""

    __slots__ = ("link", "name", "pax", "size", "sparse")

    def __init__(self) -> None:
        self.name: bytes | None = None
        self.link: bytes | None = None
        self.pax: dict[bytes, bytes] = {}
        self.sparse: list[int] = []
        self.size = 0


class TarReader:
    """Iterates the entries of a tar stream; the payload of an entry can be read until the next one is asked for.

    Args:
        next_block: gives the stream's bytes in pieces of any size, empty at the end.
        tee: is given every byte of the archive that is not payload, in order, and payload that nobody asked for.
        end_mark: refuse an archive that ends after an entry without a block of zeros, as one that was cut off. Else it
            may lack the padding of the last entry's payload as well.
    """

    def __init__(
        self, next_block: Callable[[], bytes], tee: Callable[[bytes], None] | None = None, *, end_mark: bool = True
    ) -> None:
        self._next_block = next_block
        self._tee = tee
        self._end_mark = end_mark
        self._block = b""
        self._at = 0
        self._left = 0  # payload of the current entry that was not read
        self._padding = 0
        self.size = 0
        """Bytes of the stream; complete after the last entry."""
        self._name = b""

    def __iter__(self) -> Iterator[Entry]:
        everywhere: dict[bytes, bytes] = {}
        extended: _Extended | None = None
        while True:
            if self._left:
                self._skip()
            may_end = not self._end_mark and bool(self._name) and extended is None
            if self._padding:
                if may_end and self._ended():
                    return
                self._take(self._padding)
                self._padding = 0
            if may_end and self._ended():
                return
            block = self._take(BLOCK)
            if block == ZEROS:
                if extended is not None:
                    raise BadLayer("the archive ends after an extended header")
                self._finish()
                return
            head = header.parse(block)
            self._name = head.name
            kind = head.kind
            if kind in _KNOWN:
                try:
                    yield self._complete(head, extended, everywhere)
                except (ValueError, UnicodeError, binascii.Error) as error:
                    raise BadLayer(f"{label(self._name)}: {error}") from error
                extended = None
            elif kind in b"xXgLKN":
                extended = self._extend(head, extended, everywhere)
            elif kind == b"V":  # a volume's label
                self._expect(head.size)
            else:
                raise BadLayer(f"{label(head.name)} has the unknown type {kind!r}")

    def whole(self) -> memoryview | None:
        """The current entry's payload in one piece where it is at hand, as small ones mostly are; else None."""
        at = self._at
        end = at + self._left
        if end > len(self._block):
            return None
        self._at = end
        self._left = 0
        return memoryview(self._block)[at:end]

    def payload(self) -> Iterator[memoryview]:
        """The current entry's payload, in pieces."""
        while left := self._left:
            at = self._at
            if at == len(self._block):
                self._refill()
                at = 0
            end = min(at + left, len(self._block))
            self._left = left - (end - at)
            self._at = end
            yield memoryview(self._block)[at:end]

    # -- the entry ---------------------------------------------------------------------------------------------------

    def _complete(self, entry: Entry, extended: _Extended | None, everywhere: dict[bytes, bytes]) -> Entry:
        """Add what the extended headers say, check it, and make the payload come next."""
        entry.mode &= 0o7777
        entry.xattrs = _NO_XATTRS
        entry.segments = None
        kind = entry.kind
        if kind in _REGULAR:
            kind = entry.kind = header.REGULAR
        pax: Mapping[bytes, bytes] = everywhere
        if extended is not None:
            if extended.name is not None:
                entry.name = extended.name
            if extended.link is not None:
                entry.link = extended.link
            if extended.pax or extended.sparse:
                pax = {**everywhere, **extended.pax}
        if pax:
            _override(entry, pax)
            self._name = entry.name
        if b"\0" in entry.name or b"\0" in entry.link:
            raise ValueError("a name with a NUL byte")
        if not (0 <= entry.size <= _LARGEST and -_LARGEST <= entry.mtime <= _LARGEST):
            raise ValueError("the size or time is out of range")
        if not (0 <= entry.uid <= _LAST_ID and 0 <= entry.gid <= _LAST_ID):
            raise ValueError("the owner is out of range")
        if kind in _HEADER_ONLY:  # as GNU tar and Go do it: whatever the size field says, no payload follows
            entry.size = entry.stored = 0
        else:
            self._expect(entry.size)
            entry.stored = entry.size
            if kind == b"S":
                entry.kind = b"0"
                self._old_sparse(entry)
            elif extended is not None and pax:
                self._pax_sparse(entry, pax, extended)
            if entry.name[-1:] == b"/":  # v7 had no type for directories
                entry.kind = b"5"
                entry.size = 0
        self._name = entry.name
        return entry

    def _expect(self, size: int) -> None:
        """Make ``size`` bytes of payload come next."""
        if not 0 <= size <= _LARGEST:
            raise BadLayer(f"{label(self._name)}: the size {size} is out of range")
        self._left = size
        self._padding = -size % BLOCK

    def _old_sparse(self, entry: Entry) -> None:
        pairs, more = entry.sparse, entry.extended
        payload, padding = self._left, self._padding
        while more:
            block = self._take(BLOCK)
            pairs += header.sparse_pairs(block[:504])
            more = block[504] != 0
            if len(pairs) > 2 * _SEGMENTS:
                raise ValueError("the sparse map is too long")
        self._left, self._padding = payload, padding
        entry.size = entry.sparse_size
        entry.segments = _segments(pairs, entry.size, payload)

    def _pax_sparse(self, entry: Entry, pax: Mapping[bytes, bytes], extended: _Extended) -> None:
        get = pax.get
        real = get(b"GNU.sparse.realsize", get(b"GNU.sparse.size"))
        if get(b"GNU.sparse.major") == b"1" and get(b"GNU.sparse.minor") == b"0":
            pairs = self._sparse_map()
        elif (listed := get(b"GNU.sparse.map")) is not None:
            pairs = [header.decimal(value) for value in listed.split(b",")] if listed else []
        elif extended.sparse or b"GNU.sparse.numblocks" in pax:
            pairs = extended.sparse
        else:
            return
        if real is None:
            raise ValueError("the sparse file has no size")
        entry.size = header.decimal(real)
        entry.segments = _segments(pairs, entry.size, self._left)

    def _sparse_map(self) -> list[int]:
        """The map of format 1.0: decimal lines at the beginning of the payload, padded to a block."""
        text = b""
        numbers: list[int] = []
        wanted = 1
        while len(numbers) < wanted:
            if self._left < BLOCK:
                raise ValueError("the sparse map is cut off")
            self._left -= BLOCK
            *lines, text = (text + self._take(BLOCK)).split(b"\n")
            if len(text) > BLOCK:
                raise ValueError("the sparse map has a line that is no number")
            numbers += [header.decimal(line) for line in lines[: wanted - len(numbers)]]
            if wanted == 1 and numbers:
                if numbers[0] > _SEGMENTS:
                    raise ValueError("the sparse map is too long")
                wanted += 2 * numbers[0]
                numbers += [header.decimal(line) for line in lines[1:wanted]]
        return numbers[1:]

    # -- extended headers --------------------------------------------------------------------------------------------

    def _extend(self, head: Entry, extended: _Extended | None, everywhere: dict[bytes, bytes]) -> _Extended | None:
        if head.size > _LIMIT:
            raise BadLayer(f"{label(head.name)}: an extended header of {head.size} bytes is too long")
        data = self._take(head.size)
        self._take(-head.size % BLOCK)
        if head.kind == b"g":
            everywhere.update(self._records(head, data))
            if sum(map(len, everywhere)) + sum(map(len, everywhere.values())) > _LIMIT:
                raise BadLayer(f"{label(head.name)}: the global extended headers are too long")
            return extended
        extended = extended or _Extended()
        extended.size += head.size
        if extended.size > _LIMIT:
            raise BadLayer(f"{label(head.name)}: its extended headers are too long")
        if head.kind == b"L":
            extended.name = data.partition(b"\0")[0]
        elif head.kind == b"K":
            extended.link = data.partition(b"\0")[0]
        elif head.kind == b"N":
            raise BadLayer(f"{label(head.name)}: the old GNU type N is not supported")
        else:
            for key, value in self._records(head, data):
                if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                    if len(extended.sparse) % 2 != (key == b"GNU.sparse.numbytes"):
                        raise BadLayer(f"{label(head.name)}: the sparse map is out of order")
                    extended.sparse.append(_decimal(value, head.name))
                else:
                    extended.pax[key] = value
        return extended

    def _records(self, head: Entry, data: bytes) -> list[tuple[bytes, bytes]]:
        try:
            return header.pax_records(data)
        except ValueError as error:
            raise BadLayer(f"{label(head.name)}: the PAX header is damaged: {error}") from error

    # -- bytes -------------------------------------------------------------------------------------------------------

    def _refill(self) -> None:
        self.size += len(self._block)
        self._block = self._next_block()
        self._at = 0
        if not self._block:
            where = f"in {label(self._name)}" if self._name else "before its first entry"
            raise BadLayer(f"the layer is cut off {where} (after {self.size} bytes)")

    def _ended(self) -> bool:
        """Whether the stream has no more bytes."""
        if self._at == len(self._block):
            self.size += len(self._block)
            self._block = self._next_block()
            self._at = 0
        return not self._block

    def _take(self, size: int) -> bytes:
        """The next ``size`` bytes, which are no payload."""
        at = self._at
        end = at + size
        if end <= len(self._block):
            self._at = end
            data = self._block[at:end]
        else:
            parts = [self._block[at:]]
            missing = size - len(parts[0])
            while missing:
                self._refill()
                parts.append(self._block[:missing])
                self._at = len(parts[-1])
                missing -= self._at
            data = b"".join(parts)
        if self._tee is not None:
            self._tee(data)
        return data

    def _skip(self) -> None:
        tee = self._tee
        for piece in self.payload():
            if tee is not None:
                tee(bytes(piece))

    def _finish(self) -> None:
        """Read what follows the first block of zeros, to the end of the stream: nothing but zeros."""
        rest = self._block[self._at :]
        padding = 0
        while True:
            padding += len(rest)
            if padding > _PADDING:
                raise BadLayer(f"the layer has endless zeros after its end (after {label(self._name)})")
            if rest.count(0) != len(rest):
                raise BadLayer(f"the layer has garbage after its end (after {label(self._name)})")
            if self._tee is not None:
                self._tee(rest)
            self.size += len(self._block)
            self._at = 0
            rest = self._block = self._next_block()
            if not rest:
                return


def _override(entry: Entry, pax: Mapping[bytes, bytes]) -> None:
    """Let an extended header's records take the place of the header's fields. An empty value means "not given"."""
    xattrs: dict[str, bytes] = {}
    for key, value in pax.items():
        if key.startswith(b"SCHILY.xattr."):
            xattrs[_attribute(key[13:])] = value
        elif key.startswith(b"LIBARCHIVE.xattr."):
            padded = value.rstrip(b"=") + b"=" * (-len(value.rstrip(b"=")) % 4)
            xattrs.setdefault(_attribute(unquote_to_bytes(key[17:])), base64.b64decode(padded, validate=True))
        elif not value:
            continue
        elif key == b"path":
            entry.name = value
        elif key == b"linkpath":
            entry.link = value
        elif key == b"size":
            entry.size = header.decimal(value)
        elif key == b"mtime":
            entry.mtime = header.nanoseconds(value)
        elif key == b"uid":
            entry.uid = header.decimal(value)
        elif key == b"gid":
            entry.gid = header.decimal(value)
        elif key == b"SCHILY.devmajor":
            entry.major = header.decimal(value)
        elif key == b"SCHILY.devminor":
            entry.minor = header.decimal(value)
    entry.name = pax.get(b"GNU.sparse.name") or entry.name
    if xattrs:
        entry.xattrs = xattrs


def _attribute(name: bytes) -> str:
    if b"\0" in name:
        raise ValueError("an attribute's name with a NUL byte")
    return name.decode("utf-8", "surrogateescape")


def _decimal(value: bytes, name: bytes) -> int:
    try:
        return header.decimal(value)
    except ValueError as error:
        raise BadLayer(f"{label(name)}: {error}") from error


def _segments(pairs: list[int], size: int, payload: int) -> array[int]:
    """A sparse map, checked: ascending, inside the file, and as long as the payload."""
    if len(pairs) % 2:
        raise ValueError("the sparse map has an odd length")
    if not 0 <= size <= _LARGEST:
        raise ValueError("the sparse file's size is out of range")
    end = total = 0
    for index in range(0, len(pairs), 2):
        offset, length = pairs[index], pairs[index + 1]
        if offset < end or length < 0 or offset + length > size:
            raise ValueError("the sparse map is out of order or beyond the file's size")
        end = offset + length
        total += length
    if total != payload:
        raise ValueError(f"the sparse map names {total} bytes, but {payload} follow")
    return array("q", pairs)
