"""The store's semantics, which are those of containerd's snapshotter, on every driver that works here."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import layerfs
from layerfs import mount_table
from layerfs.backing import BackingSpec
from layerfs.database import Database
from layerfs.driver import Capability
from layerfs.errors import (
    AlreadyExists,
    BadLayer,
    EnvironmentUnfit,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfSpace,
)
from layerfs.layer import Kind
from layerfs.store import Store
from layerfs.testing.images import sha256, tar_of
from layerfs.testing.stores import committed, keys
from layerfs.testing.trees import read_tree

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root; see test_rootless.py")

MIB = 1 << 20
MakeStore = Callable[..., Store]

DRIVERS = ["overlay2", "btrfs", "vfs"]


@pytest.fixture(params=DRIVERS)
def store(request: pytest.FixtureRequest, make_store: MakeStore) -> Store:
    return make_store(request.param)


@pytest.fixture
def overlay(make_store: MakeStore) -> Store:
    """For what does not depend on the driver."""
    return make_store("overlay2")


# -- life ----------------------------------------------------------------------------------------------------------


def test_the_way_of_a_layer(store: Store) -> None:
    """containerd Basic: prepare, write, commit, child, view, remove."""
    shown = store.prepare("work", labels={"a": "1"})
    assert shown == store.mounts("work")
    assert store.stat("work").kind is Kind.ACTIVE
    with store.mounted("work") as root:
        (root / "file").write_bytes(b"one")
    layer = store.commit("base", "work", labels={"b": "2"})
    assert (layer.key, layer.kind, layer.parent, dict(layer.labels)) == ("base", Kind.COMMITTED, "", {"b": "2"})
    assert layer.diff_id == layer.chain_id
    assert layer.created == layer.updated
    with pytest.raises(NotFound):
        store.stat("work")
    store.prepare("child", "base")
    with store.mounted("child") as root:
        assert (root / "file").read_bytes() == b"one"
        (root / "file").write_bytes(b"two")
    assert all(mount.read_only for mount in store.view("look", "base"))
    with store.mounted("look") as root:
        assert (root / "file").read_bytes() == b"one"
        with pytest.raises(OSError, match="Read-only"):
            (root / "file").write_bytes(b"x")
    with pytest.raises(FailedPrecondition, match="remove"):
        store.remove("base")
    for key in ("look", "child", "base"):
        store.remove(key)
    assert keys(store) == []
    assert list(store.driver.volumes()) == []


def test_what_is_refused(overlay: Store) -> None:
    committed(overlay, "base")
    overlay.prepare("active", "base")
    overlay.view("view", "base")
    for key in ("base", "active", "view"):
        with pytest.raises(AlreadyExists):
            overlay.prepare(key)
        with pytest.raises(AlreadyExists):
            overlay.view(key, "base")
    for parent in ("active", "view"):
        with pytest.raises(InvalidArgument, match="committed"):
            overlay.prepare("new", parent)
    with pytest.raises(NotFound):
        overlay.prepare("new", "none")
    for key in ("base", "view"):
        with pytest.raises(FailedPrecondition):
            overlay.commit("new", key)
    with pytest.raises(AlreadyExists):
        overlay.commit("base", "active")
    with pytest.raises(NotFound):
        overlay.commit("new", "none")
    with pytest.raises(InvalidArgument, match="committed"):
        overlay.mounts("base")
    with pytest.raises(FailedPrecondition, match="committed"):
        overlay.mount("base")
    for call in (overlay.remove, overlay.stat, overlay.usage, overlay.mounts, overlay.mount):
        with pytest.raises(NotFound):
            call("none")
    with pytest.raises(InvalidArgument):
        overlay.prepare("")
    with pytest.raises(InvalidArgument):
        overlay.prepare("bad\udcff")
    assert sorted(keys(overlay)) == ["active", "base", "view"]


def test_keys_are_any_strings(overlay: Store) -> None:
    names = [
        "k8s.io/12/sha256:abc",
        "../../etc",
        " ",
        "a b:c",
        "ünï ☃",
        "new\nline",
        "'; DROP TABLE layers; --",
        "x" * 5000,
        "-",
    ]
    for name in names:
        overlay.prepare(name)
        with overlay.mounted(name) as root:
            (root / "file").touch()
    assert keys(overlay) == names
    for name in names:
        overlay.commit(f"{name}!", name)
        overlay.remove(f"{name}!")
    assert keys(overlay) == []


def test_keys_and_names_can_be_used_again(store: Store) -> None:
    for content in (b"one", b"two"):
        committed(store, "base", file=content)
        store.view("look", "base")
        with store.mounted("look") as root:
            assert (root / "file").read_bytes() == content
        store.remove("look")
        store.remove("base")


def test_an_empty_parent_makes_an_empty_view(store: Store) -> None:
    store.view("nothing")
    with store.mounted("nothing") as root:
        assert os.listdir(root) == []
    assert list(store.changes("nothing"))[1:] == []


def test_labels_and_times(overlay: Store) -> None:
    """containerd Update: field masks; what is immutable is refused."""
    overlay.prepare("work", labels={"a": "1", "b": "2"})
    before = overlay.stat("work")
    after = overlay.update("work", {"a": "x", "c.d/e": "3"}, "labels.a", "labels.b", "labels.c.d/e")
    assert dict(after.labels) == {"a": "x", "c.d/e": "3"}
    assert after.updated > before.updated
    assert after.created == before.created
    assert dict(overlay.update("work", {"n": "1"}).labels) == {"n": "1"}
    assert dict(overlay.update("work", {}, "labels").labels) == {}
    for path in ("parent", "name", "kind", "labels."):
        with pytest.raises(InvalidArgument):
            overlay.update("work", {}, path)
    with pytest.raises(NotFound):
        overlay.update("none", {})


def test_an_image_or_layer_with_a_middle_cannot_lose_it(overlay: Store) -> None:
    committed(overlay, "one")
    committed(overlay, "two", "one")
    overlay.prepare("three", "two")
    with pytest.raises(FailedPrecondition, match="'three'"):
        overlay.remove("two")


# -- mounts --------------------------------------------------------------------------------------------------------


def test_mounts_are_counted_and_go_with_the_last_user(store: Store, tmp_path: Path) -> None:
    store.prepare("work")
    place = store.mount("work")
    assert store.mount("work") == place
    target = tmp_path / "at"
    assert store.mount("work", target) == target
    (place / "file").touch()
    assert (target / "file").exists()
    with store.mounted("work") as again:
        assert again == place
    store.unmount("work")
    assert (target / "file").exists()
    store.unmount(target)
    assert not (target / "file").exists()
    assert (place / "file").exists()
    store.unmount(place)
    with pytest.raises(NotFound):
        store.unmount("work")
    assert not [point for point in mount_table.read() if point.target.is_relative_to(store.root / "mnt")]


def test_a_mount_outlives_the_store_object_and_another_can_take_it_down(make_store: MakeStore) -> None:
    store = make_store("overlay2")
    store.prepare("work")
    place = store.mount("work")
    store.close()
    (place / "file").touch()
    with Store(store.root) as again:
        again.unmount("work")
        assert not (place / "file").exists()
        assert [change.path for change in again.changes("work")] == [b"", b"file"]


def test_commit_and_remove_take_down_the_mounts_of_the_store_but_not_those_in_use(store: Store) -> None:
    store.prepare("work")
    place = store.mount("work")
    (place / "file").touch()
    with open(place / "file"), pytest.raises(FailedPrecondition, match=str(os.getpid())):
        store.remove("work")
    assert (place / "file").exists()
    store.commit("base", "work")
    store.prepare("child", "base")
    place = store.mount("child")
    store.remove("child")
    assert not [point for point in mount_table.read() if point.target.is_relative_to(store.root / "mnt")]


# -- contents ------------------------------------------------------------------------------------------------------

BASE = tar_of({"etc": None, "etc/a": b"one", "etc/b": b"two"})


def test_an_applied_archive_comes_back_byte_by_byte(store: Store) -> None:
    store.prepare("work")
    applied = store.apply("work", io.BytesIO(BASE))
    assert applied.diff_id == sha256(BASE)
    layer = store.commit("base", "work")
    assert layer.diff_id == sha256(BASE)
    out = io.BytesIO()
    assert store.diff("base", out).diff_id == sha256(BASE)
    assert out.getvalue() == BASE


def test_a_layer_that_was_written_to_after_an_apply_has_another_diff(store: Store) -> None:
    store.prepare("work")
    store.apply("work", io.BytesIO(BASE))
    with store.mounted("work") as root:
        (root / "more").touch()
    layer = store.commit("base", "work")
    assert layer.diff_id != sha256(BASE)
    assert store.check() == []
    out = io.BytesIO()
    assert store.diff("base", out).diff_id == layer.diff_id == sha256(out.getvalue())


@pytest.mark.parametrize("known", [True, False])
def test_who_asks_for_mounts_during_a_commit_does_not_take_its_diff_id_away(
    store: Store, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    store.prepare("work")
    store.apply("work", io.BytesIO(BASE))
    if not known:
        store.mounts("work")
    seal = store.driver.seal

    def asked(volume: str, parents: Sequence[str]) -> None:
        store.mounts("work")
        seal(volume, parents)

    monkeypatch.setattr(store.driver, "seal", asked)
    layer = store.commit("base", "work")
    assert layer.diff_id == store.diff("base", io.BytesIO()).diff_id != ""
    assert (layer.diff_id == sha256(BASE)) == known
    assert store.check() == []


def test_two_archives_in_one_layer_have_a_diff_of_their_own(store: Store) -> None:
    store.prepare("work")
    store.apply("work", io.BytesIO(BASE))
    more = tar_of({"etc/c": b"three"})
    assert store.apply("work", io.BytesIO(more)).diff_id == sha256(more)
    layer = store.commit("base", "work")
    assert layer.diff_id not in (sha256(BASE), sha256(more))
    assert {change.path for change in store.changes("base")} >= {b"etc/a", b"etc/c"}
    assert store.check() == []


class _Pipe(io.RawIOBase):
    """A stream that can be read once."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        return self._data.readinto(buffer)  # type: ignore[arg-type]


