"""Applying layers: archives of every dialect, whiteouts, replaced entries, parents, order of attributes."""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import signal
import stat
import subprocess
import sys
import tarfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerfs.apply import Applied, NeedsParents, apply
from layerfs.errors import BadLayer, OutOfSpace

Member = tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]
Tree = dict[bytes, tuple[object, ...]]


def lay(data: bytes, root: Path, **options: object) -> Applied:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return apply(io.BytesIO(data), fd, **options)  # type: ignore[arg-type]
    finally:
        os.close(fd)


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    info.mtime = 1_700_000_000
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def archive(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for item in members:
            info, data = item if isinstance(item, tuple) else (item, b"")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def file(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, **fields), data


def directory(name: str, **fields: Any) -> tarfile.TarInfo:
    return member(name, tarfile.DIRTYPE, **fields)


def tree(root: Path, *, times: bool = True) -> Tree:
    """All that a user can see of a tree; hard links as the first of their names."""
    found: Tree = {}
    first: dict[int, bytes] = {}
    for path, dirs, files in os.walk(os.fsencode(root)):
        for name in [b"."] if path == os.fsencode(root) else []:
            dirs.append(name)
        for name in sorted(dirs + files):
            full = os.path.join(path, name)
            status = os.lstat(full)
            key = os.path.relpath(full, os.fsencode(root))
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(Path(os.fsdecode(full)).read_bytes()).hexdigest()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(full)
            group = first.setdefault(status.st_ino, key) if not stat.S_ISDIR(status.st_mode) else key
            attributes = {
                name: os.getxattr(full, name, follow_symlinks=False)
                for name in os.listxattr(full, follow_symlinks=False)
            }
            when = status.st_mtime_ns if times else 0
            found[key] = (
                stat.S_IFMT(status.st_mode),
                stat.S_IMODE(status.st_mode),
                status.st_uid,
                status.st_gid,
                status.st_rdev,
                when,
                content,
                group,
                attributes,
            )
        dirs[:] = [name for name in dirs if name != b"." and not os.path.islink(os.path.join(path, name))]
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    made.mkdir()
    return made


# -- round trips against other programs ------------------------------------------------------------------------------


def _sample(base: Path) -> None:
    """A tree with every kind of entry and the awkward names."""
    (base / "etc").mkdir()
    (base / "etc/plain").write_text("plain")
    (base / "etc/empty").touch()
    (base / "etc/link").symlink_to("plain")
    (base / "etc/dangling").symlink_to("/no/such/file")
    os.link(base / "etc/plain", base / "etc/hard")
    os.mkfifo(base / "etc/fifo")
    os.mknod(base / "etc/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    deep = base / "/".join(["deep" * 10] * 5) / "x"
    deep.parent.mkdir(parents=True)
    deep.write_bytes(os.urandom(100_000))
    (base / ("far/" * 80)).mkdir(parents=True)
    (base / ("n" * 200)).write_text("long name")
    (base / "long-link").symlink_to("t" * 300)
    Path(os.fsdecode(os.fsencode(base) + b"/bad-\xff\xfe-utf8")).write_text("bytes")
    (base / "tab\tand\nnewline").write_text("controls")
    (base / "big").write_bytes(os.urandom(3_000_001))
    (base / "suid").write_text("suid")
    os.chown(base / "suid", 1234, 5678)
    (base / "suid").chmod(0o6755)
    (base / "sticky").mkdir()
    (base / "sticky").chmod(0o1777)
    (base / "locked").mkdir()
    (base / "locked/inside").write_text("in")
    (base / "locked").chmod(0o000)
    os.utime(base / "etc/plain", ns=(1, 1_234_567_890_123_456_789))
    os.utime(base / "etc", ns=(1, 1_600_000_000_000_000_001))
    os.utime(base / "etc/link", ns=(1, 1_500_000_000_000_000_000), follow_symlinks=False)
    with (base / "sparse").open("wb") as out:
        for place in (0, 1 << 20, 5 << 20):
            out.seek(place)
            out.write(b"data" * 1024)
        out.truncate(9 << 20)


@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "oldgnu", "posix"])
def test_gnu_tar_archives_of_every_format_come_out_as_gnu_tar_unpacks_them(
    form: str, tmp_path: Path, root: Path
) -> None:
    source, expected = tmp_path / "source", tmp_path / "expected"
    source.mkdir()
    expected.mkdir()
    _sample(source)
    if form in ("v7", "ustar"):  # these cannot hold them
        subprocess.run(["rm", "-rf", source / ("n" * 200), source / "long-link", source / "far"], check=True)
    if form == "v7":
        subprocess.run(["rm", "-rf", source / ("deep" * 10), source / "etc/null", source / "etc/fifo"], check=True)
    packed = subprocess.run(
        ["tar", "--numeric-owner", f"--format={form}", "-C", source, "-c", "."], check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "--numeric-owner", "-xp", "-C", expected], input=packed, check=True)
    applied = lay(packed, root)
    assert tree(root) == tree(expected)
    assert applied.diff_id == "sha256:" + hashlib.sha256(packed).hexdigest()
    assert applied.size == len(packed)
    assert applied.implied == frozenset()


