"""Tar records: the exact bytes come back, and a changed file is named."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerfs.apply import apply
from layerfs.errors import Damaged
from layerfs.record import entries, rebuild


def _recorded(data: bytes, root: Path) -> io.BytesIO:
    record = io.BytesIO()
    fd = os.open(root, os.O_RDONLY)
    try:
        apply(io.BytesIO(data), fd, record=record)
    finally:
        os.close(fd)
    return record


def _rebuilt(record: io.BytesIO, root: Path) -> bytes:
    out = io.BytesIO()
    fd = os.open(root, os.O_RDONLY)
    try:
        digest = rebuild(record, fd, out)
    finally:
        os.close(fd)
    assert digest == "sha256:" + hashlib.sha256(out.getvalue()).hexdigest()
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    tar.addfile(info, io.BytesIO(data))


def _archive(*members: tuple[object, ...], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for member in members:
            _add(tar, *member)  # type: ignore[arg-type]
    return out.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    made.mkdir()
    return made


@pytest.mark.parametrize("options", [
    ["--format=v7"], ["--format=ustar"], ["--format=oldgnu"], ["--format=gnu", "-S"], ["--format=gnu", "-b", "1"],
    ["--format=posix", "-S", "--sparse-version=0.0"], ["--format=posix", "-S", "--sparse-version=0.1"],
    ["--format=posix", "-S", "--sparse-version=1.0"], ["--format=posix", "--blocking-factor=100"],
])  # fmt: skip
def test_archives_of_gnu_tar_come_back_byte_by_byte(options: list[str], tmp_path: Path, root: Path) -> None:
    source = tmp_path / "source"
    (source / "dir").mkdir(parents=True)
    (source / "dir/empty").touch()
    (source / "dir/one").write_bytes(os.urandom(513))
    (source / "dir/big").write_bytes(os.urandom(700_000))
    os.link(source / "dir/one", source / "dir/two")
    (source / "link").symlink_to("dir")
    with (source / "sparse").open("wb") as sparse:
        for place in range(0, 3 << 20, 1 << 20):
            sparse.seek(place)
            sparse.write(os.urandom(5000))
        sparse.truncate(4 << 20)
    packed = subprocess.run(["tar", *options, "-C", source, "-c", "."], check=True, capture_output=True).stdout
    record = _recorded(packed, root)
    assert _rebuilt(record, root) == packed
    sizes = {payload.path: payload.size for payload in entries(record)}
    assert set(sizes) - {b"dir/one", b"dir/two"} == {b"dir/big", b"sparse"}  # either link's name may come first
    assert sizes[b"dir/big"] == 700_000
    assert (sizes[b"sparse"] < 100_000) == ("-S" in options)


def test_odd_archives_come_back_too(root: Path) -> None:
    """Whiteouts with content, entries that are passed over, padding that is not GNU tar's, compressed layers."""
    (root / "old").mkdir()
    data = _archive(
        ("old/.wh.x", b"content of a whiteout"), (".wh..wh.plnk/1.2", b"aufs"), ("old/f", b"f" * 600), ("./g", b"g")
    )
    for variant in (data, data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512) + bytes(1024), data + bytes(77)):
        assert _rebuilt(_recorded(variant, root), root) == variant
    assert _rebuilt(_recorded(gzip.compress(data), root), root) == data


_payloads = st.sampled_from([b"", b"a", b"bb" * 300, b"c" * 512])
_members = st.one_of(
    st.tuples(st.sampled_from(["a", "b", "d/a", "d/b", "d/e/f"]), _payloads),
    st.tuples(st.sampled_from(["a", "d", "d/e"]), st.just(b""), st.just(tarfile.DIRTYPE)),
    st.tuples(st.sampled_from(["a", "d"]), st.just(b""), st.just(tarfile.SYMTYPE), st.just("nowhere")),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=st.lists(_members, max_size=10))
def test_entries_that_replace_each_other_come_back(
    members: list[tuple[object, ...]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The payload of a file that a later entry replaced is in no tree, and yet it comes back."""
    kinds: dict[object, bool] = {}
    valid = []
    for member in members:  # an entry needs directories above it
        above = str(member[0]).split("/")[:-1]
        if all(kinds.get("/".join(above[: depth + 1]), True) for depth in range(len(above))):
            valid.append(member)
            is_directory = len(member) > 2 and member[2] == tarfile.DIRTYPE
            kinds = {
                name: flag for name, flag in kinds.items() if is_directory or not str(name).startswith(f"{member[0]}/")
            }
            kinds[member[0]] = is_directory
    data = _archive(*valid)
    where = tmp_path_factory.mktemp("replaced")
    assert _rebuilt(_recorded(data, where), where) == data


def test_hard_links_and_replaced_names(root: Path) -> None:
    link = tarfile.LNKTYPE
    data = _archive(
        ("a", b"1" * 1000),
        ("b", b"", link, "a"),
        ("a", b"2" * 10),
        ("b", b"3" * 700),
        ("c", b"", link, "b"),
        ("b", b"4"),
    )
    assert _rebuilt(_recorded(data, root), root) == data


@pytest.fixture
def recorded(root: Path) -> tuple[io.BytesIO, Path]:
    return _recorded(_archive(("first", b"1" * 5000), ("dir/second", b"2" * 5000), ("third", b"3")), root), root


def _change(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4000)
        file.write(b"x")


def test_the_first_changed_file_is_named(recorded: tuple[io.BytesIO, Path]) -> None:
    record, root = recorded
    _change(root / "dir/second")
    (root / "third").write_bytes(b"x")
    with pytest.raises(Damaged, match="'dir/second'"):
        _rebuilt(record, root)


@pytest.mark.parametrize("how", ["gone", "short", "directory", "fifo", "link", "link above"])
def test_files_that_are_no_more_what_they_were(how: str, recorded: tuple[io.BytesIO, Path], tmp_path: Path) -> None:
    record, root = recorded
    path = root / "dir/second"
    if how == "short":
        os.truncate(path, 100)
    else:
        (tmp_path / "outside").mkdir()
        path.rename(tmp_path / "outside/second")
        if how == "directory":
            path.mkdir()
        elif how == "fifo":
            os.mkfifo(path)
        elif how == "link":
            path.symlink_to(tmp_path / "outside/second")
        elif how == "link above":
            path.parent.rmdir()
            path.parent.symlink_to(tmp_path / "outside")
    with pytest.raises(Damaged, match="'dir/second'"):
        _rebuilt(record, root)


def test_a_damaged_record_is_noticed(recorded: tuple[io.BytesIO, Path]) -> None:
    record, root = recorded
    data = record.getvalue()
    for damaged in (b"", b"junk" * 10, data[:-9], data[: len(data) // 2], data[:40] + b"\xa5" * 20 + data[60:]):
        with pytest.raises(Damaged, match="record"):
            _rebuilt(io.BytesIO(damaged), root)


def test_a_record_is_small(root: Path) -> None:
    data = _archive(*((f"dir/{number}", os.urandom(2000)) for number in range(300)))
    assert len(_recorded(data, root).getvalue()) < len(data) // 20