def test_archives_that_need_their_parents_are_applied_to_the_whole_tree(store: Store) -> None:
    """Links to lower files, paths through lower links, directories without entries: from files and from pipes."""
    base = tar_of(
        {"usr": None, "usr/lib": None, "usr/lib/x": b"x", "dir": None, "dir/f": b"f"}, links={"lib": "usr/lib"}
    )
    for number, make in enumerate((io.BytesIO, _Pipe)):
        top = tar_of({"lib/new": b"new", "dir/g": b"g"})
        store.prepare("base work")
        store.apply("base work", io.BytesIO(base))
        with store.mounted("base work") as root:
            (root / "dir").chmod(0o750)
            os.utime(root / "dir", ns=(5, 5))
        store.commit(f"base{number}", "base work", digest=False)
        store.prepare("work", f"base{number}")
        store.apply("work", make(top))
        with store.mounted("work") as root:
            assert (root / "usr/lib/new").read_bytes() == b"new"
            assert (root / "lib").is_symlink()
            assert (root / "dir").stat().st_mode & 0o777 == 0o750
            assert sorted(os.listdir(root / "dir")) == ["f", "g"]
        store.remove("work")


def _changed_by_hand(root: Path) -> None:
    """Deletions, directories made again, files and links in the place of directories, and a new root."""
    (root / "etc/a").unlink()
    for name in ("again", "file", "link"):
        shutil.rmtree(root / name)
    (root / "again").mkdir()
    (root / "again/new").touch()
    (root / "file").write_text("a file now")
    (root / "link").symlink_to("etc")
    (root / "kept").rename(root / "etc/moved")
    root.chmod(0o711)