@pytest.mark.parametrize(
    "options",
    [["--format=oldgnu"], ["--format=gnu"]]
    + [["--format=posix", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0")],
)
@pytest.mark.parametrize("holes", [3, 200])
def test_sparse_files_keep_content_and_holes(options: list[str], holes: int, tmp_path: Path, root: Path) -> None:
    source = tmp_path / ("s" * 120)
    with source.open("wb") as out:
        for number in range(holes):
            out.seek(number * 65536 + 4096)
            out.write(os.urandom(4096))
        out.truncate(holes * 65536 + 12345)
    subprocess.run(["tar", *options, "-S", "-C", tmp_path, "-cf", tmp_path / "a.tar", source.name], check=True)
    assert (tmp_path / "a.tar").stat().st_size < source.stat().st_size // 4  # it is sparse in the archive
    lay((tmp_path / "a.tar").read_bytes(), root)
    made = root / source.name
    assert made.read_bytes() == source.read_bytes()
    assert made.stat().st_blocks <= source.stat().st_blocks + 16


_names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda name: name not in (".", "..") and not name.startswith(".wh.") and len(name.encode()) < 200
)
_trees = st.recursive(
    st.dictionaries(_names, st.binary(max_size=2000), max_size=4),
    lambda inner: st.dictionaries(_names, st.one_of(st.binary(max_size=2000), inner), max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=_trees,
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    owner=st.integers(0, 2**31),
    when=st.integers(-(2**33), 2**33),
)
def test_any_tree_that_python_packs_comes_out_again(
    content: dict[str, object], form: int, owner: int, when: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    where = tmp_path_factory.mktemp("any")
    if form == tarfile.USTAR_FORMAT:
        owner, when = owner % (1 << 21), when % (1 << 33)
    members: list[Member] = []
    expected: dict[str, bytes | None] = {}

    def collect(prefix: str, part: dict[str, object]) -> None:
        for name, value in part.items():
            path = prefix + name
            if form == tarfile.USTAR_FORMAT and len(path.encode()) > 99:
                continue
            if isinstance(value, bytes):
                members.append(file(path, value, uid=owner, gid=owner, mtime=when))
                expected[path] = value
            else:
                members.append(directory(path, uid=owner, gid=owner, mtime=when))
                expected[path] = None
                collect(path + "/", value)  # type: ignore[arg-type]

    collect("", content)
    lay(archive(*members, form=form), where)
    found = {
        os.path.relpath(os.path.join(base, name), where)
        for base, dirs, files in os.walk(where)
        for name in dirs + files
    }
    assert found == set(expected)
    for path, data in expected.items():
        status = (where / path).lstat()
        assert (status.st_uid, status.st_gid) == (owner, owner)
        if abs(when) < 2**31:  # ext4 keeps 34 bits of seconds, other file systems more or fewer
            assert status.st_mtime == when
        if data is not None:
            assert (where / path).read_bytes() == data


def test_pax_and_gnu_numbers_beyond_octal_are_read(root: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        lay(archive(file("f", uid=2**31 + 5, gid=2**22, mtime=-12345), form=form), root)
        status = (root / "f").stat()
        assert (status.st_uid, status.st_gid, status.st_mtime) == (2**31 + 5, 2**22, -12345)


def test_pax_times_are_exact_to_the_nanosecond(root: Path) -> None:
    exact = file("f", b"", pax_headers={"mtime": "1700000000.123456789"})
    before = file("g", b"", pax_headers={"mtime": "-1.5"})
    lay(archive(exact, before), root)
    assert (root / "f").stat().st_mtime_ns == 1_700_000_000_123_456_789
    assert (root / "g").stat().st_mtime_ns == -1_500_000_000


def test_global_headers_hold_until_an_own_one_says_otherwise(root: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"mtime": "1000", "comment": "x"}
    ) as tar:
        tar.addfile(member("a", mtime=5))
        tar.addfile(member("b", pax_headers={"mtime": "2000"}))
    lay(out.getvalue(), root)
    assert (root / "a").stat().st_mtime == 1000
    assert (root / "b").stat().st_mtime == 2000


def test_contiguous_files_and_names_with_a_trailing_slash(root: Path) -> None:
    lay(archive((member("c", tarfile.CONTTYPE), b"contiguous"), member("v7dir/", tarfile.AREGTYPE, mode=0o711)), root)
    assert (root / "c").read_bytes() == b"contiguous"
    assert stat.S_IMODE((root / "v7dir").stat().st_mode) == 0o711
    assert (root / "v7dir").is_dir()


def test_a_hard_links_size_field_is_no_payload(root: Path) -> None:
    data = bytearray(archive(file("a", b"content"), member("b", tarfile.LNKTYPE, linkname="a"), file("c", b"after")))
    at = data.index(b"b\0", 1024)
    data[at + 124 : at + 136] = b"00000000007\0"
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    lay(bytes(data), root)
    assert (root / "b").stat().st_ino == (root / "a").stat().st_ino
    assert (root / "c").read_bytes() == b"after"


# -- attributes and their order --------------------------------------------------------------------------------------


def test_owner_then_mode_then_capabilities(root: Path) -> None:
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    pax = {
        "SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape"),
        "SCHILY.xattr.user.binary": "\x00\n=x",
        "SCHILY.xattr.trusted.overlay.opaque": "y",
        "SCHILY.xattr.user.overlay.opaque": "y",
        "SCHILY.xattr.security.selinux": "label",
        "LIBARCHIVE.xattr.user.other%20name": "aGVsbG8",
    }
    lay(archive(file("ping", b"x" * 5000, mode=0o6755, uid=1000, gid=1001, pax_headers=pax)), root)
    made = root / "ping"
    assert stat.S_IMODE(made.stat().st_mode) == 0o6755
    assert (made.stat().st_uid, made.stat().st_gid) == (1000, 1001)
    assert {name: os.getxattr(made, name) for name in os.listxattr(made)} == {
        "security.capability": capability,
        "user.binary": b"\0\n=x",
        "user.other name": b"hello",
    }


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_modes_do_not_depend_on_the_umask(mask: int, root: Path) -> None:
    data = archive(
        directory("d", mode=0o1777),
        file("d/f", mode=0o666),
        file("g/implied", mode=0o4755),
        member("p", tarfile.FIFOTYPE, mode=0o666),
        member("null", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3),
    )
    before = os.umask(mask)
    try:
        lay(data, root)
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((root / name).stat().st_mode) for name in ("d", "d/f", "g", "g/implied", "p", "null")}
    assert modes == {"d": 0o1777, "d/f": 0o666, "g": 0o755, "g/implied": 0o4755, "p": 0o666, "null": 0o666}


def test_nothing_is_inherited_from_directories(root: Path) -> None:
    """Set-group-ID and default ACLs of a parent, from this layer or before, leave no trace in its children."""
    subprocess.run(["mkdir", root / "acl"], check=True)
    acl = bytes.fromhex("0200000001000700ffffffff02000700e803000004000500ffffffff10000700ffffffff20000500ffffffff")
    os.setxattr(root / "acl", "system.posix_acl_default", acl)
    pax = {"SCHILY.xattr.system.posix_acl_default": acl.decode("utf-8", "surrogateescape")}
    lay(
        archive(
            directory("gid", mode=0o2775, gid=77),
            directory("gid/sub", gid=0),
            file("gid/f", gid=0),
            file("acl/f", mode=0o640),
            directory("acl/sub", mode=0o750),
            directory("own", pax_headers=pax),
            file("own/f", mode=0o640),
            directory("own/sub", mode=0o750),
        ),
        root,
    )
    assert stat.S_IMODE((root / "gid/sub").stat().st_mode) == 0o755
    assert (root / "gid/f").stat().st_gid == 0
    for name in ("acl/f", "acl/sub", "own/f", "own/sub"):
        assert os.listxattr(root / name) == [], name
    assert stat.S_IMODE((root / "own/f").stat().st_mode) == 0o640
    assert os.getxattr(root / "own", "system.posix_acl_default") == acl
    assert os.getxattr(root / "acl", "system.posix_acl_default") == acl


def test_times_of_directories_are_set_last_and_untouched_ones_kept(root: Path) -> None:
    (root / "old/inner").mkdir(parents=True)
    os.utime(root / "old/inner", ns=(5, 6))
    os.utime(root / "old", ns=(7, 8))
    os.utime(root, ns=(9, 10))
    link = member("d/l", tarfile.SYMTYPE, linkname="x", mtime=44)
    lay(archive(directory("d", mtime=42), file("d/f", mtime=43), link, file("old/inner/new")), root)
    assert [(root / name).lstat().st_mtime for name in ("d", "d/f", "d/l")] == [42, 43, 44]
    assert [(root / name).stat().st_mtime_ns for name in ("old/inner", "old", ".")] == [6, 8, 10]


def test_the_roots_own_entry(root: Path) -> None:
    for name in (".", "./"):
        lay(archive(directory(name, mode=0o711, uid=3, gid=4, mtime=99), file("./f")), root)
        status = root.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime) == (0o711, 3, 4, 99)


