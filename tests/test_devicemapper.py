"""The devicemapper driver and thin pools; where this kernel has none, in a User-Mode Linux guest (see conftest.py)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layerfs import mounts
from layerfs.backing import Backing, BackingSpec
from layerfs.drivers.devicemapper import DevicemapperDriver, activation
from layerfs.drivers.devicemapper.ledger import State
from layerfs.errors import (
    AlreadyExists,
    Damaged,
    FailedPrecondition,
    InvalidArgument,
    LayerfsError,
    OutOfSpace,
)
from layerfs.kernel import dm, loop
from layerfs.testing import DriverConformance, Tree, read_tree
from layerfs.testing.guests import has_thin_pools, needs_thin_pools
from layerfs.testing.thinpools import MIB, MadePool, fill, sealed_base, temporary, tree, write
from layerfs.testing.workbench import Workbench


@needs_thin_pools
class TestExt4(DriverConformance):
    driver_class = DevicemapperDriver
    filesystem = "thinpool"
    depth = 48


@needs_thin_pools
class TestXfs(DriverConformance):
    driver_class = DevicemapperDriver
    filesystem = "thinpool"
    options = {"fs": "xfs"}  # noqa: RUF012
    depth = 16

    def test_usage_counts_the_volume_alone(self, bench: Workbench) -> None:
        """As for all drivers, but for the 2 MiB of its log that xfs writes whenever a snapshot is first mounted."""
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "big").write_bytes(os.urandom(8 * MIB))
            os.sync()
        bench.seal(base)
        assert 8 * MIB <= bench.driver.usage(base, ()).size < 12 * MIB
        child = bench.prepare(base)
        with bench.mounted(child) as root:
            (root / "small").write_bytes(os.urandom(MIB))
            os.sync()
        assert MIB <= bench.driver.usage(child, [base]).size < 5 * MIB


# One pool for each test

Pool = MadePool[DevicemapperDriver]


@pytest.fixture(params=["ext4", "xfs"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pool]:
    with temporary(DevicemapperDriver, tmp_path / "backing", options={"fs": request.param}) as found:
        yield found


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Pool]:
    with temporary(DevicemapperDriver, tmp_path / "backing") as found:
        yield found


@pytest.fixture
def base(pool: Pool) -> Tree:
    """The volume "base", sealed."""
    return sealed_base(pool.driver)


# Full


@needs_thin_pools
def test_a_pool_filled_to_the_last_block_loses_nothing_committed(pool: Pool, base: Tree) -> None:
    driver = pool.driver
    driver.create("keep", ["base"])
    driver.create("child", ["base"])
    before = pool.used
    with pytest.raises(OSError, match=r"No space|Input/output"):
        fill(driver, "child", "much", 400 * MIB, sync=True)
    assert driver._session.pool.status().free == 0
    with pytest.raises(OutOfSpace, match=r"has only .* left; remove some layers"):
        driver.create("next", ["base"])
    with pytest.raises(OutOfSpace, match="remove some layers"):
        driver.fork("next", "keep", ["base"])
    with pytest.raises((OutOfSpace, Damaged), match="full"):
        driver.seal("child", ["base"])
    assert tree(driver, "base") == base
    driver.remove("child")
    assert pool.used <= before + MIB
    driver.create("next", ["base"])
    write(driver, "next", "file", bytes(MIB))
    driver.seal("next", ["base"])
    assert tree(driver, "base") == base

    # xfs keeps no note of its own of what failed, and so all that was writable then is under suspicion.
    found = pool.check_all()
    assert len(found) == (0 if driver.options["fs"] == "ext4" else 1)
    assert all("the thin pool was full" in what for what in found)


@needs_thin_pools
def test_what_was_lost_without_a_word_is_not_sealed(pool: Pool, base: Tree) -> None:
    """moby#21925 and its like: nobody called fsync, the unmount said nothing, and then there was space again."""
    driver = pool.driver
    driver.create("ballast", ())
    fill(driver, "ballast", "much", 80 * MIB, sync=True)
    driver.create("child", ["base"])
    fill(driver, "child", "much", 300 * MIB, sync=False)
    driver.remove("ballast")
    with pytest.raises(Damaged, match="layerfs check --repair"):
        driver.seal("child", ["base"])
    [problem] = driver.check("child", ["base"])
    assert problem.repairable
    driver.repair("child", ["base"])
    assert list(driver.check("child", ["base"])) == []
    driver.seal("child", ["base"])
    assert sorted(path for path in tree(driver, "child") if path in (*base, "lost+found")) == sorted(base)


