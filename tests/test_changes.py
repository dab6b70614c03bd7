"""The rule by which two trees differ, case by case, and that union drivers find what a whole comparison finds."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from layerfs import xattrs
from layerfs.backing import Backing, BackingSpec
from layerfs.changes import compare, compare_paths
from layerfs.driver import ChangeKind
from layerfs.drivers.btrfs import BtrfsDriver
from layerfs.drivers.overlay2 import Overlay2Driver
from layerfs.errors import KernelRefused
from layerfs.testing.operations import Operation, operations
from layerfs.testing.workbench import Workbench
from layerfs.treecopy import copy_tree, remove_tree

A, M, D = ChangeKind.ADDED, ChangeKind.MODIFIED, ChangeKind.DELETED
Found = list[tuple[ChangeKind, bytes]]

TIME = 1_600_000_000_000_000_000


@pytest.fixture
def old(tmp_path: Path) -> Path:
    root = tmp_path / "old"
    (root / "dir" / "sub").mkdir(parents=True)
    (root / "dir" / "file").write_bytes(b"content")
    (root / "dir" / "sub" / "file").write_bytes(b"x")
    (root / "file").write_bytes(b"y" * 2_000_000)
    (root / "link").symlink_to("file")
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (root / "one").write_bytes(b"linked")
    os.link(root / "one", root / "dir" / "two")
    os.link(root / "one", root / "three")
    return root


@pytest.fixture
def new(old: Path) -> Path:
    """A copy in which every inode is another one."""
    root = old.parent / "new"
    root.mkdir()
    with opened(old) as source, opened(root) as target:
        copy_tree(source, target)
    return root


class opened:  # noqa: N801 - reads like open
    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> int:
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def changes(old: Path | None, new: Path, **options: object) -> Found:
    with opened(new) as after:
        if old is None:
            return [(c.kind, c.path) for c in compare(None, after)]
        with opened(old) as before:
            return [(c.kind, c.path) for c in compare(before, after, **options)]  # type: ignore[arg-type]


def keeping_time(path: Path, action: Callable[[Path], object]) -> None:
    """Do something without a trace in the time of the file or of its directory."""
    before = [(p, os.stat(p, follow_symlinks=False)) for p in (path, path.parent) if os.path.lexists(p)]
    action(path)
    for place, info in before:
        if os.path.lexists(place):
            os.utime(place, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def test_a_copy_has_no_changes(old: Path, new: Path) -> None:
    assert changes(old, new) == []


def test_without_a_parent_everything_is_added_the_root_too(old: Path) -> None:
    assert changes(None, old) == [
        (A, b""),
        (A, b"dir"),
        (A, b"dir/file"),
        (A, b"dir/sub"),
        (A, b"dir/sub/file"),
        (A, b"dir/two"),
        (A, b"file"),
        (A, b"link"),
        (A, b"null"),
        (A, b"one"),
        (A, b"three"),
    ]


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(lambda p: p.write_bytes(b"CONTENT"), id="content"),
        pytest.param(lambda p: p.write_bytes(b"longer content"), id="size"),
        pytest.param(lambda p: p.chmod(0o600), id="mode"),
        pytest.param(lambda p: os.chown(p, 1, -1), id="uid"),
        pytest.param(lambda p: os.chown(p, -1, 1), id="gid"),
        pytest.param(lambda p: os.setxattr(p, "user.x", b""), id="xattr"),
        pytest.param(lambda p: os.setxattr(p, "system.posix_acl_access", ACL), id="acl"),
        pytest.param(lambda p: (p.unlink(), p.symlink_to("x")), id="type"),
    ],
)
def test_what_makes_a_file_modified(old: Path, new: Path, action: Callable[[Path], object]) -> None:
    keeping_time(new / "dir" / "file", action)
    assert changes(old, new) == [(M, b"dir/file")]


ACL = bytes.fromhex(
    "02000000 01000600 ffffffff 02000400 0a000000 04000400 ffffffff 10000400 ffffffff 20000000 ffffffff"
)


def test_a_nanosecond_of_time_counts(old: Path, new: Path) -> None:
    for path in ("file", "dir/sub", "link", "null"):
        info = os.lstat(new / path)
        os.utime(new / path, ns=(0, info.st_mtime_ns + 1), follow_symlinks=False)
    assert changes(old, new) == [(M, b"dir/sub"), (M, b"file"), (M, b"link"), (M, b"null")]


def test_the_root_counts(old: Path, new: Path) -> None:
    new.chmod(0o700)
    assert changes(old, new) == [(M, b"")]


def test_attributes_of_backends_do_not_count(old: Path, new: Path) -> None:
    for name in ("user.overlay.opaque", "user.containers.override_stat", "trusted.overlay.origin", "trusted.x"):
        keeping_time(new / "dir", lambda p, name=name: os.setxattr(p, name, b"y"))
    assert changes(old, new) == []
    keeping_time(new / "dir", lambda p: os.setxattr(p, "user.overlayed", b"y"))
    assert changes(old, new) == [(M, b"dir")]


def test_kept_attributes() -> None:
    assert [xattrs.kept(name) for name in ("user.x", "security.capability", "system.posix_acl_default")] == [True] * 3
    assert not any(
        xattrs.kept(name)
        for name in ("user.overlay.x", "user.fuseoverlayfs.x", "trusted.x", "security.selinux", "security.ima")
    )


def test_a_link_target_and_a_device_number_count(old: Path, new: Path) -> None:
    keeping_time(new / "link", lambda p: (p.unlink(), p.symlink_to("eins")))
    keeping_time(new / "null", lambda p: (p.unlink(), os.mknod(p, stat.S_IFCHR | 0o666, os.makedev(1, 5))))
    for name in ("link", "null"):
        os.utime(new / name, ns=(0, os.lstat(old / name).st_mtime_ns), follow_symlinks=False)
    assert changes(old, new) == [(M, b"link"), (M, b"null")]


def test_content_is_compared_to_the_last_byte(old: Path, new: Path) -> None:
    def last(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"z")

    keeping_time(new / "file", last)
    assert changes(old, new) == [(M, b"file")]


def test_holes_are_zeros(tmp_path: Path) -> None:
    for name, sparse in (("old", True), ("new", False)):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "file", "wb") as file:
            file.write(b"head")
            if sparse:
                file.seek(3_000_000)
            else:
                file.write(bytes(3_000_000 - 4))
            file.write(b"tail")
            file.truncate(5_000_000)
        os.utime(tmp_path / name / "file", ns=(0, 0))
        os.utime(tmp_path / name, ns=(0, 0))
    assert changes(tmp_path / "old", tmp_path / "new") == []
    with open(tmp_path / "new" / "file", "r+b") as file:
        file.seek(4_000_000)
        file.write(b"x")
    os.utime(tmp_path / "new" / "file", ns=(0, 0))
    assert changes(tmp_path / "old", tmp_path / "new") == [(M, b"file")]


def test_a_deleted_directory_is_one_change(old: Path, new: Path) -> None:
    keeping_time(new / "dir", shutil.rmtree)
    assert changes(old, new) == [(D, b"dir")]


def test_a_directory_made_again_is_compared_child_by_child(old: Path, new: Path) -> None:
    shutil.rmtree(new / "dir")
    (new / "dir").mkdir()
    (new / "dir" / "new").touch()
    for path in ("dir", ""):
        os.utime(new / path, ns=(0, os.stat(old / path).st_mtime_ns))
    assert changes(old, new) == [
        (D, b"dir/file"),
        (A, b"dir/new"),
        (D, b"dir/sub"),
        (D, b"dir/two"),
    ]


def test_a_directory_in_place_of_a_file_and_the_reverse(old: Path, new: Path) -> None:
    (new / "file").unlink()
    (new / "file").mkdir()
    (new / "file" / "inner").touch()
    shutil.rmtree(new / "dir")
    (new / "dir").touch()
    assert changes(old, new)[1:] == [(M, b"dir"), (M, b"file"), (A, b"file/inner")]


def test_sockets_do_not_exist(old: Path, new: Path) -> None:
    for place in (old / "was", new / "is", new / "dir" / "file"):
        place.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(place))
    (old / "became").touch()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(new / "became"))
    (new / "came").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(new / "came" / "socket"))
    found = changes(old, new)
    assert [c for c in found if c[1] not in (b"", b"dir")] == [(D, b"became"), (A, b"came"), (D, b"dir/file")]


def test_order_is_depth_first_and_bytewise(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    names = [b"a", b"a-b", b"a.b", b"a/z", b"\xff", "é".encode(), "\U0001f600".encode(), b"Z"]
    for name in names:
        path = os.fsencode(tmp_path) + b"/new/" + name
        os.makedirs(path, exist_ok=True)
    ordered = sorted(names, key=lambda name: name.split(b"/"))
    assert [path for _, path in changes(tmp_path / "old", tmp_path / "new")][1:] == ordered
    assert [path for _, path in changes(None, tmp_path / "new")][1:] == ordered


def test_trees_deeper_than_a_path_can_name(tmp_path: Path) -> None:
    levels = 3000
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        fd = os.open(tmp_path / name, os.O_RDONLY)
        for _ in range(levels):
            os.mkdir("d" * 3, dir_fd=fd)
            below = os.open("d" * 3, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        if name == "new":
            os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.close(fd)
    try:
        assert changes(tmp_path / "old", tmp_path / "new")[-1] == (A, b"ddd/" * levels + b"leaf")
        assert len(changes(None, tmp_path / "new")) == levels + 2
    finally:
        with opened(tmp_path) as fd:  # pytest's own removal is recursive
            remove_tree(fd, "old")
            remove_tree(fd, "new")


def test_unchanged_spares_reading(old: Path, new: Path) -> None:
    keeping_time(new / "dir" / "file", lambda p: p.write_bytes(b"CONTENT"))
    asked: list[int] = []

    def unchanged(before: os.stat_result, after: os.stat_result) -> bool:
        asked.append(after.st_ino)
        return before.st_ino != after.st_ino

    assert changes(old, new, unchanged=unchanged) == []
    assert (new / "dir" / "file").stat().st_ino in asked


def test_an_unreadable_path_is_named(tmp_path: Path, old: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with opened(tmp_path / "elsewhere") as fd, opened(old) as good:
        (tmp_path / "elsewhere").rmdir()
        list(compare(fd, good))  # an empty directory, though it has no name
    file = os.open(old / "file", os.O_RDONLY)
    try:
        with opened(old) as good, pytest.raises(KernelRefused, match=r"'/'.*Not a directory"):
            list(compare(good, file))
    finally:
        os.close(file)


# Hard links


def test_writing_through_one_name_modifies_all(old: Path, new: Path) -> None:
    with open(new / "three", "ab") as file:
        file.write(b"!")
    assert changes(old, new) == [(M, b"dir/two"), (M, b"one"), (M, b"three")]


def test_a_new_name_lists_its_siblings(old: Path, new: Path) -> None:
    keeping_time(new / "four", lambda p: os.link(new / "one", p))
    assert changes(old, new) == [(M, b"dir/two"), (A, b"four"), (M, b"one"), (M, b"three")]


def test_a_deleted_name_lists_no_siblings(old: Path, new: Path) -> None:
    keeping_time(new / "three", os.unlink)
    assert changes(old, new) == [(D, b"three")]


def test_a_name_that_got_another_content_lists_no_siblings(old: Path, new: Path) -> None:
    keeping_time(new / "three", lambda p: (p.unlink(), p.write_bytes(b"other")))
    assert changes(old, new) == [(M, b"three")]


def test_names_that_are_no_longer_linked_are_listed(old: Path, new: Path) -> None:
    keeping_time(new / "three", lambda p: (shutil.copy2(new / "one", new / "x"), os.rename(new / "x", p)))
    assert changes(old, new) == [(M, b"dir/two"), (M, b"one"), (M, b"three")]


def test_names_that_are_linked_now_are_listed(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        for file in ("a", "b"):
            (tmp_path / name / file).write_bytes(b"same")
            os.utime(tmp_path / name / file, ns=(TIME, TIME))
    (tmp_path / "new" / "b").unlink()
    os.link(tmp_path / "new" / "a", tmp_path / "new" / "b")
    for name in ("old", "new"):
        os.utime(tmp_path / name, ns=(TIME, TIME))
    assert changes(tmp_path / "old", tmp_path / "new") == [(M, b"a"), (M, b"b")]


# Union drivers


@pytest.fixture(scope="module", params=["on", "off"], ids=["index", "no-index"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    root = tmp_path_factory.mktemp("overlay2")
    probe = Overlay2Driver.probe(root)
    if not probe.usable:
        pytest.skip(probe.reason)
    driver = Overlay2Driver(root, {"index": request.param})
    bench = Workbench(driver)
    yield bench
    driver.close()


def both(bench: Workbench, volume: str) -> tuple[Found, Found]:
    with bench._compared(volume) as (before, after):
        assert before is not None
        whole = [(c.kind, c.path) for c in compare(before, after)]
        guided = [(c.kind, c.path) for c in bench.driver.changes(volume, bench.ancestry[volume], before, after)]
    return guided, whole


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(base=operations(most=20), middle=operations(most=8), top=operations())
def test_the_upper_directory_tells_what_a_whole_comparison_tells(
    bench: Workbench, base: list[Operation], middle: list[Operation], top: list[Operation]
) -> None:
    volumes: list[str] = []
    try:
        for steps in (base, middle, top):
            volume = bench.prepare(volumes[-1] if volumes else None)
            volumes.append(volume)
            with bench.mounted(volume) as root:
                for name in ("a", "b"):
                    if not bench.ancestry[volume]:
                        (root / name).mkdir()
                for step in steps:
                    step.do(root)
            if len(volumes) > 1:
                guided, whole = both(bench, volume)
                assert guided == whole
            bench.seal(volume)
        guided, whole = both(bench, volumes[-1])
        assert guided == whole
    finally:
        for volume in reversed(volumes):
            bench.remove(volume)


def test_links_all_of_them_new_need_no_walk_of_the_whole_tree(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bench.prepare()
    with bench.mounted(base) as root:
        (root / "dir").mkdir()
        (root / "old").write_bytes(b"x")
    bench.seal(base)
    child = bench.prepare(base)
    with bench.mounted(child) as root:
        (root / "one").write_bytes(b"new")
        os.link(root / "one", root / "dir" / "two")
    monkeypatch.setattr("layerfs.changes.compare", None)
    with bench._compared(child) as (before, after):
        found = [(c.kind, c.path) for c in bench.driver.changes(child, bench.ancestry[child], before, after)]
    assert found == [(M, b""), (M, b"dir"), (A, b"dir/two"), (A, b"one")]
    bench.remove(child)
    bench.remove(base)


def test_a_changed_inode_whose_copied_up_name_is_gone(bench: Workbench) -> None:
    """With an index, the content of a name that is not in the upper directory can still be another one."""
    base = bench.prepare()
    with bench.mounted(base) as root:
        (root / "dir").mkdir()
        (root / "dir" / "b").write_bytes(b"old")
        os.link(root / "dir" / "b", root / "a")
    bench.seal(base)
    child = bench.prepare(base)
    with bench.mounted(child) as root:
        (root / "dir" / "b").write_bytes(b"NEW")
        shutil.rmtree(root / "dir")
    guided, whole = both(bench, child)
    assert guided == whole
    bench.remove(child)
    bench.remove(base)


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """Layers whose inodes keep their numbers in children."""
    if os.geteuid() != 0:
        pytest.skip("btrfs needs root")
    backing = Backing.create(tmp_path_factory.mktemp("btrfs"), BackingSpec("btrfs", 256 << 20))
    try:
        backing.up()
        yield Workbench(BtrfsDriver(backing.path))
    finally:
        backing.destroy()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(base=operations(most=20), top=operations())
def test_the_inodes_that_changed_tell_what_a_whole_comparison_tells(
    snapshots: Workbench, base: list[Operation], top: list[Operation]
) -> None:
    volumes: list[str] = []
    try:
        for steps in (base, top):
            volumes.append(snapshots.prepare(volumes[-1] if volumes else None))
            with snapshots.mounted(volumes[-1]) as root:
                if len(volumes) == 1:
                    for name in ("a", "b"):
                        (root / name).mkdir()
                for step in steps:
                    step.do(root)
            if len(volumes) == 1:
                snapshots.seal(volumes[0])
                time.sleep(0.01)  # change times are as coarse as the kernel's ticks
        with snapshots.opened(volumes[0], read_only=True) as old, snapshots.opened(volumes[1], read_only=True) as new:
            whole = list(compare(old, new))
            assert list(compare_paths(old, new, changed_inodes(old, new))) == whole
    finally:
        for volume in reversed(volumes):
            snapshots.remove(volume)


def changed_inodes(old: int, new: int) -> list[bytes]:
    """One path of each inode that is new, gone, or has another change time."""
    before, after = inodes(old), inodes(new)
    return [path for number, (path, time) in (before | after).items() if before.get(number, ("", 0))[1] != time] + [
        path for number, (path, _) in before.items() if number not in after
    ]


def inodes(tree: int) -> dict[int, tuple[bytes, int]]:
    found: dict[int, tuple[bytes, int]] = {}
    for above, folders, files, fd in os.fwalk(".", dir_fd=tree):
        for name in [*folders, *files, *(["."] if above == "." else [])]:
            info = os.stat(name, dir_fd=fd, follow_symlinks=False)
            path = os.path.normpath(os.path.join(above, name))
            found[info.st_ino] = (b"" if path == "." else os.fsencode(path), info.st_ctime_ns)
    return found
