"""One tar header block (512 bytes) and the records of PAX extended headers, taken apart and checked.

Sources: POSIX.1-2017 pax (ustar and the extended header), the GNU tar manual's "Basic Tar Format" (old GNU headers,
base-256 numbers, sparse files), and, where they leave freedom, Go's archive/tar, which container engines use.
"""

from __future__ import annotations

import re
import struct
import zlib
from array import array
from collections.abc import Mapping
from typing import Final

from layerfs.errors import BadLayer

BLOCK: Final = 512
ZEROS: Final = bytes(BLOCK)

REGULAR: Final = b"0"
LINK: Final = b"1"
SYMLINK: Final = b"2"
CHAR: Final = b"3"
BLOCK_DEVICE: Final = b"4"
DIRECTORY: Final = b"5"
FIFO: Final = b"6"

# name mode uid gid size mtime chksum type link magic+version uname gname major minor prefix(-star's) star's rest
_FIELDS = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s131s24s12s")
_SPARSE = struct.Struct("12s12s")
_DECIMAL = re.compile(rb"(-?)(\d+)(?:\.(\d*))?\Z")


class Entry:
    """One file of the archive. `parse` fills in what its header block says; the reader adds the extended headers.

    Attributes:
        name: as it stands in the archive; nothing is checked but that it has no NUL.
        kind: the type flag. The reader makes sparse and contiguous files ``REGULAR``, and ``DIRECTORY`` of what is
            regular but for a name that ends in a slash.
        link: the target, of hard and symbolic links.
        size: bytes of the file; of a sparse one with its holes.
        stored: bytes of payload that stand in the archive.
        segments: of a sparse file, flat: offset and length of each piece of payload; None where it is not sparse.
        mtime: nanoseconds since the epoch.
        xattrs: extended attributes by name.
        sparse, sparse_size, extended: of an old GNU sparse header: its pairs, the file's real size, and whether
            another block of pairs follows.
    """

    __slots__ = (
        "extended",
        "gid",
        "kind",
        "link",
        "major",
        "minor",
        "mode",
        "mtime",
        "name",
        "segments",
        "size",
        "sparse",
        "sparse_size",
        "stored",
        "uid",
        "xattrs",
    )

    name: bytes
    kind: bytes
    link: bytes
    mode: int
    uid: int
    gid: int
    size: int
    stored: int
    mtime: int
    major: int
    minor: int
    segments: array[int] | None
    xattrs: Mapping[str, bytes]
    sparse: list[int]
    sparse_size: int
    extended: bool


def number(field: bytes) -> int:
    """A numeric field: octal digits with blanks or NULs around, or base-256 with the first byte's top bit set.

    Raises `ValueError` where it is neither.
    """
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=False) & ((1 << (8 * len(field) - 1)) - 1)
        return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
    digits = field.partition(b"\0")[0].strip()
    if not digits:
        return 0
    if not digits.isdigit():  # int() would take signs, underscores and prefixes
        raise ValueError(f"{field!r} is not a number")
    return int(digits, 8)


def _checksum_fits(block: bytes, field: bytes) -> bool:
    """Whether the block's checksum holds: the sum of its bytes, its own field counted as blanks."""
    digits = field[:6]
    stored = int(digits, 8) if digits.isdigit() and field[6] in b"\0 " else number(field)
    # The low half of an Adler-32 is the sum of the bytes plus one, modulo 65521, at a twentieth of sum()'s cost.
    if zlib.adler32(block) & 0xFFFF == (stored + sum(field) - 255) % 65521:
        return True
    # Some old programs added up signed bytes.
    signed = sum(block) - sum(field) + 256 - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
    return stored == signed


_owners: dict[bytes, tuple[int, int, int]] = {}


def _owner(raw: bytes) -> tuple[int, int, int]:
    """Mode, uid and gid; remembered, because most headers of a layer have the same few."""
    found = _owners.get(raw)
    if found is None:
        if len(_owners) > 1000:
            _owners.clear()
        found = _owners[raw] = (number(raw[:8]), number(raw[8:16]), number(raw[16:24]))
    return found


