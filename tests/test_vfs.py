"""The vfs driver on file systems that share blocks between copies, and on such as do not."""

from __future__ import annotations

import os
from typing import ClassVar

import pytest

from layerfs.driver import Capability
from layerfs.drivers.vfs import VfsDriver
from layerfs.kernel import quota
from layerfs.testing import DriverConformance
from layerfs.testing.workbench import Workbench

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


class TestVfs(DriverConformance):
    driver_class = VfsDriver
    depth: ClassVar[int] = 40


@needs_root
class TestVfsOnXfs(DriverConformance):
    driver_class = VfsDriver
    filesystem = "xfs"

    def test_blocks_are_shared_and_sizes_limited_where_the_kernel_can(self, bench: Workbench) -> None:
        assert Capability.BLOCK_COW in bench.driver.capabilities
        assert (Capability.SIZE_LIMIT in bench.driver.capabilities) == quota.supported(bench.driver.root)


@needs_root
class TestVfsOnExt4(DriverConformance):
    driver_class = VfsDriver
    filesystem = "ext4"
    depth: ClassVar[int] = 40


@needs_root
class TestVfsOnBtrfs(DriverConformance):
    driver_class = VfsDriver
    filesystem = "btrfs"
    depth: ClassVar[int] = 40
