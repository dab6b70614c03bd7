"""When data of committed layers is written out, and layers that a crash of the machine leaves in doubt."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layerfs import settling
from layerfs.backing import Backing, BackingSpec
from layerfs.errors import Damaged, LayerfsError
from layerfs.settling import Settling, Sync
from layerfs.store import Store
from layerfs.testing.engines import wait_until
from layerfs.testing.images import MadeImage, MadeLayout, tar_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MakeStore = Callable[..., Store]


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The roots of the stores whose data was written out, one for each time."""
    seen: list[Path] = []
    real = Settling.sync

    def sync(self: Settling) -> None:
        real(self)
        seen.append(self._session.root)

    monkeypatch.setattr(Settling, "sync", sync)
    return seen


@pytest.fixture
def filler(tmp_path: Path) -> Iterator[Path]:
    """A file that, where it is there, takes all space from below the data of the store ``tmp_path / "store"``.

    Nothing says so but writing out, which fails then.
    """
    Store(tmp_path / "store", "vfs").close()
    below, data = tmp_path / "below", tmp_path / "store" / "data"
    below.mkdir()
    with contextlib.ExitStack() as stack:
        run("mount", "-t", "tmpfs", "-o", "size=24M", "tmpfs", below)
        stack.callback(run, "umount", "--lazy", below)  # another's mount namespace may hold a copy of the one in it
        with open(below / "image", "wb") as image:
            image.truncate(64 << 20)
        run("mkfs.ext4", "-q", "-O", "^has_journal", below / "image")
        run("mount", "-o", "loop", below / "image", data)
        stack.callback(run, "umount", data)
        (data / "lost+found").rmdir()
        run("sync", "-f", data)
        yield below / "filler"


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def fill(filler: Path) -> None:
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))


def filled(store: Store, name: str, *, digest: bool = False) -> None:
    store.prepare("work")
    with store.mounted("work") as root:
        (root / "file").write_text("content" * 10_000)
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


def test_no_image_is_imported_onto_a_layer_in_doubt(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store("vfs")
    tars = [tar_of({"a": b"a"}), tar_of({"b": b"b"})]
    for number in (1, 2):
        MadeLayout(tmp_path / f"{number}").add(MadeImage(tars[:number]), f"v{number}")
    store.images.import_(tmp_path / "1")
    crash(store)
    with pytest.raises(Damaged, match=r"just before the machine went down.*layerfs check"):
        store.images.import_(tmp_path / "2")
    assert [image.name for image in store.images.list()] == ["v1"]
    assert store.check() == []
    store.images.import_(tmp_path / "2")


def test_a_diff_id_does_not_stand_in_for_the_writing_out(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "_PAUSE", 3600)
    store = make_store("vfs", sync=Sync.LATER)
    filled(store, "base", digest=True)
    before = marks(store)
    assert store.check() == []
    assert marks(store) == before != []


def test_what_could_not_be_written_out_is_not_verified_from_memory(filler: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "store", sync=Sync.LATER) as store:
        fill(filler)
        filled(store, "base", digest=True)
        wait_until(lambda: [boot for _, boot in marks(store)] == [""], "writing out fails")
        filler.unlink()
        assert [finding.name for finding in store.check(repair=True)] == ["base"]
        with pytest.raises(Damaged, match="writing it out failed"):
            store.prepare("next", "base")


def test_a_store_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    with Store(tmp_path / "old", "vfs") as store:
        filled(store, "base")
    with sqlite3.connect(tmp_path / "old" / "layerfs.db") as connection:
        connection.execute("DROP TABLE unsettled")
        connection.execute("PRAGMA user_version = 1")
    with Store(tmp_path / "old") as store:
        store.prepare("child", "base")
        assert store.commit("top", "child").parent == "base"


def test_what_could_not_be_written_out_is_in_doubt_though_the_next_time_goes_well(
    filler: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(tmp_path / "store", sync=Sync.LATER) as store:
        fill(filler)
        filled(store, "base")
        wait_until(lambda: "are not written out yet" in caplog.text, "writing out fails")
        assert "files of the layer 'base' may be incomplete" in caplog.text
        filler.unlink()
        filled(store, "other")
        wait_until(lambda: len(marks(store)) == 1, "the other layer is written out")
        store.prepare("child", "other")
        with pytest.raises(Damaged, match="writing it out failed"):
            store.prepare("next", "base")


def test_a_commit_that_could_not_be_written_out_is_in_doubt_when_it_is_finished(filler: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        fill(filler)
        with pytest.raises(LayerfsError, match="writing out the data"):
            filled(store, "base")
        filler.unlink()
        assert store.cleanup() == ["finished the commit of the layer 'work' to 'base'"]
        with pytest.raises(Damaged, match="writing it out failed"):
            store.prepare("next", "base")


def test_data_that_cannot_be_opened_is_not_in_doubt_and_written_out_another_time(
    make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store("vfs", sync=Sync.LATER)
    filled(store, "base")
    data, away = store.root / "data", store.root / "away"
    data.rename(away)  # as where there are no more descriptors
    try:
        wait_until(lambda: "are not written out yet" in caplog.text, "writing out fails")
    finally:
        away.rename(data)
    filled(store, "other")
    wait_until(lambda: not marks(store), "the data is written out")


@pytest.mark.parametrize("inner", [None, BackingSpec("ext4", size=64 << 20)])
def test_a_commit_that_has_returned_outlasts_a_crash(tmp_path: Path, inner: BackingSpec | None) -> None:
    """What the device below a file system holds at that moment is what a crash leaves."""
    disk = Backing.create(tmp_path / "disk", BackingSpec("ext4", size=200 << 20))
    disk.up()
    try:
        with Store(disk.path / "store", "vfs", backing=inner) as store:
            filled(store, "base")
            shutil.copytree(tmp_path / "disk", tmp_path / "copy", ignore=shutil.ignore_patterns("data"))
        after = Backing(tmp_path / "copy")
        after.up()
        try:
            with contextlib.closing(sqlite3.connect(after.path / "store" / "layerfs.db")) as connection:
                assert connection.execute("SELECT key, state FROM layers").fetchall() == [("base", "ready")]
                assert connection.execute("SELECT * FROM unsettled").fetchall() == []
        finally:
            after.destroy()
    finally:
        disk.destroy()
