"""The tar reader by itself: what it makes of headers, in whatever pieces the stream comes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerfs.errors import BadLayer
from layerfs.tar import header
from layerfs.tar.header import Entry
from layerfs.tar.reader import TarReader


def _source(data: bytes, piece: int) -> Callable[[], bytes]:
    pieces: Iterator[bytes] = iter([data[at : at + piece] for at in range(0, len(data), piece)])
    return lambda: next(pieces, b"")


def _read(data: bytes, piece: int = 1 << 18) -> list[tuple[Entry, bytes]]:
    reader = TarReader(_source(data, piece))
    return [(entry, b"".join(bytes(part) for part in reader.payload())) for entry in reader]


def _archive(*members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for member in members:
            info, data = member if isinstance(member, tuple) else (member, b"")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=300).filter(
    lambda text: not text.endswith("/") and not text.startswith("/")
)


@given(
    name=_text, link=_text, data=st.binary(max_size=2000), mode=st.integers(0, 0o7777), uid=st.integers(0, 2**32 - 2),
    mtime=st.integers(-(2**33), 2**33), form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    piece=st.sampled_from([1, 100, 511, 512, 513, 1 << 18]),
)  # fmt: skip
def test_what_python_writes_is_read_in_any_pieces(
    name: str, link: str, data: bytes, mode: int, uid: int, mtime: int, form: int, piece: int
) -> None:
    file, symlink = tarfile.TarInfo(name), tarfile.TarInfo("link")
    file.mode, file.uid, file.gid, file.mtime = mode, uid, uid, mtime
    symlink.type, symlink.linkname = tarfile.SYMTYPE, link
    (first, payload), (second, nothing) = _read(_archive((file, data), symlink, form=form), piece)
    assert (first.name, first.kind, payload, first.size) == (name.encode(), header.REGULAR, data, len(data))
    assert (first.mode, first.uid, first.gid, first.mtime) == (mode, uid, uid, mtime * 1_000_000_000)
    assert (second.name, second.kind, second.link, nothing) == (b"link", header.SYMLINK, link.encode(), b"")


def test_payload_that_is_not_read_is_passed_over_and_given_to_the_tee() -> None:
    data = _archive((tarfile.TarInfo("a"), b"x" * 2000), (tarfile.TarInfo("b"), b"y" * 2000))
    kept: list[bytes] = []
    reader = TarReader(_source(data, 700), kept.append)
    assert [entry.name for entry in reader] == [b"a", b"b"]
    assert b"".join(kept) == data
    assert reader.size == len(data)


def test_the_tee_gets_all_but_the_payload() -> None:
    data = _archive((tarfile.TarInfo("a" * 150), b"x" * 2000))
    kept: list[bytes] = []
    reader = TarReader(_source(data, 1 << 18), kept.append)
    for _ in reader:
        assert b"".join(bytes(part) for part in reader.payload()) == b"x" * 2000
    assert b"".join(kept) == data.replace(b"x" * 2000, b"")


def test_a_signed_checksum_of_old_programs_is_taken() -> None:
    info = tarfile.TarInfo("n\xfcme")
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT, "latin-1"))
    body = block[:148] + b" " * 8 + block[156:]
    block[148:156] = b"%06o\0 " % sum(byte - 256 if byte > 127 else byte for byte in body)
    assert _read(bytes(block) + bytes(1024))[0][0].name == b"n\xfcme"
    block[148:156] = b"%06o\0 " % (sum(body) + 1)
    with pytest.raises(BadLayer, match="checksum"):
        _read(bytes(block) + bytes(1024))


def test_star_archives_keep_times_where_the_prefix_ends() -> None:
    info = tarfile.TarInfo("name")
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[345:348] = b"dir"
    block[476:488] = b"00000001234\0"
    block[508:512] = b"tar\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    assert _read(bytes(block) + bytes(1024))[0][0].name == b"dir/name"


@pytest.mark.parametrize(
    ("field", "value"),
    [(b"0000644\0", 0o644), (b"    644 ", 0o644), (b"644\0junk", 0o644), (bytes(8), 0), (b"        ", 0),
     (b"\x80" + bytes(6) + b"\x05", 5), (b"\xff" * 8, -1), (b"\xff" * 7 + b"\xfe", -2), (b"77777777", 0o77777777)],
)  # fmt: skip
def test_numeric_fields(field: bytes, value: int) -> None:
    assert header.number(field) == value


@pytest.mark.parametrize(
    "field", [b"-1\0\0\0\0\0\0", b"0o17\0\0\0\0", b"1_000\0\0\0", b"8\0\0\0\0\0\0\0", b"\xc2\xb2\0\0\0\0\0\0"[:8]]
)
def test_what_is_no_number(field: bytes) -> None:
    if field[0] & 0x80:
        assert header.number(field) != 2  # a base-256 number, not a superscript two
        return
    with pytest.raises(ValueError, match=r"number|invalid literal"):
        header.number(field)


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=20).filter(lambda key: b"=" not in key), st.binary(max_size=200)))
)
def test_pax_records_are_binary_safe(records: list[tuple[bytes, bytes]]) -> None:
    data = b""
    for key, value in records:
        body = b" " + key + b"=" + value + b"\n"
        size = len(body)
        while len(str(size)) + len(body) != size:
            size = len(str(size)) + len(body)
        data += str(size).encode() + body
    assert header.pax_records(data) == records


@pytest.mark.parametrize(
    "data", [b"5 a=b", b"99 a=b\n", b"4 a\n", b"6 a=b\nx", b"-6 a=b\n", b"0 a=b\n", b"1 \n", b"6 =bc\n", b"6  a=\n\n"]
)
def test_damaged_pax_records(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        header.pax_records(data)


@pytest.mark.parametrize(
    ("text", "value"),
    [(b"1.5", 1_500_000_000), (b"-1.5", -1_500_000_000), (b"0", 0), (b"7.", 7_000_000_000),
     (b"1.123456789999", 1_123_456_789), (b"-0.000000001", -1)],
)  # fmt: skip
def test_times(text: bytes, value: int) -> None:
    assert header.nanoseconds(text) == value


def test_an_empty_value_takes_a_global_one_back() -> None:
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "c", "uid": "7"}
    ) as tar:
        for headers in ({}, {"uid": ""}):
            info = tarfile.TarInfo("x")
            info.uid = 3
            info.pax_headers = headers
            tar.addfile(info)
    assert [entry.uid for entry, _ in _read(out.getvalue())] == [7, 3]


def test_extended_headers_without_an_entry() -> None:
    data = _archive(tarfile.TarInfo("n" * 200), form=tarfile.GNU_FORMAT)
    with pytest.raises(BadLayer, match="extended header"):
        _read(data[:1024] + bytes(1024))


def test_a_volume_label_is_passed_over() -> None:
    label = tarfile.TarInfo("label")
    label.type = b"V"
    data = label.tobuf() + _archive(tarfile.TarInfo("x"))
    assert [entry.name for entry, _ in _read(data)] == [b"x"]


@pytest.mark.parametrize("piece", [1, 512, 1024, 1 << 18])
def test_the_stream_is_read_and_checked_to_its_end(piece: int) -> None:
    """Also where a piece ends with the first block of zeros."""
    data = _archive(tarfile.TarInfo("x"))
    kept: list[bytes] = []
    reader = TarReader(_source(data, piece), kept.append)
    assert len(list(reader)) == 1
    assert (reader.size, b"".join(kept)) == (len(data), data)
    for garbage in (data[:1024] + b"x", data[:1024] + bytes(512) + b"x", data + b"x"):
        with pytest.raises(BadLayer, match="garbage"):
            _read(garbage, piece)
