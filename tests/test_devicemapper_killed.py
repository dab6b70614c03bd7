"""Processes that are killed while they change thin volumes: at every step, and at random."""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from layerfs import mounts
from layerfs.backing import Backing, BackingSpec
from layerfs.drivers.devicemapper import DevicemapperDriver
from layerfs.drivers.devicemapper.ledger import BLANK, Ledger, State
from layerfs.kernel import dm
from layerfs.kernel.ioctl import iowr
from layerfs.testing import Tree, read_tree
from layerfs.testing.guests import needs_thin_pools
from layerfs.testing.kills import changes, killed
from layerfs.testing.thinpools import MIB, MadePool, leftovers, sealed_base, temporary, tree, write
from layerfs.thinpool import Pool as ThinPool

Pool = MadePool[DevicemapperDriver]


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Pool]:
    with temporary(DevicemapperDriver, tmp_path / "backing") as found:
        yield found


# Versions, lists, status, tables, and what the thread that watches the pool waits for.
_LOOKS = frozenset(iowr(0xFD, number, 312) for number in (0, 2, 7, 12, 13, 16, 17))


def steps(event: str, args: tuple[Any, ...]) -> bool:
    """What changes something, with each writing to the database before it begins and when it is done."""
    return event == "ledger" or (changes(event, args) and not (event == "fcntl.ioctl" and args[1] in _LOOKS))


