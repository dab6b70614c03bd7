"""Drivers whose process is killed in the middle of what they do: every call can be repeated, nothing stays behind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layerfs import mounts
from layerfs.backing import Backing, BackingSpec
from layerfs.driver import Driver
from layerfs.registry import load
from layerfs.testing import Tree, read_tree

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

# What changes something outside the process, as sys.audit() tells it; openat(2) is left out, which is most of it.
_CHANGES = "chmod chown link mkdir mkfifo remove removexattr rename rmdir setxattr symlink truncate utime"
_EVENTS = frozenset(f"os.{name}" for name in _CHANGES.split()) | {"fcntl.ioctl"}


@pytest.fixture(scope="module", params=["aufs", "overlay2", "btrfs", "vfs"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    on_btrfs = request.param == "btrfs"
    spec = BackingSpec("btrfs", size=512 << 20) if on_btrfs else BackingSpec("dir")
    backing = Backing.create(tmp_path_factory.mktemp(request.param), spec)
    try:
        backing.up()
        (backing.path / "driver").mkdir()
        yield load(request.param)(backing.path / "driver")
    finally:
        backing.destroy()


def killed(action: Callable[[], None], step: int) -> bool:
    """Run ``action`` in a process that is killed just before its change number ``step``; False if it got to its end."""
    pid = os.fork()
    if pid == 0:
        left = step

        def count(event: str, _: object) -> None:
            nonlocal left
            if event in _EVENTS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def tree(driver: Driver, volume: str, *parents: str) -> Tree:
    with mounts.opened(driver.mounts(volume, parents, read_only=True)) as fd:
        return read_tree(fd)


def fill(driver: Driver, volume: str, *parents: str) -> None:
    with mounts.opened(driver.mounts(volume, parents)) as fd:
        root = Path(f"/proc/self/fd/{fd}")
        (root / "dir").mkdir(exist_ok=True)
        (root / "dir" / volume).write_bytes(os.urandom(9000))
        os.link(root / "dir" / volume, root / f"{volume}-link")
        os.symlink("x", root / f"{volume}-symlink")
        if parents:
            with open(root / "dir" / parents[0], "ab") as file:
                file.write(b"more")
            (root / f"{parents[0]}-symlink").unlink()


@pytest.fixture
def base(driver: Driver) -> Iterator[str]:
    driver.create("base", ())
    fill(driver, "base")
    driver.seal("base", ())
    yield "base"
    for volume in list(driver.volumes()):
        driver.remove(volume)
    assert list(driver.volumes()) == []
    assert [name for name in os.listdir(driver.root) if name != ".userxattr"] == []


def test_create_can_be_repeated(driver: Driver, base: str) -> None:
    expected = tree(driver, base)
    step = 0
    while killed(lambda: driver.create("child", [base]), step):
        assert set(driver.volumes()) <= {base, "child"}
        driver.create("child", [base])
        assert tree(driver, "child", base) == expected
        driver.remove("child")
        step += 1
    assert step > 1


def test_fork_can_be_repeated_and_keeps_its_source(driver: Driver, base: str) -> None:
    driver.create("source", [base])
    fill(driver, "source", base)
    expected = tree(driver, "source", base)
    step = 0
    while killed(lambda: driver.fork("fork", "source", [base]), step):
        driver.remove("fork")
        driver.fork("fork", "source", [base])
        assert tree(driver, "fork", base) == tree(driver, "source", base) == expected
        driver.remove("fork")
        step += 1
    assert step > 1


def test_seal_can_be_repeated(driver: Driver, base: str) -> None:
    step = 0
    while True:
        driver.create("child", [base])
        fill(driver, "child", base)
        expected = tree(driver, "child", base)
        was_killed = killed(lambda: driver.seal("child", [base]), step)
        driver.seal("child", [base])
        assert tree(driver, "child", base) == expected
        driver.remove("child")
        if not was_killed:
            break
        step += 1


def test_remove_can_be_repeated_and_leaves_no_half_volume(driver: Driver, base: str) -> None:
    step = 0
    while True:
        driver.create("child", [base])
        fill(driver, "child", base)
        expected = tree(driver, "child", base)
        was_killed = killed(lambda: driver.remove("child"), step)
        if (driver.root / "child").exists():
            assert tree(driver, "child", base) == expected
        driver.remove("child")
        assert set(driver.volumes()) == {base}
        if not was_killed:
            break
        step += 1
    assert step > 0