@pytest.mark.parametrize("driver", ["overlay2", "aufs", "btrfs"])
@pytest.mark.parametrize(
    "archive",
    [
        tar_of({"etc": None, "etc/a": b"again", "etc/.wh.b": b""}),
        tar_of({"etc/c": b"one more"}),
        tar_of({"again": None, "again/.wh..wh..opq": b"", "again/x": b"x"}),
        tar_of({"again/.wh.new": b"", "again/y": b"y", ".wh.kept": b""}),
        tar_of({"file": None, "file/x": b"x", "link/y": b"y"}),
        tar_of({"kept": b"k", "etc/.wh.moved": b"", "link": None, "link/z": b"z"}),
        tar_of({".wh.again": b"", ".wh.file": b"", ".wh.link": b""}),
        tar_of({"again/a": b"", ".wh..wh..opq": b""}),
    ],
)
def test_an_archive_goes_on_top_of_what_was_changed_in_a_layer(
    make_store: MakeStore, driver: str, archive: bytes
) -> None:
    members: dict[str, bytes | None] = {"etc": None, "etc/a": b"a", "etc/b": b"b", "kept": b"kept"}
    for name in ("again", "file", "link"):
        members |= {name: None, f"{name}/x": b"old", f"{name}/y": b"old"}
    trees = []
    for number, name in enumerate((driver, "vfs")):
        store = make_store(name, f"store {number}")
        store.prepare("base work")
        store.apply("base work", io.BytesIO(tar_of(members)))
        store.commit("base", "base work")
        store.prepare("work", "base")
        with store.mounted("work") as root:
            _changed_by_hand(root)
        store.apply("work", io.BytesIO(archive))
        changes = {(change.kind, change.path) for change in store.changes("work")}
        store.commit("top", "work")
        assert store.check() == []
        store.view("look", "top")
        with store.mounted("look") as root:
            trees.append((read_tree(root, times=False), changes))
    assert trees[0] == trees[1]


