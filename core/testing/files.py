"""Hard links, extended attributes, special files, odd names, and what programs do to files of a lower layer."""

from __future__ import annotations

import io
import mmap
import os
import shutil
import socket
import stat
import tarfile

import pytest

from layerfs.driver import ChangeKind
from layerfs.testing.trees import read_tree
from layerfs.testing.workbench import Workbench, summary

MIB = 1 << 20

ADDED, MODIFIED, DELETED = ChangeKind.ADDED, ChangeKind.MODIFIED, ChangeKind.DELETED


class FileChecks:
    """Hard links, extended attributes, special files, odd names, and what programs do to files of a lower layer."""

    def test_writing_through_one_name_shows_under_every_name(self, bench: Workbench) -> None:
        """Overlay without an index breaks links at copy-up (stereoscope#701); here every driver keeps them."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "a").write_bytes(b"old")
            (root / "dir").mkdir()
            os.link(root / "a", root / "dir" / "b")
            os.link(root / "a", root / "c")
        bench.seal(base)
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            with open(root / "dir" / "b", "r+b") as file:
                file.write(b"NEW")
            assert (root / "a").read_bytes() == b"NEW"
        bench.seal(child)
        tree = bench.tree(child)
        assert tree["a"] == tree["dir/b"] == tree["c"]
        assert tree["a"].names == ("a", "c", "dir/b")
        assert {(MODIFIED, b"a"), (MODIFIED, b"c"), (MODIFIED, b"dir/b")} <= set(summary(bench.changes(child)))
        top = bench.prepare(child)
        with bench.mounted(top) as root:
            assert read_tree(root) == tree

    def test_links_survive_a_diff_and_an_apply(self, bench: Workbench) -> None:
        """containerd TestDiffTar HardlinkParentInclusion, HardlinkUpdatedParent; BuildKit TestHardlinks."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "a").write_bytes(b"data")
            (root / "sub").mkdir()
        bench.seal(base)
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            os.link(root / "a", root / "sub" / "linked")
            (root / "x").write_bytes(b"x")
            os.link(root / "x", root / "sub" / "x2")
        bench.seal(child)
        fresh = bench.prepare(base)
        bench.apply(bench.diff(child), fresh)
        assert bench.tree(fresh) == bench.tree(child)
        assert bench.tree(fresh)["a"].names == ("a", "sub/linked")

    def test_xattrs_and_capabilities(self, bench: Workbench) -> None:
        """containerd and moby drop all but capabilities from diffs; here user attributes stay too (moby#43882)."""
        capability = bytes.fromhex("0100000200040000000000000000000000000000")
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "bin").write_bytes(b"#!")
            os.setxattr(root / "bin", "security.capability", capability)
            os.setxattr(root / "bin", "user.binary", b"\0\xff\n=")
            (root / "dir").mkdir()
            os.setxattr(root / "dir", "user.on-a-directory", b"")
        bench.seal(base)
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            os.chmod(root / "bin", 0o755)
            assert os.getxattr(root / "bin", "security.capability") == capability
            os.removexattr(root / "dir", "user.on-a-directory")
        bench.seal(child)
        assert (MODIFIED, b"dir") in summary(bench.changes(child))
        fresh = bench.prepare(base)
        bench.apply(bench.diff(child), fresh)
        assert bench.tree(fresh) == bench.tree(child)

    def test_long_xattrs(self, bench: Workbench) -> None:
        """zfs-fuse answers wrongly where the first buffer is too small; a diff or copy must not carry that on."""
        values = {f"{number}": bytes(range(256)) * (number % 3 + 1) for number in range(40)}
        base = bench.prepare()
        with bench.mounted(base) as root:
            for name, value in values.items():
                (root / name).touch()
                os.setxattr(root / name, "user.long", value)
        bench.seal(base)
        fresh = bench.prepare()
        bench.apply(bench.diff(base), fresh)
        child = bench.prepare(base)
        for volume in (base, fresh, child, bench.fork(fresh)):
            tree = bench.tree(volume)
            assert {name: dict(tree[name].xattrs).get("user.long") for name in values} == values

    def test_special_files(self, bench: Workbench) -> None:
        """containerd TestDiffTar IgnoreSockets; the suite's unwritten test for sockets."""
        volume = bench.prepare()
        with bench.mounted(volume) as root:
            os.mkfifo(root / "fifo", 0o640)
            os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(f"{root}/socket")
        bench.seal(volume)
        with tarfile.open(fileobj=io.BytesIO(bench.diff(volume))) as tar:
            assert sorted(tar.getnames()) == [".", "fifo", "null"]
        child = bench.prepare(volume)
        with bench.mounted(child) as root:
            assert os.stat(root / "null").st_rdev == os.makedev(1, 3)
            assert stat.S_ISFIFO(os.stat(root / "fifo").st_mode)

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(b"with space", id="a space"),
            pytest.param(b"comma,colon:equals=", id="option characters"),
            pytest.param(b"back\\slash", id="a backslash"),
            pytest.param(b"new\nline", id="a line end"),
            pytest.param(b"\xff\xfe not UTF-8", id="no UTF-8"),
            pytest.param(b".wh", id="half a whiteout"),
            pytest.param(b".whatever", id="nearly a whiteout"),
            pytest.param("Ünïcode ✓".encode(), id="UTF-8"),
            pytest.param(b"n" * 255, id="255 bytes"),
            pytest.param(b"-rf", id="an option"),
            pytest.param(b"*", id="a star"),
        ],
    )
    def test_names_are_only_bytes(self, bench: Workbench, name: bytes) -> None:
        """Any name that the file system takes goes through every layer, diff and deletion."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            inside = os.fsencode(root) + b"/" + name
            os.mkdir(inside)
            for inner in (b"/one", b"/two"):
                os.close(os.open(inside + inner, os.O_CREAT | os.O_WRONLY))
        bench.seal(base)
        fresh = bench.prepare()
        bench.apply(bench.diff(base), fresh)
        assert bench.tree(fresh) == bench.tree(base)
        if len(name) > 250:
            return  # its whiteout would be longer than a name may be
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            shutil.rmtree(os.fsencode(root) + b"/" + name)
        assert (DELETED, name) in summary(bench.changes(child))

    def test_sparse_files_stay_sparse(self, bench: Workbench) -> None:
        """A hole is copied as a hole: continuity does so only since 2026."""
        base = bench.prepare()
        with bench.mounted(base) as root, open(root / "sparse", "wb") as file:
            file.seek(64 * MIB)
            file.write(b"end")
        bench.seal(base)
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            with open(root / "sparse", "r+b") as file:
                file.write(b"start")
            os.sync()
            info = os.stat(root / "sparse")
            assert info.st_size == 64 * MIB + 3
            assert info.st_blocks * 512 < 2 * MIB

    def test_open_files_mmap_and_append(self, bench: Workbench) -> None:
        """What programs do to files of a lower layer: append, truncate, map, unlink while open."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            for name in ("append", "truncate", "map", "unlink"):
                (root / name).write_bytes(b"0123456789" * 500)
        bench.seal(base)
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            with open(root / "append", "ab") as appended:
                appended.write(b"!")
            os.truncate(root / "truncate", 3)
            with open(root / "map", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
                mapped[0:3] = b"MAP"
                mapped.flush()
            with open(root / "unlink", "r+b") as file:
                os.unlink(root / "unlink")
                file.write(b"x")
                file.seek(0)
                assert file.read(3) == b"x12"
            assert (root / "append").read_bytes().endswith(b"9!")
            assert (root / "truncate").read_bytes() == b"012"
            assert (root / "map").read_bytes().startswith(b"MAP3")
            assert not (root / "unlink").exists()