@needs_thin_pools
def test_metadata_run_short_with_an_error_and_not_with_a_stop(tmp_path: Path, device: Callable[..., str]) -> None:
    """A pool whose metadata are full stops for good (containerd's and Docker's users met that)."""
    data, metadata = device("data"), device("metadata", 3 * MIB)
    spec: dict[str, Any] = {"device": data, "metadata_device": metadata, "size": None, "largest": None}
    with temporary(DevicemapperDriver, tmp_path / "backing", **spec) as pool:
        base = sealed_base(pool.driver, MIB)

        def create_many() -> None:
            for number in range(2000):
                pool.driver.create(f"v{number}", ["base"])

        with pytest.raises(OutOfSpace, match="for its metadata; remove some layers"):
            create_many()
        assert pool.driver._session.pool.status().mode == "rw"
        pool.driver.remove("v0")
        assert tree(pool.driver, "base") == base
        assert list(pool.driver.check("base", ())) == []


@needs_thin_pools
def test_space_goes_back_to_the_file_below(pool: Pool, base: Tree) -> None:
    """Docker's loop-lvm files only ever grew (moby#3182)."""
    image = pool.backing.root / "backing.img"
    before = image.stat().st_blocks * 512
    pool.driver.create("child", ["base"])
    fill(pool.driver, "child", "kept", 40 * MIB, sync=True)
    fill(pool.driver, "child", "deleted", 40 * MIB, sync=True)
    assert image.stat().st_blocks * 512 > before + 80 * MIB
    with mounts.opened(pool.driver.mounts("child", ())) as fd:
        os.unlink("deleted", dir_fd=fd)
    pool.driver.seal("child", ["base"])
    assert image.stat().st_blocks * 512 < before + 50 * MIB
    pool.driver.remove("child")
    assert image.stat().st_blocks * 512 < before + 8 * MIB
    assert tree(pool.driver, "base") == base


# In use


@needs_thin_pools
def test_a_mounted_volume_is_not_removed_and_the_error_says_where(ext4: Pool, tmp_path: Path) -> None:
    """moby#27381: EBUSY, and then a device that nobody could get rid of."""
    driver = ext4.driver
    driver.create("volume", ())
    target = tmp_path / "target"
    target.mkdir()
    mounts.attach(driver.mounts("volume", ()), target)
    try:
        (target / "file").write_bytes(b"x")
        with pytest.raises(FailedPrecondition, match=f"mounted at '{target}'.*unmount it first"):
            driver.remove("volume")
        with pytest.raises(FailedPrecondition, match=f"mounted at '{target}'"):
            ext4.backing.down()
        assert (target / "file").read_bytes() == b"x"
        assert ext4.check_all() == []
    finally:
        mounts.unmount(target)
    driver.remove("volume")
    assert list(driver.volumes()) == []
    assert ext4.devices == []


@needs_thin_pools
def test_what_a_mounted_volume_holds_is_sealed(pool: Pool, base: Tree) -> None:
    """As engines do it that commit first and unmount then."""
    driver = pool.driver
    driver.create("child", ["base"], size=20 * MIB)
    with mounts.opened(driver.mounts("child", ["base"])) as fd:
        root = Path(f"/proc/self/fd/{fd}")
        (root / "small").write_bytes(b"changed")
        with open(root / "open", "wb", buffering=0) as file, open(root / "deleted", "wb") as deleted:
            file.write(bytes(MIB))
            deleted.write(bytes(MIB))
            (root / "deleted").unlink()
            expected = read_tree(fd)
            driver.seal("child", ["base"])
            driver.seal("child", ["base"])
            file.write(b"more")
            (root / "later").write_bytes(b"later")
        assert tree(driver, "child") == expected
        assert tree(driver, "base") == base
        assert sorted(driver.volumes()) == ["base", "child"]
        assert pool.check_all() == []
        assert [device.state for device in driver._ledger.unfinished()] == [State.REPLACED]
        assert "later" in read_tree(fd)
    driver.create("grandchild", ["child"])
    assert not driver._ledger.unfinished()
    write(driver, "grandchild", "much", bytes(30 * MIB))
    child, grandchild = driver.mounts("child", (), read_only=True), driver.mounts("grandchild", ())
    with mounts.opened(child) as old, mounts.opened(grandchild) as new:
        found = list(driver.changes("grandchild", ["child"], old, new))
    assert [change.path for change in found] == [b"", b"much"]
    assert driver.usage("grandchild", ["child"]).size >= 30 * MIB
    for volume in ("grandchild", "child"):
        driver.remove(volume)
    assert tree(driver, "base") == base
    assert pool.check_all() == []


