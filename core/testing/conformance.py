"""The conformance suite: what every driver must do, whatever it is made of.

Each check says in its docstring where the demand comes from: the suites of containerd (``core/snapshots/testsuite``),
moby and containers/storage (``graphtest``), or the issue thread in which users met the opposite.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from layerfs.backing import Backing, BackingSpec
from layerfs.driver import ChangeKind, Driver
from layerfs.testing.changed import ChangeChecks
from layerfs.testing.files import FileChecks
from layerfs.testing.lifecycle import LifecycleChecks
from layerfs.testing.space import SpaceChecks
from layerfs.testing.transfer import TransferChecks
from layerfs.testing.workbench import Workbench

MIB = 1 << 20

ADDED, MODIFIED, DELETED = ChangeKind.ADDED, ChangeKind.MODIFIED, ChangeKind.DELETED


class DriverConformance(LifecycleChecks, ChangeChecks, FileChecks, TransferChecks, SpaceChecks):
    """Subclass it, name the driver and the backing, and pytest runs every check against them.

    Attributes:
        driver_class: the driver under test.
        filesystem: the backing, as `layerfs.backing.BackingSpec` names it; ``dir`` is a plain directory.
        backing_size: bytes of the sparse file that the backing lives on.
        options: the driver's own options.
    """

    driver_class: ClassVar[type[Driver]]
    filesystem: ClassVar[str] = "dir"
    backing_size: ClassVar[int] = 1024 * MIB
    options: ClassVar[dict[str, str]] = {}
    depth: ClassVar[int] = 128
    """How many layers the deep checks stack up; Docker's limit is 128."""

    @pytest.fixture(scope="class")
    @classmethod
    def driver(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
        root = tmp_path_factory.mktemp(cls.driver_class.name)
        size = None if cls.filesystem == "dir" else cls.backing_size
        backing = Backing.create(root, BackingSpec(filesystem=cls.filesystem, size=size))
        try:
            backing.up()
            data = backing.path / "driver"
            data.mkdir(mode=0o700)
            driver = cls.driver_class(data, cls.options)
            yield driver
            driver.close()
        finally:
            backing.destroy()

    @pytest.fixture
    def bench(self, driver: Driver) -> Iterator[Workbench]:
        bench = Workbench(driver, depth=self.depth)
        yield bench
        for volume in reversed(bench.ancestry):
            driver.remove(volume)
        assert list(driver.volumes()) == []
