"""The overlay2 driver: the conformance suite on several file systems, and what is particular to kernel overlayfs."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs import mount_table, mounts
from layerfs.driver import Capability, ChangeKind
from layerfs.drivers.overlay2 import Overlay2Driver
from layerfs.errors import Damaged, EnvironmentUnfit, FailedPrecondition, InvalidArgument, LayerfsError
from layerfs.kernel import quota
from layerfs.testing import DriverConformance
from layerfs.testing.images import tar_of
from layerfs.testing.workbench import Workbench, summary

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

ADDED, MODIFIED, DELETED = ChangeKind.ADDED, ChangeKind.MODIFIED, ChangeKind.DELETED


class TestOverlay2(DriverConformance):
    driver_class = Overlay2Driver


class TestOverlay2OnExt4(DriverConformance):
    """With project quota."""

    driver_class = Overlay2Driver
    filesystem = "ext4"

    def test_ext4_limits_sizes_where_the_kernel_can(self, bench: Workbench) -> None:
        assert (Capability.SIZE_LIMIT in bench.driver.capabilities) == quota.supported(bench.driver.root)

    def test_a_limit_holds_without_parents_and_goes_over_to_a_fork(self, bench: Workbench) -> None:
        """ext4 does not hold root to a limit; only a union does, which a volume without parents has no need of."""
        if Capability.SIZE_LIMIT not in bench.driver.capabilities:
            pytest.skip("this kernel has no project quota for ext4")
        volume = bench.prepare(size=20 << 20)
        with bench.mounted(volume) as root:
            with pytest.raises(OSError, match=r"quota|space"):
                self._fill(root / "large", 40 << 20)
            (root / "large").unlink()
        fork = bench.fork(volume)
        with bench.mounted(fork) as root:
            with pytest.raises(OSError, match=r"quota|space"):
                self._fill(root / "large", 40 << 20)
            (root / "large").unlink()
            (root / "small").write_bytes(b"x")
        bench.seal(fork)
        assert list(bench.tree(fork)) == [".", "small"]
        child = bench.prepare(fork)
        assert list(bench.tree(child)) == [".", "small"]


class TestOverlay2OnXfs(DriverConformance):
    driver_class = Overlay2Driver
    filesystem = "xfs"
    depth = 300


class TestOverlay2WithRedirects(DriverConformance):
    driver_class = Overlay2Driver
    options = {"redirect_dir": "on"}  # noqa: RUF012

    def test_changes_of_a_moved_directory(self, bench: Workbench) -> None:
        """The upper directory holds the new name alone; native changes would miss what is below it."""
        assert Capability.NATIVE_CHANGES not in bench.driver.capabilities
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "dir").mkdir()
            (root / "dir" / "file").write_bytes(b"x")
        bench.seal(base)
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            (root / "dir").rename(root / "moved")
        assert summary(bench.changes(child))[1:] == [(DELETED, b"dir"), (ADDED, b"moved"), (ADDED, b"moved/file")]
        bench.seal(child)
        grandchild = bench.prepare(child)
        assert sorted(bench.tree(grandchild)) == [".", "moved", "moved/file"]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    yield Workbench(Overlay2Driver(tmp_path))
    for point in reversed(mount_table.read()):
        if point.target.is_relative_to(tmp_path):
            mounts.unmount(point.target, lazy=True)


def upper(bench: Workbench, volume: str) -> Path:
    assert isinstance(bench.driver, Overlay2Driver)
    return bench.driver.upper_path(volume)


def linked_base(bench: Workbench) -> str:
    """A base with a file of four names, and links, fifos and devices of two names each."""
    base = bench.prepare()
    with bench.mounted(base) as root:
        (root / "sub" / "dir").mkdir(parents=True)
        (root / "a").write_bytes(b"old")
        os.symlink("nowhere", root / "s")
        os.mkfifo(root / "f")
        os.mknod(root / "d", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        for name in ("b", "sub/c", "sub/dir/d"):
            os.link(root / "a", root / name)
        for name in "sfd":
            os.link(root / name, root / f"{name}2", follow_symlinks=False)
    bench.seal(base)
    middle = bench.prepare(base)
    with bench.mounted(middle) as root:
        (root / "sub" / "unrelated").touch()
    return bench.seal(middle)


# Hard links


@pytest.mark.parametrize("ending", ["seal", "fork"])
def test_every_name_of_a_changed_file_stays_changed(bench: Workbench, ending: str) -> None:
    base = linked_base(bench)
    child = bench.prepare(base)
    with bench.mounted(child) as root:
        (root / "b").write_bytes(b"new!")
        (root / "b").unlink()  # the name that was copied up is gone: only the index has the file now
        for name in "sfd":
            os.utime(root / name, ns=(5, 5), follow_symlinks=False)
    before = bench.tree(child)
    assert before["a"].names == ("a", "sub/c", "sub/dir/d")
    assert before["s2"].mtime_ns == before["f2"].mtime_ns == before["d2"].mtime_ns == 5
    final = bench.seal(child) if ending == "seal" else bench.fork(child)
    assert bench.tree(final) == before
    assert {(MODIFIED, b"a"), (DELETED, b"b"), (MODIFIED, b"sub/c"), (MODIFIED, b"s2")} <= set(
        summary(bench.changes(final))
    )
    with bench.mounted(bench.prepare(final) if ending == "seal" else final) as root:
        assert (root / "a").read_bytes() == (root / "sub" / "dir" / "d").read_bytes() == b"new!"


def test_a_name_that_is_hidden_is_not_brought_back_by_sealing(bench: Workbench, tmp_path: Path) -> None:
    """The directory of a further name has become a link that leads out of the layer."""
    base = linked_base(bench)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "c").write_bytes(b"untouched")
    os.utime(outside / "c", ns=(1, 1))
    child = bench.prepare(base)
    with bench.mounted(child) as root:
        (root / "a").write_bytes(b"new")
        shutil.rmtree(root / "sub")
        os.symlink(outside, root / "sub")
    before = os.stat(outside / "c")
    tree = bench.tree(child)
    bench.seal(child)
    assert bench.tree(child) == tree
    assert os.stat(outside / "c") == before
    assert sorted(os.listdir(upper(bench, child))) == ["a", "b", "sub"]


def test_files_that_were_not_changed_are_not_copied_up_by_sealing(bench: Workbench) -> None:
    base = linked_base(bench)
    child = bench.prepare(base)
    with bench.mounted(child) as root:
        (root / "new").write_bytes(b"x")
    bench.seal(child)
    assert os.listdir(upper(bench, child)) == ["new"]


def test_changes_of_a_mounted_volume_name_every_link(bench: Workbench) -> None:
    base = linked_base(bench)
    child = bench.prepare(base)
    with bench.mounted(child) as root, bench.opened(base, read_only=True) as old:
        (root / "a").write_bytes(b"new")
        new = int(root.name)
        found = summary(list(bench.driver.changes(child, bench.ancestry[child], old, new)))
    assert {(MODIFIED, name) for name in (b"a", b"b", b"sub/c", b"sub/dir/d")} <= set(found)


# Mounting


def test_a_second_writable_mount_is_refused(bench: Workbench) -> None:
    child = bench.prepare(bench.seal(bench.prepare()))
    with bench.mounted(child), pytest.raises(LayerfsError, match=r"in-use|busy"), bench.mounted(child):
        pass


def test_a_volume_can_be_looked_at_while_it_is_written(bench: Workbench) -> None:
    child = bench.prepare(bench.seal(bench.prepare()))
    with bench.mounted(child) as root:
        (root / "file").write_bytes(b"x")
        assert list(bench.tree(child)) == [".", "file"]


def test_a_volume_can_be_mounted_again_and_again(bench: Workbench) -> None:
    child = bench.prepare(linked_base(bench))
    for number in range(50):
        with bench.mounted(child) as root:
            (root / "a").write_bytes(b"%d" % number)
            assert (root / "b").read_bytes() == b"%d" % number


def test_the_root_may_have_any_name(tmp_path: Path) -> None:
    root = tmp_path / "co:lon, com,ma and back\\slash"
    root.mkdir()
    bench = Workbench(Overlay2Driver(root))
    base = bench.prepare()
    with bench.mounted(base) as tree:
        (tree / "file").write_bytes(b"x")
    child = bench.prepare(bench.seal(base))
    with bench.mounted(child) as tree:
        (tree / "file").unlink()
    (mount,) = bench.driver.mounts(child, bench.ancestry[child])
    assert any(
        option.startswith(f"upperdir={tmp_path}/co\\:lon\\, com\\,ma and back\\\\slash/") for option in mount.options
    )
    assert summary(bench.changes(child)) == [(MODIFIED, b""), (DELETED, b"file")]
    assert list(bench.tree(child)) == ["."]


# Whiteouts


def test_whiteouts_written_into_an_upper(bench: Workbench) -> None:
    """They hide what they should, in the upper and in a lower layer, and show in the changes."""
    base = bench.prepare()
    with bench.mounted(base) as root:
        for name in ("file", "dir/inner", "opaque/old", "kept"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(b"x")
    child = bench.prepare(bench.seal(base))
    place = bench.driver.upper(child)
    assert place is not None
    (place.path / "opaque").mkdir()
    (place.path / "opaque" / "new").touch()
    (place.path / "fresh").mkdir()
    (place.path / "fresh" / "empty").touch()
    hidden = [(".", b"file"), (".", b"dir"), ("opaque", b"old"), ("fresh", b"never-was")]
    for directory, entry in hidden:
        fd = os.open(place.path / directory, os.O_RDONLY)
        place.whiteouts.hide(fd, entry)
        if directory == "opaque":
            place.whiteouts.make_opaque(fd)
            place.whiteouts.hide(fd, b"nothing")
        os.close(fd)
    expected = [".", "fresh", "fresh/empty", "kept", "opaque", "opaque/new"]
    with bench.mounted(child) as root:
        assert sorted(os.listdir(root / "fresh")) == ["empty"]
    assert sorted(bench.tree(child)) == expected
    assert [change for change in summary(bench.changes(child)) if change[0] == DELETED] == [
        (DELETED, b"dir"),
        (DELETED, b"file"),
        (DELETED, b"opaque/old"),
    ]
    fork = bench.fork(child)
    assert sorted(bench.tree(fork)) == expected
    grandchild = bench.prepare(bench.seal(child))
    assert sorted(bench.tree(grandchild)) == expected


def test_where_mknod_is_forbidden_a_mount_deletes(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError

    base = bench.prepare()
    with bench.mounted(base) as root:
        (root / "file").touch()
        (root / "kept").touch()
    child = bench.prepare(bench.seal(base))
    monkeypatch.setattr("layerfs.drivers.overlay2.os.mknod", forbidden)
    bench.apply(tar_of({".wh.file": b"", "new": b""}), child)
    assert sorted(bench.tree(child)) == [".", "kept", "new"]


def test_whiteouts_by_attribute_are_understood(bench: Workbench) -> None:
    base = bench.prepare()
    with bench.mounted(base) as root:
        (root / "file").touch()
        (root / "kept").touch()
    child = bench.prepare(bench.seal(base))
    place = upper(bench, child)
    before = place.stat()
    (place / "file").touch()
    os.setxattr(place / "file", "trusted.overlay.whiteout", b"")
    os.setxattr(place, "trusted.overlay.opaque", b"x")
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))  # else it is changed too, but for a quick machine
    assert summary(bench.changes(bench.seal(child))) == [(DELETED, b"file")]
    assert sorted(bench.tree(bench.prepare(child))) == [".", "kept"]


def test_a_volume_without_parents_is_written_to_as_it_is(bench: Workbench) -> None:
    """Whiteouts in it would be files that everyone sees."""
    volume = bench.prepare()
    assert bench.driver.upper(volume) is None
    (mount,) = bench.driver.mounts(volume, ())
    assert mount.type == "bind"


# Options


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"xino": "on"}, "no option 'xino'; it has index, metacopy"),
        ({"index": "yes"}, "on or off, not 'yes'"),
        ({"metacopy": "on", "redirect_dir": "off"}, "needs redirect_dir=on"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        Overlay2Driver(tmp_path, options)


def test_metacopy_is_on_for_every_mount_and_right_in_children(tmp_path: Path) -> None:
    """containers/storage#640: a mount without it sees empty files, or copies them up."""
    bench = Workbench(Overlay2Driver(tmp_path, {"metacopy": "on"}))
    base = bench.prepare()
    with bench.mounted(base) as root:
        (root / "file").write_bytes(bytes(1 << 20))
    child = bench.prepare(bench.seal(base))
    with bench.mounted(child) as root:
        os.chown(root / "file", 1, 1)
    assert bench.driver.usage(child, bench.ancestry[child]).size < 1 << 16
    grandchild = bench.prepare(bench.seal(child))
    for volume in (child, grandchild):
        for read_only in (True,) if volume == child else (True, False):
            (mount,) = bench.driver.mounts(volume, bench.ancestry[volume], read_only=read_only)
            assert {"metacopy=on", "redirect_dir=on"} <= set(mount.options)
        with bench.mounted(volume, read_only=True) as root:
            assert (root / "file").read_bytes() == bytes(1 << 20)
            assert (root / "file").stat().st_uid == 1
    assert summary(bench.changes(child)) == [(MODIFIED, b"file")]


