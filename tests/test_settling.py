"""When data of committed layers is written out, and layers that a crash of the machine leaves in doubt."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from layerfs.errors import Damaged
from layerfs.session import Session
from layerfs.settling import Sync
from layerfs.store import Store
from layerfs.testing.engines import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MakeStore = Callable[..., Store]


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The roots of the stores whose data was written out, one for each time."""
    seen: list[Path] = []
    real = Session.sync

    def sync(self: Session) -> None:
        real(self)
        seen.append(self.root)

    monkeypatch.setattr(Session, "sync", sync)
    return seen


def filled(store: Store, name: str, *, digest: bool = False) -> None:
    store.prepare("work")
    with store.mounted("work") as root:
        (root / "file").write_text("content")
    store.commit(name, "work", digest=digest)


def marks(store: Store) -> list[tuple[int, str]]:
    with sqlite3.connect(store.root / "layerfs.db") as connection:
        return connection.execute("SELECT * FROM unsettled").fetchall()


def crash(store: Store) -> None:
    """What a crash of the machine leaves: the mark of the newest layer, of a boot that is over."""
    with sqlite3.connect(store.root / "layerfs.db") as connection:
        connection.execute("INSERT OR REPLACE INTO unsettled SELECT max(number), 'an earlier boot' FROM layers")


def test_data_is_written_out_before_a_commit_returns(make_store: MakeStore, syncs: list[Path]) -> None:
    store = make_store("vfs")
    filled(store, "base")
    assert len(syncs) == 1
    assert marks(store) == []


def test_data_is_written_out_a_moment_later_for_many_commits_at_once(make_store: MakeStore, syncs: list[Path]) -> None:
    store = make_store("vfs", sync=Sync.LATER)
    for number in range(5):
        filled(store, f"base {number}")
    assert len(syncs) < 5
    wait_until(lambda: not marks(store), "the data is written out")
    assert len(syncs) < 5


def test_closing_a_store_writes_out_what_is_left(syncs: list[Path], tmp_path: Path) -> None:
    with Store(tmp_path / "other", "vfs", sync=Sync.LATER) as store:
        filled(store, "base")
    assert syncs
    assert marks(store) == []


def test_a_killed_process_leaves_no_doubt_in_the_same_boot(make_store: MakeStore, tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        store = Store(tmp_path / "store", "vfs", sync=Sync.LATER)
        filled(store, "base")
        os._exit(0)
    os.waitpid(pid, 0)
    store = make_store("vfs")
    assert marks(store) == []
    store.prepare("child", "base")


def test_a_layer_in_doubt_is_no_parent_until_it_is_accepted(make_store: MakeStore) -> None:
    store = make_store("vfs")
    filled(store, "base")
    crash(store)
    with pytest.raises(Damaged, match="just before the machine went down"):
        store.prepare("child", "base")
    (finding,) = store.check()
    assert (finding.kind, finding.name, finding.repairable) == ("damaged", "base", True)
    (finding,) = store.check(repair=True)
    assert finding.repaired
    assert store.check() == []
    store.prepare("child", "base")


def test_a_diff_id_takes_the_doubt_away(make_store: MakeStore) -> None:
    store = make_store("vfs")
    filled(store, "base", digest=True)
    crash(store)
    assert store.check() == []
    store.prepare("child", "base")


def test_a_diff_id_shows_what_was_lost(make_store: MakeStore) -> None:
    store = make_store("vfs")
    filled(store, "base", digest=True)
    crash(store)
    (file,) = (store.root / "data").rglob("file")
    file.write_text("")
    findings = store.check(repair=True)
    assert [finding.repaired for finding in findings] == [False]
    with pytest.raises(Damaged):
        store.prepare("child", "base")


def test_a_store_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    with Store(tmp_path / "old", "vfs") as store:
        filled(store, "base")
    with sqlite3.connect(tmp_path / "old" / "layerfs.db") as connection:
        connection.execute("DROP TABLE unsettled")
        connection.execute("PRAGMA user_version = 1")
    with Store(tmp_path / "old") as store:
        store.prepare("child", "base")
        assert store.commit("top", "child").parent == "base"
