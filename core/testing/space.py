"""What a volume occupies, its size limit, and what a driver says of itself."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import ClassVar

import pytest

from layerfs.driver import Capability, ChangeKind, Driver
from layerfs.errors import EnvironmentUnfit
from layerfs.testing.workbench import Workbench

MIB = 1 << 20

ADDED, MODIFIED, DELETED = ChangeKind.ADDED, ChangeKind.MODIFIED, ChangeKind.DELETED


class SpaceChecks:
    """What a volume occupies, its size limit, and what a driver says of itself."""

    filesystem: ClassVar[str]

    def test_usage_counts_the_volume_alone(self, bench: Workbench) -> None:
        """graphtest, BuildKit TestUsage: what a layer adds, not what it shows."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "big").write_bytes(os.urandom(8 * MIB))
            os.sync()
        bench.seal(base)
        assert 8 * MIB <= bench.driver.usage(base, bench.ancestry[base]).size < 10 * MIB
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            (root / "small").write_bytes(os.urandom(MIB))
            os.sync()
        used = bench.driver.usage(child, bench.ancestry[child])
        shared = bench.driver.capabilities & Capability.BLOCK_COW or bench.driver.upper(child) is not None
        assert MIB <= used.size < ((3 if shared else 12) * MIB)

    def test_block_copy_on_write_where_it_is_declared(self, bench: Workbench) -> None:
        """A capability is a promise: changing 4 KiB of a large file costs blocks, not the file."""
        if not bench.driver.capabilities & Capability.BLOCK_COW:
            pytest.skip(f"{bench.driver.name} on {self.filesystem} does not declare BLOCK_COW")
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "big").write_bytes(os.urandom(32 * MIB))
        bench.seal(base)
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            with open(root / "big", "r+b") as file:
                file.write(b"x" * 4096)
            os.sync()
        assert bench.driver.usage(child, bench.ancestry[child]).size < 8 * MIB

    def test_the_size_limit_holds(self, bench: Workbench) -> None:
        """graphtest SetQuota: EDQUOT or ENOSPC at the limit; a driver that cannot says so at once."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "base").write_bytes(os.urandom(MIB))
        bench.seal(base)
        if not bench.driver.capabilities & Capability.SIZE_LIMIT:
            with pytest.raises(EnvironmentUnfit):
                bench.prepare(base, size=50 * MIB)
            return
        volume = bench.prepare(base, size=50 * MIB)
        with bench.mounted(volume) as root:
            self._fill(root / "below", 30 * MIB)
            with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is checked below
                self._fill(root / "above", 40 * MIB)
            assert caught.value.errno in (errno.EDQUOT, errno.ENOSPC)
            (root / "above").unlink()
        bench.driver.resize(volume, 120 * MIB)
        with bench.mounted(volume) as root:
            self._fill(root / "above", 40 * MIB)
        unlimited = bench.prepare(base)
        with bench.mounted(unlimited) as root:
            self._fill(root / "free", 60 * MIB)

    @staticmethod
    def _fill(path: Path, size: int) -> None:
        block = os.urandom(MIB)
        with open(path, "wb", buffering=0) as file:
            file.writelines(block for _ in range(size // MIB))
            os.fsync(file.fileno())

    def test_status_is_words_and_values(self, bench: Workbench) -> None:
        """What ``docker info`` and ``layerfs inspect`` show."""
        assert all(isinstance(key, str) and isinstance(value, str) for key, value in bench.driver.status().items())

    def test_check_finds_nothing_wrong_with_a_sound_volume(self, bench: Workbench) -> None:
        """No false alarms."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "file").write_bytes(b"x")
        bench.seal(base)
        child = bench.prepare(base)
        for volume in (base, child):
            assert list(bench.driver.check(volume, bench.ancestry[volume])) == []

    def test_probe_says_usable_with_a_reason(self, driver: Driver) -> None:
        """``layerfs drivers`` prints it."""
        probe = type(driver).probe(driver.root)
        assert probe.usable
        assert probe.reason
        assert probe.remedy == ""
