"""The aufs driver: the conformance suite on several file systems, and what is particular to it."""

from __future__ import annotations

import os

import pytest

from layerfs.drivers.aufs.driver import AufsDriver
from layerfs.testing import DriverConformance

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the suite makes devices and gives files away")


class TestAufs(DriverConformance):
    driver_class = AufsDriver


class TestAufsOnXfs(DriverConformance):
    """Where copies are reflinks."""

    driver_class = AufsDriver
    filesystem = "xfs"
