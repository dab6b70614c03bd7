"""What a layer changes against its parent, and that it shows so in every child."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from layerfs.driver import ChangeKind
from layerfs.testing.workbench import Workbench, summary

MIB = 1 << 20

ADDED, MODIFIED, DELETED = ChangeKind.ADDED, ChangeKind.MODIFIED, ChangeKind.DELETED


class ChangeChecks:
    """What a layer changes against its parent, and that it shows so in every child."""

    def test_changes_of_every_kind(self, bench: Workbench) -> None:
        """graphtest Changes; continuity fstest Basic, Deletion, Update."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            for name in ("same", "content", "mode", "owner", "time", "deleted", "retyped"):
                (root / name).write_bytes(name.encode())
            for name in ("keep", "drop", "touched"):
                (root / name).mkdir()
                (root / name / "inner").write_bytes(b"x")
            os.symlink("a", root / "link")
            os.setxattr(root / "same", "user.kept", b"1")
        bench.seal(base)
        bench.tick()
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            (root / "content").write_bytes(b"other")
            os.chmod(root / "mode", 0o600)
            os.chown(root / "owner", 12, 34)
            os.utime(root / "time", ns=(5, 5))
            (root / "deleted").unlink()
            (root / "retyped").unlink()
            (root / "retyped").mkdir()
            shutil.rmtree(root / "drop")
            (root / "keep" / "new").write_bytes(b"y")
            (root / "link").unlink()
            os.symlink("b", root / "link")
            os.setxattr(root / "same", "user.kept", b"2")
            (root / "tree" / "deep").mkdir(parents=True)
        assert summary(bench.changes(child)) == [
            (MODIFIED, b""),
            (MODIFIED, b"content"),
            (DELETED, b"deleted"),
            (DELETED, b"drop"),
            (MODIFIED, b"keep"),
            (ADDED, b"keep/new"),
            (MODIFIED, b"link"),
            (MODIFIED, b"mode"),
            (MODIFIED, b"owner"),
            (MODIFIED, b"retyped"),
            (MODIFIED, b"same"),
            (MODIFIED, b"time"),
            (ADDED, b"tree"),
            (ADDED, b"tree/deep"),
        ]

    def test_what_was_changed_and_put_back_is_no_change(self, bench: Workbench) -> None:
        """A copy-up alone is no change (moby#43882: one operation, three visible behaviours)."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "file").write_bytes(b"same")
            (root / "dir").mkdir()
            os.utime(root / "dir", ns=(7, 7))
        bench.seal(base)
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            os.chmod(root / "file", 0o600)
            os.chmod(root / "file", 0o644)
            os.close(os.open(root / "file", os.O_RDWR))
            (root / "dir" / "passing").write_bytes(b"x")
            (root / "dir" / "passing").unlink()
            os.utime(root / "dir", ns=(7, 7))
        assert bench.changes(child) == []

    @pytest.mark.parametrize("restore_time", [False, True], ids=["same-second", "time-put-back"])
    @pytest.mark.parametrize("length", [1, 4096, 100_000])
    def test_a_rewrite_of_the_same_size_is_not_lost(self, bench: Workbench, length: int, restore_time: bool) -> None:
        """containerd LayerFileupdate (moby#21555): same size, same second, even the same modification time."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "file").write_bytes(b"a" * length)
            os.utime(root / "file", ns=(10**18, 10**18))
        bench.seal(base)
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            (root / "file").write_bytes(b"b" * length)
            if restore_time:
                os.utime(root / "file", ns=(10**18, 10**18))
        assert (MODIFIED, b"file") in summary(bench.changes(child))
        fresh = bench.prepare(base)
        bench.apply(bench.diff(child), fresh)
        assert bench.tree(fresh) == bench.tree(child)

    def test_a_directory_deleted_and_made_again_is_empty(self, bench: Workbench) -> None:
        """containerd RemoveDirectoryInLowerLayer (moby#25244)."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "dir" / "sub").mkdir(parents=True)
            (root / "dir" / "old").write_bytes(b"x")
        bench.seal(base)
        bench.tick()
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            shutil.rmtree(root / "dir")
            (root / "dir").mkdir()
            (root / "dir" / "new").write_bytes(b"y")
        bench.seal(child)
        assert sorted(bench.tree(child)) == [".", "dir", "dir/new"]
        grandchild = bench.prepare(child)
        with bench.mounted(grandchild) as root:
            assert os.listdir(root / "dir") == ["new"]
        assert summary(bench.changes(child)) == [
            (MODIFIED, b""),
            (MODIFIED, b"dir"),
            (ADDED, b"dir/new"),
            (DELETED, b"dir/old"),
            (DELETED, b"dir/sub"),
        ] or summary(bench.changes(child))[1:] == [
            (MODIFIED, b"dir"),
            (ADDED, b"dir/new"),
            (DELETED, b"dir/old"),
            (DELETED, b"dir/sub"),
        ]

    def test_deleted_in_the_middle_made_again_on_top(self, bench: Workbench) -> None:
        """containerd DeletedFilesInChildSnapshot; containers/storage Echo."""
        volume = bench.prepare()
        for level in range(10):
            with bench.mounted(volume) as root:
                if level % 2:
                    (root / "echo" / "file").unlink()
                    (root / "echo").rmdir()
                else:
                    (root / "echo").mkdir()
                    (root / "echo" / "file").write_bytes(b"%d" % level)
            expected = [(DELETED, b"echo")] if level % 2 else [(ADDED, b"echo"), (ADDED, b"echo/file")]
            assert [change for change in summary(bench.changes(volume)) if change[1]] == expected
            bench.seal(volume)
            volume = bench.prepare(volume)

    def test_owner_and_mode_survive_copy_up_and_seal(self, bench: Workbench) -> None:
        """containerd Chown, DirectoryPermissionOnCommit (moby#20240, #24913, #28391, #27298)."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "opt").mkdir(mode=0o755)
            (root / "opt" / "a").mkdir(mode=0o700)
            (root / "opt" / "a" / "file").write_bytes(b"x")
        bench.seal(base)
        middle = bench.prepare(base)
        with bench.mounted(middle) as root:
            os.chown(root / "opt" / "a", 1, 1)
            os.chown(root / "opt" / "a" / "file", 1, 1)
            os.chmod(root / "opt", 0o2711)
        bench.seal(middle)
        top = bench.prepare(middle)
        with bench.mounted(top) as root:
            (root / "opt" / "a" / "other").write_bytes(b"y")
            assert stat.S_IMODE(os.stat(root / "opt").st_mode) == 0o2711
            for name in ("opt/a", "opt/a/file"):
                info = os.stat(root / name)
                assert (info.st_uid, info.st_gid) == (1, 1), name

    def test_rename_and_move_out_of_a_lower_layer(self, bench: Workbench) -> None:
        """containerd MoveFileFromLowerLayer, Rename."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "dir1").mkdir()
            (root / "dir1" / "f1").write_bytes(b"1")
            (root / "f2").write_bytes(b"2")
        bench.seal(base)
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            (root / "new").mkdir()
            os.rename(root / "dir1" / "f1", root / "new" / "f1")
            os.link(root / "new" / "f1", root / "hard")
            os.rename(root / "f2", root / "f3")
            (root / "fresh").mkdir()
            (root / "fresh" / "x").write_bytes(b"x")
            os.rename(root / "fresh", root / "renamed")
        bench.seal(child)
        top = bench.prepare(child)
        with bench.mounted(top) as root:
            assert sorted(os.listdir(root)) == ["dir1", "f3", "hard", "new", "renamed"]
            assert os.listdir(root / "dir1") == []
            assert (root / "hard").read_bytes() == (root / "new" / "f1").read_bytes() == b"1"
            assert os.stat(root / "hard").st_nlink == 2

    def test_directories_that_change_places_are_changes_of_what_is_in_them(self, bench: Workbench) -> None:
        """They look alike and nothing in them was written to; so from an upper, from inodes and from change times."""
        names = ["one", "two", "in/one", "in/two"]
        base = bench.prepare()
        with bench.mounted(base) as root:
            for number, name in enumerate(names):
                (root / name / "deep").mkdir(parents=True)
                (root / name / "deep" / "file").write_bytes(b"%d" % number)
            (root / "same").mkdir()
            (root / "same" / "file").write_bytes(b"same")
            for path in (*root.rglob("*"), root):
                _set_time(path)
        bench.seal(base)
        bench.tick()
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            for name, other in (names[:2], names[2:]):
                for old, new in ((name, f"{name} aside"), (other, name), (f"{name} aside", other)):
                    shutil.move(root / old, root / new)
            for path in (root / "in", root):
                _set_time(path)
        expected = [(MODIFIED, f"{name}/deep/file".encode()) for name in sorted(names)]
        assert summary(bench.changes(child)) == expected
        assert summary(bench.changes(bench.fork(child))) == expected
        bench.seal(child)
        fresh = bench.prepare(base)
        bench.apply(bench.diff(child), fresh)
        assert bench.tree(fresh) == bench.tree(child)

    def test_a_directory_of_a_lower_layer_moves_as_mv_moves_it(self, bench: Workbench) -> None:
        """Kernel overlay answers EXDEV, on which every mv copies; the outcome has to be the same on all drivers."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "dir" / "sub").mkdir(parents=True)
            (root / "dir" / "sub" / "f").write_bytes(b"x")
        bench.seal(base)
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            shutil.move(root / "dir", root / "moved")
        bench.seal(child)
        assert sorted(bench.tree(child)) == [".", "moved", "moved/sub", "moved/sub/f"]


def _set_time(path: Path) -> None:
    """The same whole second for all, which every backend keeps."""
    os.utime(path, (1_600_000_000, 1_600_000_000))
