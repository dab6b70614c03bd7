"""Thin pools that grow by themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs.backing import Backing
from layerfs.drivers.devicemapper import DevicemapperDriver
from layerfs.errors import Damaged, OutOfSpace
from layerfs.kernel import dm
from layerfs.testing.guests import needs_thin_pools
from layerfs.testing.kills import killed
from layerfs.testing.thinpools import MIB, MadePool, fill, sealed_base, temporary, tree

Pool = MadePool[DevicemapperDriver]


@pytest.fixture(params=["ext4", "xfs"])
def growing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pool]:
    """A pool of 256 MiB that grows by itself, with a volume "work" that can be written to."""
    with temporary(DevicemapperDriver, tmp_path / "backing", options={"fs": request.param}, largest=None) as found:
        found.driver.create("work", ())
        yield found


def waits(pool: Pool) -> bool:
    """Whether a write to the pool waits where there is no space, by the table in use."""
    return "error_if_no_space" not in dm.table(pool.pool.name)[0].params


@needs_thin_pools
def test_the_next_call_makes_a_nearly_full_pool_larger(growing: Pool) -> None:
    driver = growing.driver
    fill(driver, "work", "much", 30 * MIB, sync=True, watched=False)
    driver.seal("work", ())
    before = tree(driver, "work")
    driver.create("child", ["work"])
    fill(driver, "child", "more", 200 * MIB - growing.used, sync=True, watched=False)
    assert growing.backing.space().total == 256 * MIB
    driver.create("next", ["work"])
    assert growing.backing.space().total == 384 * MIB
    assert Backing(growing.backing.root).spec.size == 384 * MIB
    driver.seal("child", ["work"])
    driver.close()
    growing.backing.down()
    growing.backing.up()
    assert growing.backing.space().total == 384 * MIB
    assert growing.check_all() == []
    assert tree(driver, "work") == before
    assert "more" in tree(driver, "child")


@needs_thin_pools
def test_a_pool_grows_while_a_container_writes_without_a_call(growing: Pool) -> None:
    """Thrice what there was; no write fails, and nobody suspects that one has."""
    driver = growing.driver
    fill(driver, "work", "much", 700 * MIB, sync=True)
    assert growing.backing.space().total > 700 * MIB
    assert growing.backing.failures() == 0
    driver.seal("work", ())
    assert tree(driver, "work")["much"]
    assert growing.check_all() == []


@needs_thin_pools
def test_a_write_waits_for_the_next_process_that_opens_the_store(growing: Pool) -> None:
    [mount] = growing.driver.mounts("work", ())
    growing.driver.close()
    script = """
import os, sys
from pathlib import Path
from layerfs import mounts
from layerfs.driver import Mount
with mounts.opened([Mount(sys.argv[1], sys.argv[2], tuple(sys.argv[3].split(",")))]) as fd:
    with open(f"/proc/self/fd/{fd}/much", "wb") as file:
        file.write(os.urandom(300 << 20))
        os.fsync(file.fileno())