# -- what is already there -------------------------------------------------------------------------------------------


def test_the_last_of_two_entries_wins(root: Path) -> None:
    lay(
        archive(
            file("f", b"one"),
            file("f", b"two", mode=0o600),
            directory("d", mode=0o700),
            file("d/kept"),
            directory("d", mode=0o711),
            file("x", b"file"),
            directory("x"),
            file("x/inside"),
            directory("y"),
            file("y/gone"),
            file("y", b"now a file"),
        ),
        root,
    )
    assert (root / "f").read_bytes() == b"two"
    assert stat.S_IMODE((root / "d").stat().st_mode) == 0o711
    assert sorted(os.listdir(root / "d") + os.listdir(root / "x")) == ["inside", "kept"]
    assert (root / "y").read_bytes() == b"now a file"


_KINDS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("lower"),
    "directory": lambda path: (path / "child/file").mkdir(parents=True),
    "symlink": lambda path: path.symlink_to("/etc"),
    "fifo": os.mkfifo,
}


@pytest.mark.parametrize("old", _KINDS)
@pytest.mark.parametrize("new", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE])
def test_every_type_replaces_every_other(old: str, new: bytes, root: Path) -> None:
    _KINDS[old](root / "x")
    entry = member("x", new, linkname="other" if new in (tarfile.SYMTYPE, tarfile.LNKTYPE) else "")
    lay(archive(file("other", b"o"), entry), root)
    status = (root / "x").lstat()
    expected = {
        tarfile.REGTYPE: stat.S_ISREG,
        tarfile.DIRTYPE: stat.S_ISDIR,
        tarfile.SYMTYPE: stat.S_ISLNK,
        tarfile.FIFOTYPE: stat.S_ISFIFO,
        tarfile.LNKTYPE: stat.S_ISREG,
    }
    assert expected[new](status.st_mode)
    if new == tarfile.DIRTYPE:
        assert (root / "x/child/file").exists() == (old == "directory")  # directories merge
    if new == tarfile.LNKTYPE:
        assert status.st_ino == (root / "other").stat().st_ino


