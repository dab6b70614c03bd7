"""`check` finds what is wrong, says what it is, and repairs what can be repaired; `gc` takes away what is left over."""

from __future__ import annotations

import io
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from layerfs import mount_table
from layerfs.check import Finding
from layerfs.errors import LayerfsError, NotFound
from layerfs.store import Store
from layerfs.testing.images import MadeImage, MadeLayout, tar_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MakeStore = Callable[..., Store]
DRIVERS = ["overlay2", "btrfs", "vfs"]
TAR = tar_of({"etc": None, "etc/a": b"one" * 50_000, "etc/b": b"two"}, links={"etc/link": "a"})


@pytest.fixture(params=DRIVERS)
def store(request: pytest.FixtureRequest, make_store: MakeStore) -> Store:
    return make_store(request.param)


def tree_of(store: Store, key: str) -> Path:
    """Where the files of a layer without a parent lie, writable behind the store's back."""
    volume, parents = store._session.volumes(store._session.visible(key))
    (mount,) = store.driver.mounts(volume, parents, read_only=True)
    return Path(mount.source)


def unlocked(place: Path) -> None:
    """Make a read-only subvolume writable."""
    if any(point.type == "btrfs" and place.is_relative_to(point.target) for point in mount_table.read()):
        from layerfs.kernel import btrfs

        fd = os.open(place, os.O_RDONLY)
        btrfs.set_read_only(fd, False)
        os.close(fd)


def keeping_times(place: Path, action: Callable[[], object]) -> None:
    times = {path: path.lstat() for path in (place, place.parent)}
    action()
    for path, info in times.items():
        if os.path.lexists(path):
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def relink(link: Path) -> None:
    link.unlink()
    link.symlink_to("b")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "content": lambda root: keeping_times(root / "etc/b", lambda: (root / "etc/b").write_bytes(b"TWO")),
    "one bit": lambda root: keeping_times(root / "etc/a", lambda: flip(root / "etc/a")),
    "mode": lambda root: (root / "etc/b").chmod(0o777),
    "owner": lambda root: os.chown(root / "etc/b", 1, 1),
    "time": lambda root: os.utime(root / "etc/b", (1, 1)),
    "attribute": lambda root: os.setxattr(root / "etc/b", "user.x", b"y"),
    "link": lambda root: keeping_times(root / "etc/link", lambda: relink(root / "etc/link")),
    "more": lambda root: keeping_times(root / "etc", (root / "etc/new").touch),
    "less": lambda root: keeping_times(root / "etc", (root / "etc/link").unlink),
}


def flip(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(70_000)
        byte = file.read(1)[0]
        file.seek(70_000)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("how", ["archive", "diff"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_a_committed_layer_is_found(store: Store, damage: str, how: str) -> None:
    store.prepare("work")
    store.apply("work", io.BytesIO(TAR))
    if how == "diff":
        with store.mounted("work") as root:
            (root / "own").touch()
    store.commit("base", "work")
    store.prepare("child", "base")
    assert store.check() == []
    root = tree_of(store, "base")
    unlocked(root)
    DAMAGES[damage](root)
    damaged = [finding for finding in store.check() if finding.kind == "damaged" and "read-only" not in finding.what]
    assert [(finding.name, finding.repairable) for finding in damaged] == [("base", False)]
    if damage in ("content", "one bit"):
        assert {"content": "'etc/b'", "one bit": "'etc/a'"}[damage] in damaged[0].what
    assert any(finding.name == "base" for finding in store.check(repair=True))


def test_a_missing_volume_is_found(store: Store) -> None:
    store.prepare("work")
    store.commit("base", "work")
    volume = store._session.volumes(store._session.visible("base"))[0]
    store.driver.remove(volume)
    (finding,) = store.check(repair=True)
    assert (finding.kind, finding.name, finding.repairable, finding.repaired) == ("damaged", "base", False, False)
    assert "missing" in finding.what


def test_volumes_and_records_of_nobody_are_found_and_taken_away(store: Store) -> None:
    store.prepare("work")
    store.driver.create("zz", ())
    (store.root / "records" / "yy").write_bytes(b"x")
    found = store.check()
    assert {(finding.kind, finding.name, finding.repaired) for finding in found} == {
        ("orphaned", "zz", False),
        ("orphaned", "yy", False),
    }
    assert all(finding.repaired for finding in store.check(repair=True))
    assert store.check() == []
    store.driver.create("zz", ())
    assert len(store.collect_garbage()) == 1
    assert store.check() == []
    assert [layer.key for layer in store.list()] == ["work"]


def test_what_failed_half_way_is_finished_or_undone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise LayerfsError("the disk said no")

    for key in ("to commit", "to remove"):
        store.prepare(key)
    monkeypatch.setattr(type(store.driver), "seal", broken)
    with pytest.raises(LayerfsError, match="said no"):
        store.commit("base", "to commit")
    monkeypatch.undo()
    monkeypatch.setattr(type(store.driver), "remove", broken)
    with pytest.raises(LayerfsError, match="said no"):
        store.remove("to remove")
    monkeypatch.undo()
    found = store.check()
    assert {(finding.kind, finding.name) for finding in found} == {
        ("half-made", "to commit"),
        ("half-made", "to remove"),
    }
    assert all(finding.repairable for finding in found)
    repaired = store.check(repair=True)
    assert sum(finding.repaired for finding in repaired) == 2
    assert store.check() == []
    assert store.stat("base").key == "base"
    with pytest.raises(NotFound):
        store.stat("to remove")


def test_an_image_that_lacks_a_layer_is_found(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store("overlay2")
    layout = MadeLayout(tmp_path / "image")
    layout.add(MadeImage([TAR]), "v1")
    (image,) = store.images.import_(layout.path)
    assert store.check() == []
    (store.root / "blobs/sha256" / image.config_digest[7:]).write_bytes(b"{}")
    (finding,) = store.check()
    assert (finding.kind, finding.name) == ("image", "v1")
    store.images.import_(layout.path)
    with sqlite3.connect(store.root / "layerfs.db") as database:
        database.execute("UPDATE layers SET key = 'elsewhere'")
    database.close()
    (finding,) = store.check()
    assert isinstance(finding, Finding)
    assert "lacks the layer" in finding.what


def test_progress_is_told(make_store: MakeStore) -> None:
    store = make_store("vfs")
    for number in range(3):
        store.prepare(str(number))
    told: list[tuple[int, int, str]] = []
    store.check(progress=lambda *values: told.append(values))
    assert told == [(0, 3, "0"), (1, 3, "1"), (2, 3, "2"), (3, 3, "")]