@pytest.fixture(autouse=True)
def audited(monkeypatch: pytest.MonkeyPatch) -> None:
    connected = Ledger._connected

    @contextlib.contextmanager
    def told(self: Ledger, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        if write:
            sys.audit("ledger")
        with connected(self, write=write) as database:
            yield database
        if write:
            sys.audit("ledger")

    monkeypatch.setattr(Ledger, "_connected", told)


def check_whole(pool: Pool, base: Tree, *others: str) -> None:
    """Nothing is wrong, half made or suspended, and the committed volume is what it was."""
    driver = pool.reopened()
    assert not driver._ledger.unfinished()
    assert set(driver.volumes()) <= {"base", *others}
    assert not [name for name in pool.devices if (found := dm.info(name)) and found.suspended]
    assert driver._session.pool.status().transaction == driver._ledger.transaction
    assert tree(driver, "base") == base


@needs_thin_pools
def test_create_of_the_first_volume_can_be_killed(ext4: Pool) -> None:
    """It makes the empty file system that all volumes are snapshots of."""
    driver = ext4.driver
    step = 0
    while killed(lambda: driver.create("first", ()), step, steps):
        driver.create("first", ())
        assert list(tree(driver, "first")) == ["."]
        driver.remove("first")
        blank = driver._ledger.find(BLANK)
        assert blank is not None
        with driver._session.locked():
            driver._session.delete(blank)
        step += 2
    assert step > 8
    assert ext4.check_all() == []


@needs_thin_pools
def test_create_with_a_limit_can_be_killed_anywhere(ext4: Pool) -> None:
    base = sealed_base(ext4.driver)
    step = 0
    while killed(lambda: ext4.driver.create("child", ["base"], size=20 * MIB), step, steps):
        check_whole(ext4, base, "child")
        ext4.driver.create("child", ["base"], size=20 * MIB)
        assert tree(ext4.driver, "child") == base
        ext4.driver.remove("child")
        step += 1
    assert step > 10
    assert ext4.check_all() == []


@needs_thin_pools
def test_fork_of_an_active_volume_can_be_killed_anywhere(ext4: Pool) -> None:
    """The source is suspended meanwhile; nobody may wait for it for ever."""
    base = sealed_base(ext4.driver)
    ext4.driver.create("source", ["base"])
    write(ext4.driver, "source", "more", b"more")
    expected = tree(ext4.driver, "source")
    step = 0
    while killed(lambda: ext4.driver.fork("fork", "source", ["base"]), step, steps):
        check_whole(ext4, base, "source", "fork")
        ext4.driver.remove("fork")
        ext4.driver.fork("fork", "source", ["base"])
        assert tree(ext4.driver, "fork") == tree(ext4.driver, "source") == expected
        ext4.driver.remove("fork")
        step += 1
    assert step > 5


@needs_thin_pools
def test_seal_can_be_killed_anywhere(ext4: Pool) -> None:
    base = sealed_base(ext4.driver)
    step = 0
    while True:
        ext4.driver.create("child", ["base"], size=20 * MIB)
        write(ext4.driver, "child", "more", b"more")
        expected = tree(ext4.driver, "child")
        went_on = killed(lambda: ext4.driver.seal("child", ["base"]), step, steps)
        check_whole(ext4, base, "child")
        ext4.driver.seal("child", ["base"])
        assert tree(ext4.driver, "child") == expected
        ext4.driver.remove("child")
        if not went_on:
            break
        step += 1
    assert step > 8


@needs_thin_pools
def test_seal_of_a_mounted_volume_can_be_killed_anywhere(ext4: Pool) -> None:
    """Whoever has it mounted notices nothing, and the second device goes sooner or later."""
    base = sealed_base(ext4.driver)
    step = 0
    while True:
        ext4.driver.create("child", ["base"], size=20 * MIB)
        with mounts.opened(ext4.driver.mounts("child", ["base"])) as fd:
            Path(f"/proc/self/fd/{fd}/more").write_bytes(b"more")
            expected = read_tree(fd)
            went_on = killed(lambda: ext4.driver.seal("child", ["base"]), step, steps)
            driver = ext4.reopened()
            assert sorted(driver.volumes()) == ["base", "child"]
            assert {device.state for device in driver._ledger.unfinished()} <= {State.REPLACED}
            assert read_tree(fd) == expected
            driver.seal("child", ["base"])
            Path(f"/proc/self/fd/{fd}/later").write_bytes(b"later")
            assert tree(driver, "child") == expected
        check_whole(ext4, base, "child")
        assert tree(driver, "child") == expected
        ext4.driver.remove("child")
        if not went_on:
            break
        step += 1
    assert step > 12
    assert ext4.check_all() == []


@needs_thin_pools
def test_remove_can_be_killed_anywhere(ext4: Pool) -> None:
    base = sealed_base(ext4.driver)
    step = 0
    while True:
        ext4.driver.create("child", ["base"])
        write(ext4.driver, "child", "more", b"more")
        expected = tree(ext4.driver, "child")
        went_on = killed(lambda: ext4.driver.remove("child"), step, steps)
        check_whole(ext4, base, "child")
        if "child" in ext4.driver.volumes():
            assert tree(ext4.driver, "child") == expected
        ext4.driver.remove("child")
        if not went_on:
            break
        step += 1
    assert step > 5


@needs_thin_pools
def test_resize_can_be_killed_anywhere(ext4: Pool) -> None:
    base = sealed_base(ext4.driver)
    ext4.driver.create("child", ["base"])
    write(ext4.driver, "child", "more", b"more")
    expected = tree(ext4.driver, "child")
    step = 0
    while killed(partial(ext4.driver.resize, "child", (65 + step) << 30), step, steps):
        check_whole(ext4, base, "child")
        assert tree(ext4.driver, "child") == expected
        step += 1
    assert step > 8


@needs_thin_pools
def test_making_a_pool_can_be_killed(tmp_path: Path) -> None:
    before = leftovers()
    place = tmp_path / "backing"
    spec = BackingSpec("thinpool", size=64 * MIB)

    def make() -> None:
        Backing.create(place, spec).up()

    step = 0
    while killed(make, step):
        backing = Backing.create(place, spec)
        backing.up()
        assert ThinPool(backing.facts["pool"]).status().mode == "rw"
        backing.destroy()
        assert leftovers() == before
        step += 4
    assert step > 16
    Backing(place).destroy()
    assert leftovers() == before


@needs_thin_pools
def test_processes_killed_at_random_leave_a_sound_pool(ext4: Pool) -> None:
    """Half a dozen processes do what stores do, and are killed; what had been sealed is what it was."""
    driver = ext4.driver
    base = sealed_base(driver)
    chance = random.Random(20)
    for number in range(5):
        child = subprocess.Popen([sys.executable, "-c", _BUSY, str(driver.root), str(number)])
        time.sleep(chance.uniform(0.4, 2.5))
        child.send_signal(signal.SIGKILL)
        child.wait()
        driver = ext4.reopened()
        assert not driver._ledger.unfinished()
        assert ext4.check_all() == []
        assert tree(driver, "base") == base
        for volume in list(driver.volumes()):
            device = driver._ledger.find(volume)
            assert device is not None
            if volume.startswith("s") and device.is_sealed:  # under the digest of its one file
                with mounts.opened(driver.mounts(volume, ("base",), read_only=True)) as fd:
                    data = Path(f"/proc/self/fd/{fd}/own").read_bytes()
                assert hashlib.sha256(data).hexdigest().startswith(volume[1:])
    for volume in sorted(driver.volumes(), key=lambda volume: volume == "base"):
        driver.remove(volume)
    assert list(driver.volumes()) == []


_BUSY = """
import hashlib, os, random, sys
from pathlib import Path
from layerfs import mounts
from layerfs.drivers.devicemapper import DevicemapperDriver
driver = DevicemapperDriver(Path(sys.argv[1]))
chance = random.Random(int(sys.argv[2]))
while True:
    data = os.urandom(chance.randrange(1 << 20))
    name = "s" + hashlib.sha256(data).hexdigest()[:12]
    driver.create(name, ["base"], size=chance.choice([None, 8 << 20]))
    with mounts.opened(driver.mounts(name, ["base"])) as fd:
        Path(f"/proc/self/fd/{fd}/own").write_bytes(data)
        if chance.random() < 0.3:
            driver.seal(name, ["base"])
            Path(f"/proc/self/fd/{fd}/own").write_bytes(b"later")
    if chance.random() < 0.5:
        driver.fork("f" + name, name, ["base"])
    if chance.random() < 0.7:
        driver.seal(name, ["base"])
    for volume in list(driver.volumes()):
        if volume != "base" and chance.random() < 0.3:
            driver.remove(volume)
"""