def parse(block: bytes) -> Entry:
    """Take a header block apart. Raises `BadLayer` where its checksum or a field is wrong."""
    (name, mode, uid, gid, size, mtime, checksum, kind, link, magic, _, _, major, minor, prefix, star, tail) = (
        _FIELDS.unpack(block)
    )
    entry = Entry()
    try:
        if not _checksum_fits(block, checksum):
            raise BadLayer(f"{label(name)}: the header's checksum is wrong")
        entry.name = name = name.partition(b"\0")[0]
        entry.kind = kind
        entry.mode, entry.uid, entry.gid = _owner(mode + uid + gid)
        digits = size[:11]  # the usual form at once, for speed
        entry.size = int(digits, 8) if digits.isdigit() and size[11] in b"\0 " else number(size)
        digits = mtime[:11]
        entry.mtime = 1_000_000_000 * (int(digits, 8) if digits.isdigit() and mtime[11] in b"\0 " else number(mtime))
        entry.link = link.partition(b"\0")[0] if link[0] else b""
        if kind in (CHAR, BLOCK_DEVICE):
            entry.major, entry.minor = number(major), number(minor)
        else:
            entry.major = entry.minor = 0
        if prefix[0] and magic[:6] == b"ustar\0":
            # star keeps two times where POSIX has the end of the prefix.
            prefix = prefix if tail[8:] == b"tar\0" else prefix + star
            entry.name = prefix.partition(b"\0")[0] + b"/" + name
        if kind == b"S":
            entry.sparse, entry.extended = sparse_pairs(block[386:482]), block[482] != 0
            entry.sparse_size = number(block[483:495])
    except ValueError as error:
        raise BadLayer(f"{label(name)}: the header is damaged: {error}") from error
    return entry


def sparse_pairs(raw: bytes) -> list[int]:
    """Old GNU sparse pairs, flat: offset, length, offset, length… The first empty pair ends them."""
    pairs: list[int] = []
    for offset, length in _SPARSE.iter_unpack(raw):
        if not offset[0] and not length[0]:
            break
        pairs += (number(offset), number(length))
    return pairs


def pax_records(data: bytes) -> list[tuple[bytes, bytes]]:
    """The ``length key=value`` records of an extended header, in order. Values are binary. Raises `ValueError`."""
    records = []
    position = 0
    end = len(data)
    while position < end:
        blank = data.index(b" ", position, position + 12)
        digits = data[position:blank]
        if not digits.isdigit():
            raise ValueError(f"record length {digits!r}")
        stop = position + int(digits)
        if stop > end or stop <= blank + 1 or data[stop - 1] != 0x0A:
            raise ValueError(f"record of length {int(digits)} does not end where it says")
        key, equals, value = data[blank + 1 : stop - 1].partition(b"=")
        if not equals or not key:
            raise ValueError("record without a key")
        records.append((key, value))
        position = stop
    return records


def decimal(value: bytes) -> int:
    """A whole decimal number of an extended header, not negative. Raises `ValueError`."""
    if not value.isdigit() or len(value) > 20:
        raise ValueError(f"{value[:40]!r} is not a number")
    return int(value)


def nanoseconds(value: bytes) -> int:
    """A time of an extended header (seconds, perhaps with a fraction) in nanoseconds. Raises `ValueError`."""
    match = _DECIMAL.match(value) if len(value) < 64 else None
    if match is None:
        raise ValueError(f"{value[:40]!r} is not a time")
    sign, whole, fraction = match.groups()
    total = int(whole) * 1_000_000_000 + int((fraction or b"")[:9].ljust(9, b"0"))
    return -total if sign else total


def label(name: bytes) -> str:
    """An entry's name for messages: quoted, escaped and not too long."""
    text = repr(name.partition(b"\0")[0].decode("utf-8", "backslashreplace"))
    return f"entry {text if len(text) <= 300 else text[:300] + '…'}"
