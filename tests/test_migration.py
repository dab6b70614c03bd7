"""A store on another driver: everything comes along, is verified, and goes on after an interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from layerfs.errors import AlreadyExists, Damaged, InvalidArgument
from layerfs.layer import Kind
from layerfs.migration import migrate
from layerfs.store import Store
from layerfs.testing.engines import program
from layerfs.testing.images import MadeImage, MadeLayout, tar_of
from layerfs.testing.trees import Tree, read_tree

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MakeStore = Callable[..., Store]
ROUTE = ["overlay2", "btrfs", "vfs", "aufs", "overlay2"]


def filled(store: Store, tmp_path: Path) -> None:
    layout = MadeLayout(tmp_path / "image")
    base = tar_of({"etc": None, "etc/a": b"one", "etc/gone": b"x" * 9000, "opt": None, "opt/old": b"old"})
    layout.add(MadeImage([base, tar_of({"etc/.wh.gone": b"", "etc/b": b"two"})], ["zstd", "none"]), "an image")
    store.images.import_(layout.path)
    store.prepare("work", "an image", labels={"of": "work"})
    with store.mounted("work") as root:
        (root / "etc/a").unlink()
        (root / "new").mkdir()
        (root / "new/file").write_bytes(os.urandom(70_000))
        os.link(root / "new/file", root / "new/link")
        os.mknod(root / "device", 0o600 | 0o060000, os.makedev(7, 9))
    store.commit("mine", "work", labels={"k/ey": "v"})
    store.prepare("unmeasured work", "mine")
    store.commit("unmeasured", "unmeasured work", digest=False)
    store.prepare("a container", "mine", labels={"name": "web"})
    with store.mounted("a container") as root:
        (root / "etc/b").write_bytes(b"changed")
        (root / "opt/old").unlink()
    store.prepare("fresh", "unmeasured")
    store.view("look", "mine", labels={"x": "y"})


def picture(store: Store) -> tuple[dict[str, object], dict[str, Tree], object]:
    """What has to be the same in a copy; committed layers that were not measured may be measured there."""
    facts: dict[str, object] = {}
    trees: dict[str, Tree] = {}
    for layer in store.list():
        diff = layer.diff_id if layer.kind is Kind.COMMITTED and layer.key != "unmeasured" else ""
        facts[layer.key] = (layer.kind, layer.parent, dict(layer.labels), diff)
        with store._mounting.opened(store._session.visible(layer.key)) as tree:
            trees[layer.key] = read_tree(tree)
    return facts, trees, [(image.name, image.digest, image.layers) for image in store.images.list()]


def test_a_store_goes_round_all_drivers(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(ROUTE[0], "0")
    filled(store, tmp_path)
    expected = picture(store)
    for number, driver in enumerate(ROUTE[1:], 1):
        following = make_store(driver, str(number))
        told: list[tuple[int, int, str]] = []
        migrate(store, following, lambda *values, told=told: told.append(values))
        assert picture(following) == expected, driver
        assert told[0][:2] == (0, 7)
        migrate(store, following)
        assert picture(following) == expected
        assert following.check() == []
        store = following


def test_layers_whose_image_is_still_to_come_are_no_garbage(make_store: MakeStore, tmp_path: Path) -> None:
    one, two = make_store("overlay2", "one"), make_store("vfs", "two")
    filled(one, tmp_path)
    done: list[str] = []
    collecting = threading.Thread(target=lambda: done.extend(make_store("vfs", "two").collect_garbage()))

    def progress(number: int, _total: int, _key: str) -> None:
        if number == 2:  # the layers of the image are there
            collecting.start()
            collecting.join(2)

    migrate(one, two, progress)
    collecting.join()
    assert done == []
    assert picture(two) == picture(one)


def test_another_layer_of_the_name_and_damage_are_refused(make_store: MakeStore, tmp_path: Path) -> None:
    one, two = make_store("overlay2", "one"), make_store("vfs", "two")
    filled(one, tmp_path)
    two.prepare("mine")
    with pytest.raises(AlreadyExists, match="mine"):
        migrate(one, two)
    two.remove("mine")
    (file,) = [path for path in (one.root / "data").rglob("new/file") if path.stat().st_size == 70_000]
    file.write_bytes(bytes(70_000))
    with pytest.raises(Damaged, match="mine"):
        migrate(one, two)
    assert "mine" not in [layer.key for layer in two.list()]


def test_a_store_is_not_copied_into_itself(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store("vfs", "one")
    store.prepare("work", labels={"k": "v"})
    with pytest.raises(InvalidArgument, match="itself"):
        migrate(store, store)
    before = picture(store)
    (tmp_path / "link").symlink_to("one")
    (tmp_path / "bound").mkdir()
    subprocess.run(["mount", "--bind", store.root, tmp_path / "bound"], check=True)
    try:
        for name in ("one", "one/../one", "link", "bound"):
            for driver in ("vfs", "overlay2"):
                command = [*program(), "migrate", "--root", str(store.root), "--to", driver, str(tmp_path / name)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert (done.returncode, "itself" in done.stderr) == (2, True), (name, done.stderr)
    finally:
        subprocess.run(["umount", tmp_path / "bound"], check=True)
    assert picture(store) == before


def test_after_a_kill_it_goes_on(make_store: MakeStore, tmp_path: Path) -> None:
    one = make_store("overlay2", "one")
    filled(one, tmp_path)
    for number in range(12):
        one.prepare(f"more {number}", "mine")
        with one.mounted(f"more {number}") as root:
            (root / "file").write_bytes(os.urandom(300_000))
        if number % 2:
            one.commit(f"done {number}", f"more {number}")
    expected = picture(one)
    command = [
        sys.executable,
        "-m",
        "layerfs.cli",
        "migrate",
        "--root",
        str(one.root),
        "--to",
        "vfs",
        str(tmp_path / "two"),
    ]
    kills = 0
    for delay in (0.2, 0.3, 0.4, 0.5, 0.7, 1.0):  # a quick machine is done in less than half a second
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    assert kills
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert picture(make_store("vfs", "two")) == expected