"""
    arguments = [mount.type, mount.source, ",".join(mount.options)]
    writer = subprocess.Popen([sys.executable, "-c", script, *arguments])
    while writer.poll() is None and growing.pool.status().mode == "rw":
        time.sleep(0.05)
    assert writer.poll() is None
    driver = growing.reopened()
    try:
        driver.create("next", ())
        assert writer.wait() == 0
    finally:
        driver.close()
    assert growing.backing.failures() == 0
    driver.seal("work", ())
    assert growing.check_all() == []


@pytest.fixture
def impatient() -> Iterator[None]:
    """A kernel that lets writes to a full pool wait for a second only."""
    timeout = Path("/sys/module/dm_thin_pool/parameters/no_space_timeout")
    before = timeout.read_text()
    timeout.write_text("1")
    try:
        yield
    finally:
        timeout.write_text(before)


@needs_thin_pools
@pytest.mark.usefixtures("impatient")
def test_a_write_that_waited_in_vain_is_not_forgotten(growing: Pool) -> None:
    """The pool grows afterwards, and the volume is not sealed as if nothing had happened."""
    driver = growing.driver
    with pytest.raises(OSError, match=r"No space|Input/output"):
        fill(driver, "work", "much", 300 * MIB, sync=True, watched=False)
    driver.create("next", ())
    assert growing.backing.space().total > 256 * MIB
    assert growing.backing.failures() == 1
    assert waits(growing)
    with pytest.raises(Damaged, match="layerfs check --repair"):
        driver.seal("work", ())
    driver.remove("work")
    driver.create("work", ())
    fill(driver, "work", "much", 300 * MIB, sync=True)
    driver.seal("work", ())
    assert growing.backing.failures() == 1


@needs_thin_pools
def test_at_its_largest_size_a_full_pool_is_an_error_at_once(tmp_path: Path) -> None:
    with temporary(DevicemapperDriver, tmp_path / "backing", size=64 * MIB, largest=96 * MIB) as pool:
        pool.driver.create("work", ())
        assert waits(pool)
        with pytest.raises(OSError, match=r"No space|Input/output"):
            fill(pool.driver, "work", "much", 200 * MIB, sync=True)
        assert pool.backing.space().total == 96 * MIB
        assert not waits(pool)
        assert pool.backing.failures() > 0
        with pytest.raises(OutOfSpace, match="remove some layers"):
            pool.driver.create("next", ())


@needs_thin_pools
def test_growing_leaves_a_reserve_below(tmp_path: Path) -> None:
    with open(tmp_path / "disk", "wb") as file:
        file.truncate(400 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", tmp_path / "disk"], check=True)
    below = tmp_path / "below"
    below.mkdir()
    subprocess.run(["mount", "-o", "loop", tmp_path / "disk", below], check=True)
    try:
        with temporary(DevicemapperDriver, below / "backing", size=64 * MIB, largest=None) as pool:
            base = sealed_base(pool.driver)
            pool.driver.create("work", ["base"])
            with pytest.raises(OSError, match=r"No space|Input/output"):
                fill(pool.driver, "work", "much", 500 * MIB, sync=True)
            assert 240 * MIB < pool.backing.space().total < 400 * MIB
            assert not waits(pool)
            info = os.statvfs(below)
            assert info.f_bavail * info.f_frsize > 12 * MIB
            assert tree(pool.driver, "base") == base
            pool.driver.remove("work")
            pool.driver.create("next", ["base"])
    finally:
        subprocess.run(["umount", below], check=True)


@needs_thin_pools
def test_metadata_grow_by_themselves(tmp_path: Path) -> None:
    with temporary(DevicemapperDriver, tmp_path / "backing", largest=None, metadata_size=2 * MIB) as pool:
        base = sealed_base(pool.driver, MIB)
        status = pool.pool.status
        number = 0
        while status().metadata_total == 2 * MIB:
            number += 1
            pool.driver.create(f"v{number}", ["base"])
            assert status().metadata_used < 2 * MIB
        assert status().metadata_total == 3 * MIB
        assert status().total == 256 * MIB
        pool.driver.create("last", ["base"])
        assert pool.check_all() == []
        pool.driver.close()
        pool.backing.down()
        pool.backing.up()
        assert status().metadata_total == 3 * MIB
        assert tree(pool.driver, "last") == base


@needs_thin_pools
def test_growing_can_be_killed_anywhere(tmp_path: Path) -> None:
    """A pool may stay suspended then, or its file be larger than it knows; the next call finishes it."""
    suspended = 0
    step = 0
    while True:
        with temporary(DevicemapperDriver, tmp_path / "backing", size=64 * MIB, largest=None) as pool:
            pool.driver.create("work", ())
            fill(pool.driver, "work", "much", 52 * MIB, sync=True, watched=False)
            went_on = killed(pool.backing.extend, step)
            found = dm.info(pool.pool.name)
            assert found is not None
            suspended += found.suspended
            driver = pool.reopened()
            driver.create("next", ())
            driver.close()
            found = dm.info(pool.pool.name)
            assert found is not None
            assert not found.suspended
            assert pool.backing.space().total == 96 * MIB
            assert Backing(pool.backing.root).spec.size == 96 * MIB
            assert waits(pool)
            assert pool.backing.failures() == 0
            assert pool.check_all() == []
            fill(driver, "work", "more", 16 * MIB, sync=True, watched=False)
            driver.seal("work", ())
        if not went_on:
            break
        step += 1
    assert step > 8
    assert suspended > 0


@needs_thin_pools
def test_a_suspended_pool_is_resumed_by_the_next_call(growing: Pool) -> None:
    """As a process leaves it that is killed while it makes the pool larger, which others are using."""
    driver = growing.driver
    dm.suspend(growing.pool.name, freeze=False)
    driver.mounts("work", ())
    fill(driver, "work", "file", MIB, sync=True)
    driver.seal("work", ())
    assert growing.backing.failures() == 0
