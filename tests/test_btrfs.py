"""The btrfs driver: the conformance suite, and what is particular to subvolumes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from layerfs.drivers.btrfs import BtrfsDriver
from layerfs.errors import LayerfsError
from layerfs.testing import DriverConformance
from layerfs.testing.workbench import Workbench, summary

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MIB = 1 << 20


class TestBtrfs(DriverConformance):
    driver_class = BtrfsDriver
    filesystem = "btrfs"

    def test_subvolumes_that_a_user_made_inside_go_with_the_volume(self, bench: Workbench) -> None:
        """moby#9939: what a container makes with btrfs itself stood in the way of its removal."""
        volume = bench.prepare()
        with bench.mounted(volume) as root:
            for name in ("sub", "sub/sub"):
                _btrfs(root, "subvolume", "create", root / name)
            (root / "sub/sub/file").write_bytes(b"x")
            _btrfs(root, "property", "set", root / "sub/sub", "ro", "true")
        bench.driver.remove(volume)
        assert list(bench.driver.volumes()) == []

    def test_a_full_backing_says_so_keeps_what_is_committed_and_frees_what_is_removed(self, bench: Workbench) -> None:
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "kept").write_bytes(os.urandom(8 * MIB))
        bench.seal(base)
        before = bench.tree(base)
        child = bench.prepare(base)
        with bench.mounted(child) as root, pytest.raises(OSError, match="No space left"):
            self._fill(root / "filler", self.backing_size)
        assert bench.tree(base) == before
        bench.remove(child)
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            (root / "again").write_bytes(os.urandom(64 * MIB))
            os.sync()
        assert b"again" in [path for _, path in summary(bench.changes(child))]

    def test_a_missing_volume_is_found(self, bench: Workbench) -> None:
        volume = bench.prepare()
        bench.driver.remove(volume)
        try:
            problems = [problem.what for problem in bench.driver.check(volume, ())]
        except LayerfsError as error:
            problems = [str(error)]
        assert problems
        bench.driver.create(volume, ())


def _btrfs(root: Path, *arguments: str | Path) -> None:
    """Run the program on something below ``root``, a path by its descriptor."""
    subprocess.run(["btrfs", *arguments], check=True, capture_output=True, pass_fds=(int(root.name),))