def test_a_bad_archive_leaves_the_layer_as_it_was(store: Store) -> None:
    store.prepare("work")
    store.apply("work", io.BytesIO(BASE))
    before = list(store.changes("work"))
    volumes = set(store.driver.volumes())
    for data in (BASE[:1600], tar_of({"fine": b"x", "../evil": b"x"}), b"nonsense" * 1000):
        with pytest.raises(BadLayer):
            store.apply("work", io.BytesIO(data))
        assert list(store.changes("work")) == before
    assert set(store.driver.volumes()) == volumes
    assert store.commit("base", "work").diff_id == sha256(BASE)


def test_apply_and_diff_refuse_what_is_mounted_committed_or_busy(overlay: Store) -> None:
    committed(overlay, "base")
    with pytest.raises(FailedPrecondition, match="committed"):
        overlay.apply("base", io.BytesIO(BASE))
    overlay.prepare("work", "base")
    with overlay.mounted("work"), pytest.raises(FailedPrecondition, match="mounted"):
        overlay.apply("work", io.BytesIO(BASE))
    read, write = os.pipe()
    with open(read, "rb") as stream, open(write, "wb") as feed:
        feed.write(BASE[:1000])
        feed.flush()
        thread = threading.Thread(target=overlay.apply, args=("work", stream))
        thread.start()
        try:
            while overlay._database.find("work").state == "ready":  # type: ignore[union-attr]
                pass
            for call in (
                overlay.remove,
                overlay.mount,
                lambda key: overlay.commit("new", key),
                lambda key: list(overlay.changes(key)),
            ):
                with pytest.raises(FailedPrecondition, match=str(os.getpid())):
                    call("work")
        finally:
            feed.write(BASE[1000:])
            feed.close()
            thread.join()
    assert {change.path for change in overlay.changes("work")} >= {b"etc/a"}


def test_usage_is_what_the_layer_adds(store: Store) -> None:
    committed(store, "base", big=os.urandom(4 * MIB))
    assert store.usage("base").size >= 4 * MIB
    assert store.usage("base") == store.usage("base")
    store.view("look", "base")
    assert store.usage("look").size == 0


# -- several users -------------------------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
from layerfs.store import Store
who = sys.argv[2]
with Store(Path(sys.argv[1])) as store:
    for number in range(12):
        store.prepare(f"{who}-{number}", "base")
        with store.mounted(f"{who}-{number}") as root:
            (root / who).write_text(str(number))
        if number % 2:
            store.commit(f"{who}-{number}-done", f"{who}-{number}")
        else:
            store.remove(f"{who}-{number}")