@needs_thin_pools
def test_a_mounted_volume_that_lost_something_is_not_sealed(pool: Pool, base: Tree) -> None:
    """It stays the one that is mounted."""
    driver = pool.driver
    for name in ("ballast", "more"):
        driver.create(name, ())
        fill(driver, name, "much", 50 * MIB, sync=True)
    driver.create("child", ["base"])
    with mounts.opened(driver.mounts("child", ["base"])) as fd:
        fill(driver, "child", "much", 300 * MIB, sync=False)
        driver.remove("ballast")
        before = driver._ledger.find("child")
        with pytest.raises((Damaged, OutOfSpace), match=r"thin pool.*full.*make it anew"):
            driver.seal("child", ["base"])
        after = driver._ledger.find("child")
        assert before is not None
        assert after is not None
        assert (after.id, after.is_sealed) == (before.id, False)
        assert not driver._ledger.unfinished()
        assert "much" in os.listdir(fd)
    with pytest.raises((Damaged, OutOfSpace), match="layerfs check --repair"):
        driver.seal("child", ["base"])
    driver.remove("more")  # what was still to be written may have filled the pool again
    driver.repair("child", ["base"])
    driver.seal("child", ["base"])
    assert tree(driver, "base") == base


@needs_thin_pools
def test_a_volume_that_cannot_be_written_out_does_not_keep_its_pool_waiting(pool: Pool, base: Tree) -> None:
    """xfs by itself writes again for ever, and who suspends its device waits as long, with the pool's lock."""
    driver = pool.driver
    driver.create("child", ["base"])
    device = driver._existing("child")
    with mounts.opened(driver.mounts("child", ["base"])):
        fill(driver, "child", "much", 300 * MIB, sync=False)
        with driver._session.locked(), contextlib.suppress(OSError), driver._session._still(device):
            pass
    driver.remove("child")
    assert tree(driver, "base") == base


@needs_thin_pools
def test_a_volume_can_be_looked_at_while_it_is_mounted_and_mounted_while_it_is_looked_at(ext4: Pool) -> None:
    driver = ext4.driver
    driver.create("volume", ())
    looking = driver.mounts("volume", (), read_only=True)
    for _ in range(2):
        with mounts.opened(driver.mounts("volume", ())) as writable, mounts.opened(looking) as fd:
            Path(f"/proc/self/fd/{writable}/file").write_bytes(b"x")
            assert os.listdir(fd) == ["file"]
            with pytest.raises(OSError, match="Read-only"):
                os.unlink("file", dir_fd=fd)
        with mounts.opened(looking) as fd, mounts.opened(driver.mounts("volume", ())) as writable:
            os.unlink("file", dir_fd=writable)
            assert os.listdir(fd) == []


@needs_thin_pools
def test_others_can_mount_what_mounts_says(pool: Pool, base: Tree, tmp_path: Path) -> None:
    """As an engine does it: mount(8) in another process, after the driver is closed."""
    target = tmp_path / "target"
    target.mkdir()
    pool.driver.create("child", ["base"])
    for volume, read_only in (("child", False), ("base", True)):
        [mount] = pool.driver.mounts(volume, (), read_only=read_only)
        pool.driver.close()
        options = ",".join(mount.options)
        subprocess.run(["mount", "-t", mount.type, "-o", options, mount.source, target], check=True)
        try:
            assert read_tree(target) == base
        finally:
            subprocess.run(["umount", target], check=True)