def test_a_directory_entry_replaces_the_old_ones_attributes(root: Path) -> None:
    (root / "d").mkdir()
    os.setxattr(root / "d", "user.old", b"x")
    os.setxattr(root / "d", "trusted.kept", b"x")
    lay(archive(directory("d", pax_headers={"SCHILY.xattr.user.new": "y"})), root)
    assert sorted(os.listxattr(root / "d")) == ["trusted.kept", "user.new"]


def test_writing_does_not_go_through_to_hard_links_of_the_old_file(root: Path) -> None:
    (root / "a").write_text("old")
    os.link(root / "a", root / "b")
    lay(archive(file("a", b"new")), root)
    assert (root / "b").read_text() == "old"


def test_a_hard_link_to_a_file_that_was_there_before_and_to_itself(root: Path) -> None:
    (root / "lower").write_text("lower")
    lay(
        archive(member("new", tarfile.LNKTYPE, linkname="./lower"), member("new", tarfile.LNKTYPE, linkname="new")),
        root,
    )
    assert (root / "new").stat().st_ino == (root / "lower").stat().st_ino


# -- parents ---------------------------------------------------------------------------------------------------------


def test_implied_parents(root: Path) -> None:
    (root / "there").mkdir(mode=0o700)
    applied = lay(archive(file("a/b/f", uid=7), file("there/f"), file("late/f"), directory("late", mode=0o700)), root)
    assert applied.implied == {b"a", b"a/b"}
    status = (root / "a/b").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_mtime) == (0o755, 0, 0)
    assert stat.S_IMODE((root / "there").stat().st_mode) == 0o700
    assert stat.S_IMODE((root / "late").stat().st_mode) == 0o700