def test_volatile_mounts_can_be_repeated_until_the_machine_goes_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(Overlay2Driver(tmp_path, {"volatile": "on"}))
    base = bench.prepare()
    child = bench.prepare(bench.seal(base))
    for number in range(3):
        with bench.mounted(child) as root:
            (root / f"file{number}").write_bytes(b"x")
    parents = bench.ancestry[child]
    assert list(bench.driver.check(child, parents)) == []
    with bench.mounted(child):
        pass
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1000)
    monkeypatch.setattr(time, "clock_gettime", lambda _: 1.0)
    with pytest.raises(Damaged, match="volatile=on when the machine went down"):
        bench.driver.mounts(child, parents)
    (problem,) = bench.driver.check(child, parents)
    assert problem.repairable
    bench.driver.repair(child, parents)
    assert list(bench.driver.check(child, parents)) == []
    assert sorted(bench.tree(child)) == [".", "file0", "file1", "file2"]


# Check and repair


def test_a_copied_store_is_found_and_repaired(
    bench: Workbench, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The index refers to inodes; in a copy of the store they are others, and the kernel says ESTALE."""
    child = bench.prepare(linked_base(bench))
    with bench.mounted(child) as root:
        (root / "a").write_bytes(b"new")
        (root / "s").unlink()
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    subprocess.run(["cp", "-a", tmp_path, copy], check=True)
    other = Workbench(Overlay2Driver(copy), dict(bench.ancestry))
    parents = other.ancestry[child]
    with pytest.raises(LayerfsError, match="Stale"), other.mounted(child):
        pass
    (problem,) = other.driver.check(child, parents)
    assert problem.repairable
    other.driver.repair(child, parents)
    assert list(other.driver.check(child, parents)) == []
    with other.mounted(child) as root:
        assert (root / "a").read_bytes() == b"new"
        assert not (root / "s").exists()


def test_a_missing_directory_is_found(bench: Workbench) -> None:
    base = bench.seal(bench.prepare())
    child = bench.prepare(base)
    shutil.rmtree(upper(bench, base))
    (problem,) = bench.driver.check(child, bench.ancestry[child])
    assert not problem.repairable
    assert f"{base}/u' is missing" in problem.what


def test_sealing_what_is_not_there_says_so(bench: Workbench) -> None:
    with pytest.raises(Damaged, match="'neverwas'"):
        bench.driver.seal("neverwas", ())


def test_a_mounted_root_keeps_its_volume(bench: Workbench, tmp_path: Path) -> None:
    volume = bench.prepare()
    target = tmp_path / volume / "u"
    mounts.attach(bench.driver.mounts(volume, ()), target)
    with pytest.raises(FailedPrecondition, match="mounted"):
        bench.driver.remove(volume)
    mounts.unmount(target)
    bench.driver.remove(volume)
    assert list(bench.driver.volumes()) == []


# Probing


def test_probe_names_the_file_system_and_leaves_nothing(tmp_path: Path) -> None:
    probe = Overlay2Driver.probe(tmp_path / "not" / "there")
    assert probe.usable, probe
    assert probe.reason.startswith("kernel overlayfs on ")
    assert list(tmp_path.iterdir()) == []


def test_probe_on_a_file_system_that_cannot_be_an_upper(bench: Workbench, tmp_path: Path) -> None:
    """Overlay over overlay, as in a container whose own root is one."""
    child = bench.prepare(bench.seal(bench.prepare()))
    target = tmp_path / "merged"
    target.mkdir()
    mounts.attach(bench.driver.mounts(child, bench.ancestry[child]), target)
    probe = Overlay2Driver.probe(target)
    mounts.unmount(target)
    assert not probe.usable
    assert "an overlay mount on overlay fails" in probe.reason
    assert "ext4, xfs, btrfs or tmpfs" in probe.remedy


def test_probe_without_the_right_to_mount(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:  # one may be everybody's, such as /var/tmp
        parent.chmod(parent.stat().st_mode | 0o755)
    code = (
        "import os, pathlib, sys\n"
        "from layerfs.drivers.overlay2 import Overlay2Driver\n"
        "os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "probe = Overlay2Driver.probe(pathlib.Path(sys.argv[1]))\n"
        "assert not probe.usable\n"
        "assert 'user namespace' in probe.remedy, probe\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# Without root


ROOTLESS = """
import os, shutil, sys
from pathlib import Path
from layerfs.driver import Capability, ChangeKind
from layerfs.drivers.overlay2 import Overlay2Driver
from layerfs.testing.workbench import Workbench, summary

root = Path(sys.argv[1])
probe = Overlay2Driver.probe(root)
assert probe.usable and "user namespace" in probe.reason, probe
bench = Workbench(Overlay2Driver(root))
assert Capability.ROOTLESS in bench.driver.capabilities
base = bench.prepare()
with bench.mounted(base) as tree:
    for name in ("keep", "gone", "dir/old"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(b"x")
bench.seal(base)
child = bench.prepare(base)
with bench.mounted(child) as tree:
    (tree / "gone").unlink()
    shutil.rmtree(tree / "dir")
    (tree / "dir").mkdir()
    (tree / "dir" / "new").write_bytes(b"y")
    os.setxattr(tree / "keep", "user.own", b"1")
wanted = [".", "dir", "dir/new", "keep"]
assert sorted(bench.tree(child)) == wanted
assert [c for c in summary(bench.changes(child)) if c[0] == ChangeKind.DELETED] == [
    (ChangeKind.DELETED, b"dir/old"), (ChangeKind.DELETED, b"gone")
]
fork = bench.fork(child)
assert bench.tree(fork) == bench.tree(child)
bench.seal(child)
diff = bench.diff(child)
fresh = bench.prepare(base)
bench.apply(diff, fresh)
assert bench.tree(fresh) == bench.tree(child)
assert bench.diff(fresh) == diff
volume = child
for level in range(30):
    volume = bench.prepare(volume)
    with bench.mounted(volume) as tree:
        (tree / f"level{level}").touch()
    bench.seal(volume)
assert len(bench.tree(volume)) == len(wanted) + 30
print(volume, *bench.ancestry[volume])
"""


def test_without_root_in_a_user_namespace(tmp_path: Path) -> None:
    """And root, who comes later, sees the same: the store keeps the attributes that it was begun with."""
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", ROOTLESS, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare failed" in result.stderr:
        pytest.skip(f"no user namespace here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    volume, *parents = result.stdout.split()
    bench = Workbench(Overlay2Driver(tmp_path), {volume: tuple(parents)})
    assert "userxattr" in bench.driver.mounts(volume, parents, read_only=True)[0].options
    tree = bench.tree(volume)
    assert "dir/new" in tree
    assert not {"gone", "dir/old"} & set(tree)
    with pytest.raises(EnvironmentUnfit, match="redirect_dir=on and metacopy=on need root"):
        Overlay2Driver(tmp_path, {"metacopy": "on"}).mounts(volume, parents, read_only=True)
