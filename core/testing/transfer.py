"""Diffs written from a volume and applied to another."""

from __future__ import annotations

import io
import os
import shutil
import tarfile

from layerfs.driver import ChangeKind
from layerfs.testing.workbench import Workbench

MIB = 1 << 20

ADDED, MODIFIED, DELETED = ChangeKind.ADDED, ChangeKind.MODIFIED, ChangeKind.DELETED


class TransferChecks:
    """Diffs written from a volume and applied to another."""

    def test_apply_of_a_diff_gives_the_tree_and_the_same_diff_again(self, bench: Workbench) -> None:
        """graphtest DiffApply; the promise that every driver gives the same bytes for the same tree."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            for number in range(30):
                (root / f"d{number % 3}").mkdir(exist_ok=True)
                (root / f"d{number % 3}" / f"f{number}").write_bytes(b"%d" % number * 1000)
        bench.seal(base)
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            shutil.rmtree(root / "d0")
            (root / "d1" / "f1").write_bytes(b"changed")
            os.symlink("../d1/f1", root / "d2" / "link")
            (root / "d2" / "f2").unlink()
        bench.seal(child)
        diff = bench.diff(child)
        fresh = bench.prepare(base)
        bench.apply(diff, fresh)
        bench.seal(fresh)
        assert bench.tree(fresh) == bench.tree(child)
        assert bench.diff(fresh) == diff

    def test_a_diff_names_parents_before_children_and_whiteouts_first(self, bench: Workbench) -> None:
        """containerd TestDiffTar ParentInclusion, WhiteoutIncludesParents, WhiteoutParentRemoval."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "a" / "b").mkdir(parents=True)
            (root / "a" / "b" / "zap").write_bytes(b"x")
            (root / "a" / "b" / "more").write_bytes(b"x")
        bench.seal(base)
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            (root / "a" / "b" / "zap").unlink()
            (root / "a" / "b" / "more").write_bytes(b"yy")
        with tarfile.open(fileobj=io.BytesIO(bench.diff(child))) as tar:
            names = [name for name in tar.getnames() if name != "."]
        assert names == ["a", "a/b", "a/b/.wh.zap", "a/b/more"]

    def test_whiteouts_in_a_diff_delete_whatever_their_order(self, bench: Workbench) -> None:
        """OCI image spec, "Whiteouts": they hide lower layers only, never entries of their own layer."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "gone").write_bytes(b"x")
            (root / "dir").mkdir()
            (root / "dir" / "old").write_bytes(b"x")
            (root / "kept").mkdir()
            (root / "kept" / "old").write_bytes(b"x")
        bench.seal(base)
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name, kind in [
                ("dir", tarfile.DIRTYPE),
                ("dir/new", tarfile.REGTYPE),
                ("dir/.wh..wh..opq", tarfile.REGTYPE),
                (".wh.gone", tarfile.REGTYPE),
                ("kept", tarfile.DIRTYPE),
                ("kept/.wh.old", tarfile.REGTYPE),
                ("kept/.wh.neverwas", tarfile.REGTYPE),
            ]:
                info = tarfile.TarInfo(name)
                info.type, info.mode = kind, 0o755
                tar.addfile(info)
        child = bench.prepare(base)
        bench.apply(out.getvalue(), child)
        assert sorted(bench.tree(child)) == [".", "dir", "dir/new", "kept"]
        bench.seal(child)
        assert sorted(bench.tree(child)) == [".", "dir", "dir/new", "kept"]

    def test_a_many_layered_tree_reads_as_a_flat_one(self, bench: Workbench) -> None:
        """containerd 128LayersMount, graphtest DeepLayerRead."""
        volume = bench.prepare()
        flat: dict[str, bytes] = {}
        for level in range(bench.depth):
            with bench.mounted(volume) as root:
                (root / "dir").mkdir(exist_ok=True)
                for name in (f"dir/f{level % 10}", f"f{level}"):
                    (root / name).write_bytes(flat.setdefault(name, b"") + b"%d" % level)
                    flat[name] += b"%d" % level
                if level % 7 == 6:
                    (root / f"f{level - 3}").unlink()
                    del flat[f"f{level - 3}"]
            bench.seal(volume)
            if level < bench.depth - 1:
                volume = bench.prepare(volume)
        with bench.mounted(volume, read_only=True) as root:
            found = {name: (root / name).read_bytes() for name in os.listdir(root) if name != "dir"}
            found |= {f"dir/{name}": (root / "dir" / name).read_bytes() for name in os.listdir(root / "dir")}
        assert found == flat
