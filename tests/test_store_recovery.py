"""Work on layers that was broken off or goes on in a thread, and what the next opening makes of it.

For processes that are killed see test_store_crashes.py.
"""

from __future__ import annotations

import errno
import io
import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from layerfs.driver import Driver
from layerfs.errors import AlreadyExists, NotFound, OutOfSpace
from layerfs.store import Store
from layerfs.testing.images import tar_of
from layerfs.testing.stores import committed, keys

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root; see test_rootless.py")

MakeStore = Callable[..., Store]


def failing(monkeypatch: pytest.MonkeyPatch, store: Store, step: str, error: BaseException) -> None:
    """Let a step of the store's driver fail until ``monkeypatch`` is undone."""
    monkeypatch.setattr(type(store.driver), step, lambda *_: (_ for _ in ()).throw(error))


# -- work that is broken off ----------------------------------------------------------------------------------------


def test_work_that_was_interrupted_is_finished_by_the_next_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path / "store", "vfs") as store:
        committed(store, "base")
        for key in ("gone", "sealed", "applied"):
            store.prepare(key, "base")
        for step, action in (
            ("remove", lambda: store.remove("gone")),
            ("seal", lambda: store.commit("top", "sealed")),
            ("remove", lambda: store.apply("applied", io.BytesIO(tar_of({"file": b"x"})))),
        ):
            failing(monkeypatch, store, step, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                action()
            monkeypatch.undo()
        with pytest.raises(AlreadyExists):
            store.prepare("gone")
    with Store(tmp_path / "store") as store:
        assert keys(store) == ["base", "top", "applied"]
        assert len(list(store.driver.volumes())) == 3
        assert store.check() == []
        for key in ("applied", "top", "base"):
            store.remove(key)


def test_a_mount_of_a_session_that_has_ended_is_taken_down(tmp_path: Path) -> None:
    with Store(tmp_path / "store", "vfs") as store:
        store.prepare("work")
        place = store.mount("work")
        with sqlite3.connect(store.root / "layerfs.db") as connection:  # as where its end went wrong
            connection.execute("UPDATE mounts SET session = (SELECT max(number) + 1 FROM sessions)")
            connection.execute("UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = 'sessions'")
    assert place.exists()
    with Store(tmp_path / "store"):
        gone = not place.exists()
    if not gone:
        subprocess.run(["umount", place], check=True)
    assert gone


def test_a_failure_that_is_none_of_ours_leaves_no_layer_busy(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store("vfs")
    for key in ("gone", "work"):
        store.prepare(key)
    for step, action in (("remove", lambda: store.remove("gone")), ("seal", lambda: store.commit("top", "work"))):
        failing(monkeypatch, store, step, OSError(errno.EMFILE, "too many open files"))
        with pytest.raises(OSError, match="too many open files"):
            action()
        monkeypatch.undo()
    assert sorted(finding.name for finding in store.check(repair=True) if finding.repaired) == ["gone", "work"]
    assert keys(store) == ["top"]


def test_a_store_ends_its_session_whatever_fails_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store", "vfs")
    descriptors = len(os.listdir("/proc/self/fd"))
    store.prepare("work")
    failing(monkeypatch, store, "close", OSError(errno.EIO, "it does not end"))
    with pytest.raises(OSError, match="it does not end"):
        store.close()
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) < descriptors
    with Store(tmp_path / "store") as store:
        store.remove("work")


# -- removal that nobody waits for -----------------------------------------------------------------------------------


def test_a_key_is_free_at_once_and_the_data_goes_later(make_store: MakeStore) -> None:
    store = make_store("overlay2")
    for key, parent in (("base", ""), ("middle", "base"), ("top", "middle")):
        store.prepare("work", parent)
        store.commit(key, "work", digest=False)
    for key in ("top", "middle", "base"):
        store.remove(key, wait=False)
        with pytest.raises(NotFound):
            store.stat(key)
    store.prepare("base")
    store.cleanup()
    assert len(list(store.driver.volumes())) == 1
    assert store.check() == []


@pytest.mark.parametrize("error", [OutOfSpace("full"), OSError(errno.EMFILE, "too many open files")])
def test_what_cannot_be_removed_later_is_tried_again(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    store = make_store("vfs")
    store.prepare("work")
    failing(monkeypatch, store, "remove", error)
    store.remove("work", wait=False)
    assert list(store.list()) == []
    store.cleanup()
    assert len(list(store.driver.volumes())) == 1
    assert "the layer 'work (removed" in caplog.text
    assert str(error) in caplog.text
    monkeypatch.undo()
    store.cleanup()
    assert list(store.driver.volumes()) == []
    assert store.check() == []


def test_removal_waits_for_what_was_removed_before(make_store: MakeStore) -> None:
    store = make_store("vfs")
    store.prepare("work")
    store.commit("base", "work", digest=False)
    store.prepare("child", "base")
    store.remove("child", wait=False)
    store.remove("base")
    assert list(store.driver.volumes()) == []


def test_a_parent_stays_as_long_as_a_child_that_cannot_be_removed(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store("vfs")
    committed(store, "base")
    store.prepare("child", "base")
    real = type(store.driver).remove

    def busy(driver: Driver, volume: str) -> None:
        if volume != first:
            assert both.wait(60)
            raise OutOfSpace("full")
        real(driver, volume)

    (first, _), both = sorted(store.driver.volumes()), threading.Event()
    monkeypatch.setattr(type(store.driver), "remove", busy)
    store.remove("child", wait=False)
    store.remove("base", wait=False)
    both.set()
    store.cleanup()
    assert len(list(store.driver.volumes())) == 2
    monkeypatch.undo()
    store.cleanup()
    assert list(store.driver.volumes()) == []


def test_closing_a_store_leaves_removals_that_have_not_begun_to_the_next_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store", "vfs")
    kind, real = type(store.driver), type(store.driver).remove
    begun, closing = threading.Event(), threading.Event()

    def slow(driver: Driver, volume: str) -> None:
        begun.set()
        assert closing.wait(60)
        real(driver, volume)

    end = ThreadPoolExecutor.shutdown

    def shutdown(pool: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False) -> None:
        end(pool, wait=False, cancel_futures=cancel_futures)
        closing.set()
        end(pool, wait)

    committed(store, "base")
    for number in range(5):
        store.prepare(f"work {number}", "base")
    monkeypatch.setattr(kind, "remove", slow)
    for number in range(5):
        store.remove(f"work {number}", wait=False)
    store.remove("base", wait=False)
    assert begun.wait(60)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    store.close()
    monkeypatch.undo()
    assert len(os.listdir(tmp_path / "store" / "data")) > 4
    with Store(tmp_path / "store", background=True) as store:
        assert keys(store) == []
        store.cleanup()
        assert list(store.driver.volumes()) == []
        assert store.check() == []


def test_a_server_does_not_wait_for_what_a_killed_one_was_removing(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path / "store", "vfs") as store:
        committed(store, "base")
        committed(store, "top", "base")
        store.prepare("other")
        with sqlite3.connect(store.root / "layerfs.db") as connection:  # as a killed process leaves it
            change = "UPDATE layers SET state = 'removing', owner = (SELECT max(number) FROM sessions) WHERE key = ?"
            connection.execute(change, ("top",))
        kind, real = type(store.driver), type(store.driver).remove
    going = threading.Event()

    def slow(driver: Driver, volume: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert going.wait(60)
        real(driver, volume)

    monkeypatch.setattr(kind, "remove", slow)
    store = make_store("vfs", background=True)
    try:
        assert len(list(store.driver.volumes())) == 3
        store.remove("other")  # which has nothing to do with it
        store.prepare("top", "base")  # its key is free
        store.remove("top")
        store.remove("base", wait=False)
    finally:
        going.set()
    store.cleanup()
    assert list(store.driver.volumes()) == []
    assert store.check() == []
