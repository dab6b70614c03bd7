"""The same random file operations in a union and in a plain directory: the trees are the same, now and after a remount,
and the changes that the upper directory tells are those that the two trees tell."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from layerfs import mounts
from layerfs.changes import compare
from layerfs.drivers.aufs.driver import AufsDriver
from layerfs.testing import Tree, read_tree
from layerfs.testing.operations import Operation, operations

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the operations make devices and give files away")


@given(below=operations(most=20), middle=operations(most=15), above=operations(most=30))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_union_does_what_a_directory_does(
    below: list[Operation], middle: list[Operation], above: list[Operation]
) -> None:
    with tempfile.TemporaryDirectory(prefix="layerfs-random-") as name:
        plain = Path(name, "plain")
        plain.mkdir()
        (Path(name) / "store").mkdir()
        driver = AufsDriver(Path(name) / "store")
        parents: list[str] = []
        for volume, steps in (("base", below), ("middle", middle), ("top", above)):
            driver.create(volume, parents)
            with mounts.opened(driver.mounts(volume, parents)) as fd:
                for step in steps:
                    step.do(Path(f"/proc/self/fd/{fd}"))
                    step.do(plain)
                assert _seen(fd) == _seen(plain)
            with mounts.opened(driver.mounts(volume, parents)) as fd:
                assert _seen(fd) == _seen(plain)
            _check_changes(driver, volume, parents)
            driver.seal(volume, parents)
            parents.insert(0, volume)
        left = [path for path in Path(name, "store", "top").rglob("*") if path.relative_to(driver.root).parts[1] != "u"]
        assert all(path.is_dir() for path in left), "of its working directory nothing is left but empty directories"
        shutil.rmtree(plain)


def _seen(root: int | Path) -> Tree:
    """The tree, without the times that the two got at different moments: those that no operation has set."""
    tree = read_tree(root)
    return {path: node if node.mtime_ns < 10**18 else node._replace(mtime_ns=0) for path, node in tree.items()}


def _check_changes(driver: AufsDriver, volume: str, parents: list[str]) -> None:
    if not parents:
        return
    with (
        mounts.opened(driver.mounts(volume, parents, read_only=True)) as new,
        mounts.opened(driver.mounts(parents[0], parents[1:], read_only=True)) as old,
    ):
        assert list(driver.changes(volume, parents, old, new)) == list(compare(old, new))
