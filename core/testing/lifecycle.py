"""The life of a volume: made, sealed, forked, removed, and looked at without writing."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from layerfs.driver import ChangeKind
from layerfs.errors import FailedPrecondition
from layerfs.testing.trees import read_tree
from layerfs.testing.workbench import Workbench

MIB = 1 << 20

ADDED, MODIFIED, DELETED = ChangeKind.ADDED, ChangeKind.MODIFIED, ChangeKind.DELETED


class LifecycleChecks:
    """The life of a volume: made, sealed, forked, removed, and looked at without writing."""

    def test_empty_volume_has_a_root_of_0755_and_nothing_in_it(self, bench: Workbench) -> None:
        """graphtest CreateEmpty; containerd RootPermission."""
        volume = bench.prepare()
        with bench.mounted(volume) as root:
            assert os.listdir(root) == []
            info = os.stat(root)
            assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o755, os.geteuid(), os.getegid())

    def test_contents_survive_seal_and_show_in_a_child(self, bench: Workbench) -> None:
        """containerd Basic; graphtest CreateBase (setuid, sticky, owners) and CreateSnap."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "a file").write_bytes(b"one\n")
            (root / "dir").mkdir()
            (root / "dir" / "suid").write_bytes(b"two\n")
            os.chown(root / "dir" / "suid", 1, 2)
            os.chmod(root / "dir" / "suid", 0o4755)
            os.chmod(root / "dir", 0o1777)
            os.symlink("../a file", root / "dir" / "link")
            os.utime(root / "a file", ns=(1, 1_234_567_891_234_567_891))
        before = bench.tree(base)
        bench.seal(base)
        child = bench.prepare(base)
        assert bench.tree(base) == before
        with bench.mounted(child) as root:
            assert read_tree(root) == before
        assert bench.changes(child) == []

    def test_a_child_does_not_change_its_parent_nor_its_sibling(self, bench: Workbench) -> None:
        """The meaning of copy-on-write."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "file").write_bytes(b"base")
            (root / "gone").write_bytes(b"base")
        bench.seal(base)
        before = bench.tree(base)
        one, two = bench.prepare(base), bench.prepare(base)
        with bench.mounted(one) as root:
            (root / "file").write_bytes(b"one")
            (root / "gone").unlink()
            (root / "new").write_bytes(b"one")
        assert bench.tree(base) == before
        assert bench.tree(two) == before

    def test_create_seal_and_remove_are_idempotent(self, bench: Workbench) -> None:
        """The interface: each can be called again to finish what a crash left."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "kept").write_bytes(b"x")
        bench.driver.create(base, bench.ancestry[base])
        bench.seal(base)
        bench.seal(base)
        assert "kept" in bench.tree(base)
        child = bench.prepare(base)
        bench.remove(child)
        bench.driver.remove(child)
        bench.driver.remove("neverwas")

    def test_a_removed_name_can_be_used_again(self, bench: Workbench) -> None:
        """containerd Remove."""
        volume = bench.prepare()
        with bench.mounted(volume) as root:
            (root / "old").write_bytes(b"x")
        bench.driver.remove(volume)
        bench.driver.create(volume, ())
        assert list(bench.tree(volume)) == ["."]

    def test_volumes_lists_what_exists(self, bench: Workbench) -> None:
        """What the orphan finder stands on (containerd#13416, moby#45939)."""
        base = bench.seal(bench.prepare())
        child = bench.prepare(base)
        assert sorted(bench.driver.volumes()) == sorted([base, child])

    def test_another_driver_object_sees_the_same_volumes(self, bench: Workbench) -> None:
        """A restart of the engine: nothing lives in the object alone."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "file").write_bytes(b"x")
        bench.seal(base)
        again = type(bench.driver)(bench.driver.root, bench.driver.options)
        assert sorted(again.volumes()) == [base]
        other = Workbench(again, dict(bench.ancestry))
        assert other.tree(base) == bench.tree(base)
        again.close()
        again.close()

    def test_remove_of_a_volume_in_use_keeps_it_or_says_so(self, bench: Workbench) -> None:
        """moby#27381 (EBUSY leaks): a removal either happens or is refused; afterwards it can be done."""
        volume = bench.prepare()
        with bench.mounted(volume) as root:
            (root / "file").write_bytes(b"x")
            try:
                bench.driver.remove(volume)
            except FailedPrecondition:
                assert (root / "file").read_bytes() == b"x"
        bench.driver.remove(volume)
        assert volume not in list(bench.driver.volumes())

    def test_fork_is_an_independent_copy(self, bench: Workbench) -> None:
        """The interface: an apply works on a fork, so that it is all or nothing."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "lower").write_bytes(b"lower")
            (root / "removed").write_bytes(b"lower")
            (root / "dir").mkdir()
            (root / "dir" / "inner").write_bytes(b"x")
        bench.seal(base)
        source = bench.prepare(base)
        with bench.mounted(source) as root:
            (root / "lower").write_bytes(b"changed")
            (root / "removed").unlink()
            shutil.rmtree(root / "dir")
            (root / "dir").mkdir()
            (root / "linked").write_bytes(b"x")
            os.link(root / "linked", root / "linked2")
        before = bench.tree(source)
        fork = bench.fork(source)
        assert bench.tree(fork) == before
        with bench.mounted(fork) as root:
            (root / "lower").write_bytes(b"forked")
            (root / "linked2").unlink()
            assert read_tree(root) != before
        assert bench.tree(source) == before
        with bench.mounted(source) as root:
            assert read_tree(root) == before

    def test_a_read_only_mount_refuses_writes(self, bench: Workbench) -> None:
        """containerd ViewReadonly: a real write must fail, not only a mode bit."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "file").write_bytes(b"x")
        bench.seal(base)
        child = bench.seal(bench.prepare(base))
        for volume in (base, child):
            assert all(mount.read_only for mount in bench.driver.mounts(volume, bench.ancestry[volume], read_only=True))
            with bench.mounted(volume, read_only=True) as root:
                with pytest.raises(OSError, match="Read-only file system"):
                    (root / "file").write_bytes(b"y")
                with pytest.raises(OSError, match="Read-only file system"):
                    (root / "new").mkdir()

    def test_mounts_does_no_mounting(self, bench: Workbench) -> None:
        """An engine mounts by itself: asking twice changes nothing."""
        base = bench.seal(bench.prepare())
        child = bench.prepare(base)
        table = Path("/proc/self/mountinfo").read_text()
        first = bench.driver.mounts(child, bench.ancestry[child])
        assert first == bench.driver.mounts(child, bench.ancestry[child])
        assert first
        assert Path("/proc/self/mountinfo").read_text() == table
