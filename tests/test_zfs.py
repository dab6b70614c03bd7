"""The zfs driver and its backing, on the ZFS that is here: OpenZFS in the kernel, or zfs-fuse."""

from __future__ import annotations

import os

import pytest

from layerfs.drivers.zfs import ZfsDriver
from layerfs.testing import DriverConformance

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="pools and mounts need root")


class TestZfs(DriverConformance):
    driver_class = ZfsDriver
    filesystem = "zfs"