def test_links_of_lower_layers_are_followed_inside_the_root(root: Path) -> None:
    (root / "usr/lib").mkdir(parents=True)
    (root / "lib").symlink_to("usr/lib")
    (root / "abs").symlink_to("/usr/lib")
    (root / "climb").symlink_to("../../../usr/lib")
    lay(archive(file("lib/a"), file("abs/b"), file("climb/c")), root)
    assert sorted(os.listdir(root / "usr/lib")) == ["a", "b", "c"]
    assert (root / "lib").is_symlink()


def test_a_link_of_the_same_layer_that_stays_inside_is_followed(root: Path) -> None:
    lay(
        archive(
            directory("usr"),
            directory("usr/lib"),
            member("lib", tarfile.SYMTYPE, linkname="usr/lib"),
            file("lib/a"),
            member("usr/up", tarfile.SYMTYPE, linkname="../usr/lib"),
            file("usr/up/b"),
        ),
        root,
    )
    assert sorted(os.listdir(root / "usr/lib")) == ["a", "b"]


def test_a_replaced_link_leads_to_its_new_target(root: Path) -> None:
    lay(
        archive(
            directory("x"),
            directory("y"),
            member("a", tarfile.SYMTYPE, linkname="x"),
            file("a/1"),
            member("a", tarfile.SYMTYPE, linkname="y"),
            file("a/2"),
            directory("a"),
            file("a/3"),
        ),
        root,
    )
    assert (os.listdir(root / "x"), os.listdir(root / "y"), os.listdir(root / "a")) == (["1"], ["2"], ["3"])


# -- whiteouts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lower(root: Path) -> Path:
    (root / "d/sub/deep").mkdir(parents=True)
    for name in ("f", "d/one", "d/two", "d/sub/three", "d/sub/deep/four"):
        (root / name).write_text("lower")
    return root


def listing(root: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(base, name), root) for base, dirs, files in os.walk(root) for name in dirs + files
    }