@needs_thin_pools
def test_an_idle_device_does_not_stay_active(ext4: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = ext4.driver
    sealed_base(driver)
    driver.create("child", ["base"])
    with mounts.opened(driver.mounts("child", ["base"])):
        assert len(ext4.devices) == 2
        driver._activation.sweep()
        assert len(ext4.devices) == 2
        monkeypatch.setattr(activation, "IDLE", -1.0)
        driver._activation.sweep()
        [name] = ext4.devices
        assert dm.info(name)
    driver._activation.sweep()
    assert ext4.devices == []
    assert "small" in tree(driver, "child")


@needs_thin_pools
def test_a_fork_of_a_mounted_volume_is_whole(pool: Pool, base: Tree) -> None:
    """A snapshot of what is being written to (containerd#3436): the file system is frozen meanwhile."""
    pool.driver.create("source", ["base"])
    with mounts.opened(pool.driver.mounts("source", ())) as fd:
        root = Path(f"/proc/self/fd/{fd}")
        for number in range(200):
            (root / f"f{number}").write_bytes(b"%d" % number * 1000)
        pool.driver.fork("fork", "source", ["base"])
        (root / "later").write_bytes(b"later")
    with mounts.opened(pool.driver.mounts("fork", ())) as fd:
        root = Path(f"/proc/self/fd/{fd}")
        assert all((root / f"f{number}").read_bytes() == b"%d" % number * 1000 for number in range(200))
        assert not (root / "later").exists()
        assert read_tree(fd)["data"] == base["data"]


@needs_thin_pools
def test_a_mounted_volume_grows(pool: Pool, base: Tree) -> None:  # noqa: ARG001
    driver = pool.driver
    driver.create("child", ["base"], size=10 * MIB)
    with mounts.opened(driver.mounts("child", ())) as fd:
        path = f"/proc/self/fd/{fd}/file"
        with open(path, "wb") as file, pytest.raises(OSError, match=r"No space|quota"):
            file.write(bytes(20 * MIB))
        driver.resize("child", 40 * MIB)
        Path(path).write_bytes(bytes(20 * MIB))
        driver.resize("child", 100 << 30)
        info = os.fstatvfs(fd)
        assert info.f_bavail * info.f_frsize > 90 << 30
        assert sorted(os.listdir(fd)) == ["data", "file", "small"]
    with pytest.raises(OutOfSpace, match="holds more than"):
        driver.resize("child", MIB)
    driver.seal("child", ["base"])
    driver.create("grandchild", ["child"])
    with mounts.opened(driver.mounts("grandchild", ())) as fd:
        assert os.fstatvfs(fd).f_bavail * 4096 > 60 << 30


# Pool and database


@needs_thin_pools
def test_a_database_of_another_time_is_noticed(ext4: Pool) -> None:
    """containerd#5646, #4790: then every step would do harm."""
    root = ext4.driver.root
    sealed_base(ext4.driver)
    shutil.copy(root / "devices.db", root / "old.db")
    for number in range(2):
        ext4.driver.create(f"v{number}", ["base"])
    os.replace(root / "old.db", root / "devices.db")
    with pytest.raises(Damaged, match="of different times, or of different stores"):
        ext4.reopened()
    with pytest.raises(Damaged, match="of different times"):
        ext4.driver.create("v0", ["base"])


@needs_thin_pools
def test_check_finds_what_pool_and_database_do_not_have_in_common(ext4: Pool) -> None:
    sealed_base(ext4.driver)
    pool = ext4.driver._session.pool
    pool.create(4711)
    assert ext4.check_all() == [f"nobody knows the thin device 4711 of the pool {pool.name}"]
    pool.delete(4711)
    device = ext4.driver._ledger.find("base")
    assert device is not None
    ext4.driver._activation.off(device)
    pool.delete(device.id)
    assert [problem.what for problem in ext4.reopened().check("base", ())] == [
        f"the thin device {device.id} of the volume 'base' is missing"
    ]


@needs_thin_pools
def test_damaged_metadata_are_noticed_before_the_pool_is_used(ext4: Pool) -> None:
    sealed_base(ext4.driver)
    ext4.backing.down()
    (ext4.backing.root / "metadata.clean").unlink()  # as after a crash
    metadata = ext4.backing.root / "metadata.img"
    whole = metadata.read_bytes()
    with open(metadata, "r+b") as file:
        for block in range(1, 2048):
            file.seek(block * 4096)
            file.write(b"\xa5" * 512)
    with pytest.raises(Damaged, match=r"thin_check.*thin_repair"):
        ext4.backing.up()
    assert dm.devices() == []
    metadata.write_bytes(whole)
    ext4.backing.up()
    assert ext4.check_all() == []


@needs_thin_pools
def test_several_processes_use_one_pool(ext4: Pool) -> None:
    base = sealed_base(ext4.driver)
    script = """
import sys
from pathlib import Path
from layerfs import mounts
from layerfs.drivers.devicemapper import DevicemapperDriver
driver = DevicemapperDriver(Path(sys.argv[1]))
for number in range(8):
    volume = f"{sys.argv[2]}{number}"
    driver.create(volume, ["base"])
    with mounts.opened(driver.mounts(volume, ["base"])) as fd:
        Path(f"/proc/self/fd/{fd}/own").write_text(volume)
    driver.seal(volume, ["base"])
    if number % 2:
        driver.remove(volume)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(ext4.driver.root), name]) for name in ("a", "b", "c")
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sorted(ext4.driver.volumes()) == sorted(["base", *(f"{n}{i}" for n in "abc" for i in (0, 2, 4, 6))])
    assert ext4.check_all() == []
    for name in "abc":
        with mounts.opened(ext4.driver.mounts(f"{name}4", (), read_only=True)) as fd:
            assert Path(f"/proc/self/fd/{fd}/own").read_text() == f"{name}4"
    assert tree(ext4.driver, "base") == base


# The backing


@needs_thin_pools
def test_a_pool_grows_while_it_is_used(ext4: Pool) -> None:
    driver = ext4.driver
    driver.create("volume", ())
    with mounts.opened(driver.mounts("volume", ())) as fd:
        Path(f"/proc/self/fd/{fd}/file").write_bytes(bytes(MIB))
        ext4.backing.grow(512 * MIB)
        assert ext4.backing.space().total == 512 * MIB
        assert driver._session.pool.status().metadata_total == 64 * MIB
        fill(driver, "volume", "more", 300 * MIB, sync=True)
    with pytest.raises(InvalidArgument, match="cannot shrink"):
        ext4.backing.grow(128 * MIB)
    ext4.backing.down()
    ext4.backing.up()
    assert ext4.backing.space().total == 512 * MIB
    assert "more" in tree(driver, "volume")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Makes block devices that stand for disks; they are taken away in the end."""
    with contextlib.ExitStack() as stack:

        def make(name: str, size: int = 128 * MIB) -> str:
            with open(tmp_path / name, "wb") as file:
                file.truncate(size)
            with open(tmp_path / name, "r+b") as file:
                path, fd = loop.attach(file.fileno())
            stack.callback(os.close, fd)
            return str(path)

        yield make


@needs_thin_pools
@pytest.mark.parametrize("apart", [False, True], ids=["one device", "metadata apart"])
def test_a_pool_on_devices(tmp_path: Path, device: Callable[..., str], apart: bool) -> None:
    data = device("data")
    metadata = device("metadata") if apart else None
    subprocess.run(["mkfs.ext4", "-q", data], check=True)
    spec = BackingSpec("thinpool", device=data, metadata_device=metadata)
    with pytest.raises(FailedPrecondition, match="already holds data"):
        Backing.create(tmp_path / "backing", spec)
    backing = Backing.create(tmp_path / "backing", spec, force=True)
    backing.up()
    with pytest.raises(FailedPrecondition, match="in use"):
        Backing.create(tmp_path / "other", BackingSpec("thinpool", device=data), force=True)
    with pytest.raises(AlreadyExists):
        Backing.create(tmp_path / "backing", BackingSpec("thinpool"))
    (backing.path / "driver").mkdir()
    driver = DevicemapperDriver(backing.path / "driver")
    base = sealed_base(driver)
    backing.down()
    assert dm.devices() == []
    backing.up()
    assert tree(driver, "base") == base
    backing.destroy()
    assert dm.devices() == []
    for name in filter(None, (data, metadata)):
        with open(name, "rb") as file:
            assert file.read(MIB) == bytes(MIB)


@needs_thin_pools
def test_a_device_that_is_another_one_is_refused(tmp_path: Path, device: Callable[..., str]) -> None:
    data = device("data")
    backing = Backing.create(tmp_path / "backing", BackingSpec("thinpool", device=data))
    with open(data, "r+b") as file:
        file.write(b"another")
    with pytest.raises(Damaged, match="is not the device"):
        backing.up()
    backing.destroy()
    with open(data, "rb") as file:
        assert file.read(7) == b"another"


# What needs no pool


def test_probe_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    probe = DevicemapperDriver.probe(tmp_path)
    if os.geteuid() == 0 and has_thin_pools():
        assert probe.usable
        assert "thin-pool" in probe.reason
    else:
        assert not probe.usable
        assert probe.remedy.startswith(("run it as root", "load its module: modprobe", "run it in a guest kernel"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool": "x"}, "no 'pool'"),
        ({"fs": "btrfs"}, "no file system 'btrfs'"),
        ({"size": "1K"}, "a size from 16.0 MiB to 16.0 TiB"),
        ({"fs": "xfs", "size": "100M"}, "a size from 512.0 MiB"),
        ({"size": "many"}, "not a size"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        DevicemapperDriver(tmp_path, options)


def test_it_wants_a_pool(tmp_path: Path) -> None:
    with pytest.raises(LayerfsError, match="no backing of kind 'thinpool'"):
        DevicemapperDriver(tmp_path)


@needs_thin_pools
def test_the_file_system_of_a_store_stays(pool: Pool) -> None:
    other = "xfs" if pool.driver.options["fs"] == "ext4" else "ext4"
    with pytest.raises(InvalidArgument, match="give the option fs="):
        DevicemapperDriver(pool.driver.root, {"fs": other})
