"""What several test modules share: stores of every driver, of which nothing stays."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layerfs import registry
from layerfs.backing import Backing, BackingSpec
from layerfs.errors import NotFound
from layerfs.store import Store

pytest_plugins = ["layerfs.testing.guests"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is to run in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as nohup(1) starts it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

MakeStore = Callable[..., Store]


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A directory on a real disk: the pages of a tmpfs file cannot leave the cache."""
    path = Path("/var/tmp") / f"layerfs-test-caches-{os.getpid()}"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[MakeStore]:
    """Makes stores, ``make_store(driver, name="store", **options)``; all of them are gone at the end."""
    with contextlib.ExitStack() as stack:

        def make(driver: str, name: str = "store", **options: object) -> Store:
            root = tmp_path / name
            if "backing" not in options and registry.load(driver).needs.filesystems and not root.exists():
                options["backing"] = BackingSpec(registry.load(driver).needs.filesystems[0], size=512 << 20)
            stack.callback(take_away, root)
            return stack.enter_context(Store(root, driver, **options))  # type: ignore[arg-type]

        yield make


def take_away(root: Path) -> None:
    """The backing of a store, which pytest's own directories would keep for a while."""
    with contextlib.suppress(NotFound):
        Backing(root).destroy()


_SLOW = ("aufs", "zfs")  # everything goes through a program in user space there


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"thorough: on {' and '.join(_SLOW)} only where LAYERFS_TEST_ENGINES is all")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("LAYERFS_TEST_ENGINES") == "all":
        return
    skip = pytest.mark.skip(reason="takes long on this driver: nox -s engines runs it")
    for item in items:
        is_marked = item.get_closest_marker("thorough") is not None
        if is_marked and isinstance(item, pytest.Function) and set(_SLOW).intersection(item.callspec.params.values()):
            item.add_marker(skip)