@pytest.mark.parametrize("first", [True, False])
def test_whiteouts_hide_the_lower_layers_and_nothing_of_their_own(first: bool, lower: Path) -> None:
    marks: list[Member] = [file(".wh.f"), file("d/.wh.sub"), file("d/.wh.one"), file("d/.wh.nothing")]
    own: list[Member] = [directory("d"), directory("d/sub", mode=0o700), file("d/sub/new"), file("d/one", b"own")]
    lay(archive(*(marks + own if first else own + marks)), lower)
    assert listing(lower) == {"d", "d/one", "d/two", "d/sub", "d/sub/new"}
    assert (lower / "d/one").read_text() == "own"


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_opaque_directories_wherever_the_mark_stands(place: int, lower: Path) -> None:
    own: list[Member] = [directory("d"), file("d/new"), file("d/sub/new")]
    own.insert(place, file("d/.wh..wh..opq"))
    applied = lay(archive(*own), lower)
    assert listing(lower) == {"f", "d", "d/new", "d/sub", "d/sub/new"}
    # The lower layers' d/sub is hidden; this layer's has no entry, and gets what such a directory gets.
    assert (lower / "d/sub").stat().st_mtime == 0
    assert applied.implied == frozenset()


def test_an_opaque_root(lower: Path) -> None:
    lay(archive(file(".wh..wh..opq"), file("new")), lower)
    assert listing(lower) == {"new"}


def test_aufs_metadata_is_passed_over(lower: Path) -> None:
    applied = lay(
        archive(
            directory(".wh..wh.plnk"),
            file(".wh..wh.plnk/1.2", b"x"),
            file(".wh..wh.aufs"),
            directory(".wh..wh.orph"),
            file("after", b"y"),
        ),
        lower,
    )
    assert applied.entries == 5
    assert "after" in listing(lower)
    assert not [name for name in listing(lower) if ".wh." in name]


class Marks:
    """A dialect of whiteouts that writes down what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, bytes]] = []

    def hide(self, dir_fd: int, name: bytes) -> None:
        self.calls.append(("hide", os.readlink(f"/proc/self/fd/{dir_fd}"), name))

    def make_opaque(self, dir_fd: int) -> None:
        self.calls.append(("opaque", os.readlink(f"/proc/self/fd/{dir_fd}"), b""))


@pytest.mark.parametrize("first", [True, False])
def test_a_unions_upper_gets_marks(first: bool, root: Path) -> None:
    marks = Marks()
    mark: list[Member] = [file(".wh.gone"), file("a/.wh.x"), file("d/.wh..wh..opq"), file(".wh.again")]
    own: list[Member] = [directory("d"), file("d/f"), directory("again"), file("again/f"), file("implied/f")]
    applied = lay(archive(*(mark + own if first else own + mark)), root, whiteouts=marks)
    assert sorted(marks.calls) == sorted(
        [
            ("hide", str(root), b"gone"),
            ("hide", str(root / "a"), b"x"),
            ("opaque", str(root / "d"), b""),
            ("opaque", str(root / "again"), b""),
        ]
    )
    assert applied.implied == {b"a", b"implied"}


def test_a_directory_that_takes_a_files_place_in_an_upper_is_opaque(root: Path) -> None:
    marks = Marks()
    lay(archive(file("x"), directory("x"), file("x/f")), root, whiteouts=marks)
    assert marks.calls == [("opaque", str(root / "x"), b"")]


def test_an_upper_alone_is_not_enough_for_links_to_lower_files(root: Path) -> None:
    with pytest.raises(NeedsParents):
        lay(archive(member("b", tarfile.LNKTYPE, linkname="lower/file")), root, whiteouts=Marks())
    with pytest.raises(NeedsParents):
        lay(archive(member("l", tarfile.SYMTYPE, linkname="d"), file("l/f")), root, whiteouts=Marks())


# -- the machine -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, b"size=1m,nr_inodes=64"):
        pytest.skip("mounting a tmpfs needs root")
    yield place
    assert libc.umount2(os.fsencode(place), 0) == 0


def test_a_full_file_system_names_the_entry(small: Path) -> None:
    with pytest.raises(OutOfSpace, match="'big'"):
        lay(archive(file("ok", b"x"), file("big", bytes(2 << 20))), small)
    with pytest.raises(OutOfSpace, match=r"'\d+'"):
        lay(archive(*(file(str(number)) for number in range(100))), small)


def test_a_file_larger_than_the_file_system_is_refused_at_once(small: Path) -> None:
    data = archive(member("huge"))
    info = member("huge", size=1 << 40)
    with pytest.raises(BadLayer, match="'huge'"):
        lay(info.tobuf() + data[512:], small)


def test_no_descriptor_and_no_thread_is_left(root: Path) -> None:
    def state() -> tuple[list[str], int]:
        return sorted(os.listdir("/proc/self/fd")), threading.active_count()

    before = state()
    many: list[Member] = [directory(f"d{number}") for number in range(300)] + [
        file(f"d{number}/f") for number in range(300)
    ]
    lay(archive(*many), root)
    assert state() == before
    for bad in (archive(*many)[:300_000], archive(*many, file("../x")), b"garbage" * 1000):
        with pytest.raises(BadLayer):
            lay(bad, root)
        assert state() == before


def test_a_refusal_does_not_wait_for_the_rest_of_a_pipe(root: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, archive(file("../escape"))[:1024])
    fd = os.open(root, os.O_RDONLY)
    with open(reading, "rb") as stream, pytest.raises(BadLayer):
        apply(stream, fd)  # the writer's end stays open
    os.close(writing)
    os.close(fd)


def test_progress_adds_up_to_the_streams_bytes(root: Path) -> None:
    data = archive(file("f", bytes(30_000_000)))
    steps: list[int] = []
    lay(data, root, progress=steps.append)
    assert sum(steps) == len(data)
    assert len(steps) > 2


def test_stopping_in_the_middle(root: Path) -> None:
    data = archive(file("f", bytes(20_000_000)))

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        lay(data, root, progress=stop)
    assert threading.active_count() == threads


def test_more_directories_than_descriptors(root: Path) -> None:
    deep = "/".join(["d"] * 1500)
    applied = lay(archive(file(deep + "/f", b"x"), *(file(f"w{number}/f") for number in range(400))), root)
    assert len(applied.implied) == 1900
    subprocess.run(["rm", "-rf", root / "d"], check=True)


# -- without root ----------------------------------------------------------------------------------------------------

_IN_NAMESPACE = """
    import io, os, sys
    from layerfs.apply import apply
    from layerfs.errors import LayerfsError
    try:
        applied = apply(sys.stdin.buffer, os.open(sys.argv[1], os.O_RDONLY))
        print("applied", applied.skipped)
    except LayerfsError as error:
        print(type(error).__name__, error)
