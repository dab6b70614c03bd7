"""Blobs in and out: every form a layer is compressed in, damage of every kind, threads that end."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from layerfs.compression import BLOCK, Compressor, ReadAhead, open_blob
from layerfs.errors import BadLayer, InvalidArgument, OutOfSpace

DATA = b"".join(number.to_bytes(4, "big") * 3 for number in range(200_000))


def _zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def _skippable(data: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


def _many(compress: Callable[[bytes], bytes]) -> bytes:
    return b"".join(compress(DATA[at : at + 100_000]) for at in range(0, len(DATA), 100_000))


FORMS = {
    "plain": DATA,
    "gzip": gzip.compress(DATA, 1),
    "gzip, many members": _many(gzip.compress),
    "gzip, empty members": gzip.compress(b"") + gzip.compress(DATA, 1) + gzip.compress(b""),
    "gzip, zeros after it": gzip.compress(DATA, 1) + bytes(1000),
    "gzip, zeros between members": gzip.compress(DATA[:70]) + bytes(1000) + gzip.compress(DATA[70:], 1),
    "zstd": _zstd(DATA),
    "zstd, many frames": _many(_zstd),
    "zstd, skippable frames": _skippable(b"x" * 500) + _zstd(DATA) + _skippable(b"table of contents"),
    "zstd, no size and no checksum": zstandard.ZstdCompressor(write_content_size=False).compressobj().compress(b""),
}
_stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
FORMS["zstd, no size and no checksum"] = _stream.compress(DATA) + _stream.flush()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_detected_and_read(form: str, tmp_path: Path) -> None:
    with open_blob(io.BytesIO(FORMS[form])) as blob:
        assert blob.read() == DATA
    path = tmp_path / "blob"
    path.write_bytes(b"skipped" + FORMS[form])
    with path.open("rb") as raw:
        raw.seek(7)  # read from where it stands
        with open_blob(raw) as blob:
            assert blob.read(10) == DATA[:10]
            assert blob.read() == DATA[10:]
        assert not raw.closed


@pytest.mark.parametrize("tool", [["gzip", "-1c"], ["zstd", "-3c"], ["cat"]])
def test_pipes_from_real_tools(tool: list[str], tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(DATA)
    if shutil.which(tool[0]) is None:
        pytest.skip(f"{tool[0]} is not installed")
    with (tmp_path / "data").open("rb") as source:
        process = subprocess.Popen(tool, stdin=source, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        with open_blob(process.stdout) as blob:  # type: ignore[arg-type]
            assert blob.read() == DATA
    assert process.returncode == 0


@pytest.mark.parametrize("form", [name for name in FORMS if name.startswith(("gzip", "zstd")) and "zeros" not in name])
@pytest.mark.parametrize("cut", [0.001, 0.3, 0.9, 1.0])
def test_a_blob_cut_off_anywhere_is_noticed(form: str, cut: float) -> None:
    whole = FORMS[form]
    size = max(10, min(int(len(whole) * cut), len(whole) - 1))
    if form == "zstd, many frames" and cut == 1.0:
        size = len(whole) - 4  # only the last checksum is missing
    with pytest.raises(BadLayer), open_blob(io.BytesIO(whole[:size])) as blob:
        blob.read()


@pytest.mark.parametrize("last", range(1, 12))
def test_the_last_bytes_of_a_frame_matter(last: int) -> None:
    raw = zstandard.ZstdCompressor(1, write_checksum=True).compress(os.urandom(5000))  # an uncompressed block
    for whole in (raw, _zstd(DATA), gzip.compress(DATA, 1)):
        with pytest.raises(BadLayer), open_blob(io.BytesIO(whole[:-last])) as blob:
            blob.read()


@pytest.mark.parametrize("form", ["gzip", "zstd"])
@pytest.mark.parametrize("at", [0.1, 0.5, 0.99])
def test_junk_in_the_middle_is_noticed(form: str, at: float) -> None:
    damaged = bytearray(FORMS[form])
    place = int(len(damaged) * at)
    damaged[place : place + 8] = b"\xa5\x5a" * 4
    with pytest.raises(BadLayer), open_blob(io.BytesIO(bytes(damaged))) as blob:
        blob.read()


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_garbage_after_the_end_is_noticed(form: str) -> None:
    with pytest.raises(BadLayer), open_blob(io.BytesIO(FORMS[form] + b"garbage!")) as blob:
        blob.read()


@pytest.mark.parametrize("magic", [b"\xfd7zXZ\x00\x00\x00", b"BZh91AY&SY", b"\x04\x22\x4d\x18rest"])
def test_other_compressions_are_named(magic: bytes) -> None:
    with pytest.raises(BadLayer, match=r"xz|bzip2|lz4"):
        open_blob(io.BytesIO(magic))


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_a_bomb_is_unpacked_piece_by_piece(form: str) -> None:
    zeros = bytes(1 << 20)
    encoder = zstandard.ZstdCompressor(19).compressobj() if form == "zstd" else None
    if encoder is not None:
        bomb = b"".join(encoder.compress(zeros) for _ in range(256)) + encoder.flush()
    else:
        bomb = gzip.compress(zeros * 256, 1)
    assert len(bomb) < 2 << 20
    threads = threading.active_count()
    with ReadAhead(io.BytesIO(bomb)) as ahead:
        assert 0 < len(ahead.next()) <= BLOCK + 16
    assert threading.active_count() == threads


def test_the_digest_is_that_of_the_content() -> None:
    import hashlib

    with ReadAhead(io.BytesIO(FORMS["gzip"]), digest=True) as ahead:
        while ahead.next():
            pass
        assert ahead.hexdigest() == hashlib.sha256(DATA).hexdigest()
        assert ahead.next() == b""
        assert ahead.consumed == len(FORMS["gzip"])


def test_a_reader_that_waits_for_a_pipe_can_be_closed() -> None:
    reading, writing = os.pipe()
    os.write(writing, DATA[:1000])
    with open(reading, "rb") as raw:
        ahead = ReadAhead(raw)
        assert ahead.next() == DATA[:1000]
        ahead.close()
        ahead.close()
    os.close(writing)


def test_a_failing_stream_is_reported_where_it_is_read() -> None:
    class Failing(io.BytesIO):
        def read(self, _size: int | None = -1, /) -> bytes:
            if self.tell():
                raise ZeroDivisionError
            return super().read(10)

    with ReadAhead(Failing(b"x" * 100)) as ahead:
        assert ahead.next() == b"x" * 10
        with pytest.raises(ZeroDivisionError):
            ahead.next()


# -- compressing -----------------------------------------------------------------------------------------------------


def _compressed(kind: str, pieces: list[bytes], level: int | None = None) -> bytes:
    out = io.BytesIO()
    with Compressor(out, kind, level) as compressor:
        for piece in pieces:
            assert compressor.write(piece) == len(piece)
    return out.getvalue()


@pytest.mark.parametrize(("kind", "tool"), [("gzip", ["gzip", "-dc"]), ("zstd", ["zstd", "-dc"]), ("none", ["cat"])])
def test_what_is_written_is_read_by_the_usual_tools(kind: str, tool: list[str]) -> None:
    packed = _compressed(kind, [DATA])
    try:
        assert subprocess.run(tool, input=packed, capture_output=True, check=True).stdout == DATA
    except FileNotFoundError:
        pytest.skip(f"{tool[0]} is not installed")


@given(pieces=st.lists(st.binary(max_size=3000), max_size=8), kind=st.sampled_from(["gzip", "zstd", "none"]))
def test_bytes_do_not_depend_on_how_they_are_written(pieces: list[bytes], kind: str) -> None:
    whole = _compressed(kind, [b"".join(pieces)])
    assert _compressed(kind, pieces) == whole
    with open_blob(io.BytesIO(whole)) as blob:
        assert blob.read() == b"".join(pieces)


def test_the_pieces_do_not_matter_for_large_data() -> None:
    for kind in ("gzip", "zstd"):
        assert _compressed(kind, [DATA[at : at + 7777] for at in range(0, len(DATA), 7777)]) == _compressed(
            kind, [DATA]
        )


def test_a_gzip_header_tells_no_time_and_no_name() -> None:
    assert _compressed("gzip", [b"x"])[3:8] == bytes(5)


def test_an_unknown_compression_is_the_callers_mistake() -> None:
    with pytest.raises(InvalidArgument, match="bzip2"):
        Compressor(io.BytesIO(), "bzip2")


def test_a_full_disk_is_reported_and_the_thread_ends() -> None:
    threads = threading.active_count()
    with open("/dev/full", "wb", buffering=0) as full:
        compressor = Compressor(full, "none")
        compressor.write(DATA)
        with pytest.raises(OutOfSpace):
            compressor.close()
    assert threading.active_count() == threads


def _write_and_fail(out: io.BytesIO) -> None:
    with Compressor(out, "gzip") as compressor:
        compressor.write(DATA)
        raise ZeroDivisionError


def test_leaving_by_an_exception_writes_no_end() -> None:
    out = io.BytesIO()
    with pytest.raises(ZeroDivisionError):
        _write_and_fail(out)
    with pytest.raises(BadLayer), open_blob(io.BytesIO(out.getvalue())) as blob:
        blob.read()