"""


def test_several_processes_use_one_store_at_once(store: Store) -> None:
    committed(store, "base", file=b"x")
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, store.root, f"w{n}"]) for n in range(3)]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    assert len(keys(store)) == 1 + 3 * 6
    assert store.check() == []


def test_several_threads_use_one_store_object(overlay: Store) -> None:
    committed(overlay, "base", file=b"x")
    errors: list[BaseException] = []

    def work(who: int) -> None:
        try:
            for number in range(10):
                key = f"{who}-{number}"
                overlay.prepare(key, "base")
                with overlay.mounted(key) as root:
                    (root / "f").write_text(key)
                overlay.commit(f"{key} done", key)
                overlay.remove(f"{key} done")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert keys(overlay) == ["base"]


def test_only_one_of_many_gets_a_key(overlay: Store) -> None:
    won: list[int] = []
    lost: list[int] = []

    def work(who: int) -> None:
        try:
            overlay.prepare("same")
            won.append(who)
        except AlreadyExists:
            lost.append(who)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)


# -- opening -------------------------------------------------------------------------------------------------------


def test_a_store_remembers_what_it_is(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store("overlay2", options={"metacopy": "on"})
    assert store.root.stat().st_mode & 0o777 == 0o700
    store.close()
    store.close()
    with Store(store.root) as again:
        assert (again.driver.name, again.driver.options) == ("overlay2", {"metacopy": "on"})
    with pytest.raises(InvalidArgument, match="overlay2"):
        Store(store.root, "vfs")
    with pytest.raises(NotFound, match="layerfs init"):
        Store(tmp_path / "none", create=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(InvalidArgument, match="neither empty nor a store"):
        Store(tmp_path / "full")
    assert (tmp_path / "full/file").exists()


def test_what_cannot_be_made_leaves_no_store(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with pytest.raises(InvalidArgument, match="overlay3"):
        Store(root, "overlay3")
    assert not root.exists()
    with pytest.raises(InvalidArgument, match="no options"):
        Store(root, "vfs", options={"a": "b"})
    with pytest.raises(NotFound, match="layerfs init"):
        Store(root, create=False)
    assert os.listdir(root) == ["lock"]
    Database(root / "layerfs.db").close()  # as a process that was killed leaves it
    with pytest.raises(NotFound, match="layerfs init"):
        Store(root, create=False)
    with Store(root, "vfs") as store:
        assert store.driver.name == "vfs"


@pytest.mark.parametrize(("driver", "filesystem"), [("overlay2", "ext4"), ("btrfs", "btrfs"), ("vfs", "xfs")])
def test_a_size_limit_is_kept_and_said(make_store: MakeStore, driver: str, filesystem: str) -> None:
    store = make_store(driver, backing=BackingSpec(filesystem, size=600 * MIB))
    if Capability.SIZE_LIMIT not in store.driver.capabilities:
        pytest.skip(f"this kernel has no project quota for {filesystem}")
    store.prepare("work", size=40 * MIB)
    assert store.stat("work").size_limit == 40 * MIB
    with store.mounted("work") as root, pytest.raises(OSError, match=r"quota|space"):
        _fill(root / "big", 60)
    with pytest.raises(OutOfSpace):
        store.apply("work", io.BytesIO(tar_of({"big": os.urandom(60 * MIB)})))
    with pytest.raises(InvalidArgument):
        store.prepare("none", size=0)


def _fill(path: Path, mebibytes: int) -> None:
    with open(path, "wb", buffering=0) as file:
        file.writelines(os.urandom(MIB) for _ in range(mebibytes))
        os.fsync(file.fileno())


def test_a_size_limit_where_there_is_none_is_refused(make_store: MakeStore) -> None:
    store = make_store("vfs", backing=BackingSpec("ext4", size=256 * MIB))
    with pytest.raises(EnvironmentUnfit, match="vfs"):
        store.prepare("work", size=40 * MIB)
    assert keys(store) == []


def test_the_backing_goes_down_with_the_last_session_and_up_with_the_next(make_store: MakeStore) -> None:
    store = make_store("btrfs")
    committed(store, "base", file=b"x")
    other = Store(store.root)
    store.close()
    assert other.space().free > 0
    other.close()
    assert not [point for point in mount_table.read() if point.target.is_relative_to(store.root)]
    with Store(store.root) as again:
        assert keys(again) == ["base"]


def test_everything_that_is_public_can_be_imported() -> None:
    for name in layerfs.__all__:
        assert getattr(layerfs, name).__name__ == name


@pytest.fixture(autouse=True)
def _nothing_stays_mounted(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [
        point for point in mount_table.read() if point.target.is_relative_to(tmp_path) and point.type == "overlay"
    ]