"""


def _in_user_namespace(data: bytes, root: Path) -> str:
    """What applying says where only one user is mapped."""
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", textwrap.dedent(_IN_NAMESPACE), str(root)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, input=data, capture_output=True, check=False, env=environment)
    if b"unshare failed" in result.stderr:
        pytest.skip("this host allows no user namespaces")
    assert result.returncode == 0, result.stderr
    return result.stdout.decode()


def test_a_user_namespace_makes_no_devices_and_says_so(root: Path) -> None:
    null = member("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3)
    said = _in_user_namespace(archive(null, file("after", mode=0o755)), root)
    assert said.startswith("applied ((b'dev/null', 'device nodes cannot be made")
    assert (root / "after").exists()
    assert not (root / "dev/null").exists()


def test_owners_that_a_user_namespace_has_not_are_refused_with_the_remedy(root: Path) -> None:
    said = _in_user_namespace(archive(file("etc/shadow", gid=42)), root)
    assert said.startswith("EnvironmentUnfit entry 'etc/shadow' belongs to 0:42")
    assert "/etc/subuid" in said
    assert "uidmap" in said


def test_an_interrupt_while_waiting_for_a_pipe_ends_at_once(root: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, archive(file("f"), file("g"))[:1024])
    script = """
        import os, sys, threading
        from layerfs.apply import apply
        print("ready", flush=True)
        try:
            apply(os.fdopen(0, "rb"), os.open(sys.argv[1], os.O_RDONLY))
        except KeyboardInterrupt:
            print(threading.active_count())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), root], stdin=reading, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    os.close(reading)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        while not (root / "f").exists():  # then it waits for more
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b"1\n"
    os.close(writing)
