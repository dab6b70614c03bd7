"""A store whose processes are killed at random points: opened again it is sound, and nothing stays behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from layerfs import mount_table
from layerfs.kernel import loop
from layerfs.layer import Kind
from layerfs.store import Store
from layerfs.testing.images import MadeImage, MadeLayout, tar_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MakeStore = Callable[..., Store]

# Works on a store until it is killed: one line on the standard output before each operation.
WORKER = """
import io, os, random, sys
from pathlib import Path
from layerfs.errors import LayerfsError
from layerfs.layer import Kind
from layerfs.store import Store
from layerfs.testing.images import tar_of

root, image, seed = sys.argv[1:]
dice = random.Random(seed)

def step(store):
    layers = list(store.list())
    committed = [layer.key for layer in layers if layer.kind is Kind.COMMITTED]
    active = [layer.key for layer in layers if layer.kind is Kind.ACTIVE]
    match dice.choice(["prepare", "prepare", "view", "write", "write", "apply", "commit", "commit", "remove", "diff",
                       "mount", "unmount", "import", "untag", "gc"]):
        case "prepare" if len(layers) < 25:
            store.prepare(f"k{dice.random()}", dice.choice(["", *committed]))
        case "view" if committed:
            store.view(f"v{dice.random()}", dice.choice(committed))
        case "write" if active:
            with store.mounted(dice.choice(active)) as tree:
                (tree / f"f{dice.randrange(9)}").write_bytes(dice.randbytes(dice.randrange(90_000)))
                (tree / f"f{dice.randrange(9)}").unlink(missing_ok=True)
        case "apply" if active:
            store.apply(dice.choice(active), io.BytesIO(tar_of({f"a{n}": dice.randbytes(3000) for n in range(60)})))
        case "commit" if active:
            store.commit(f"c{dice.random()}", dice.choice(active), digest=dice.random() < 0.8)
        case "remove" if layers:
            store.remove(dice.choice(layers).key)
        case "diff" if layers:
            store.diff(dice.choice(layers).key, io.BytesIO())
        case "mount" if active:
            store.mount(dice.choice(active))
        case "unmount" if active:
            store.unmount(dice.choice(active))
        case "import":
            store.images.import_(Path(image))
        case "untag":
            for found in store.images.list():
                store.images.remove(found.name)
        case "gc":
            store.collect_garbage()

while True:
    with Store(Path(root)) as store:
        for _ in range(dice.randrange(1, 40)):
            print(".", end="", flush=True)
            try:
                step(store)
            except LayerfsError:
                pass
"""


@pytest.mark.parametrize("driver", ["overlay2", "btrfs", "vfs"])
def test_killed_at_random_points_it_is_sound_when_opened_again(
    make_store: MakeStore, tmp_path: Path, driver: str
) -> None:
    store = make_store(driver)
    root = store.root
    store.prepare("first")
    store.commit("base", "first")
    store.close()
    layout = MadeLayout(tmp_path / "image")
    layout.add(MadeImage([tar_of({f"d{n}/{m}": bytes(200) for m in range(80)}) for n in range(3)]), "image")
    dice = random.Random(driver)
    operations = 0
    for round_ in range(14):
        with subprocess.Popen(
            [sys.executable, "-c", WORKER, root, layout.path, f"{driver}{round_}"], stdout=subprocess.PIPE
        ) as worker:
            assert worker.stdout is not None
            worker.stdout.read(1)
            time.sleep(dice.expovariate(1 / 0.4))
            worker.send_signal(signal.SIGKILL)
            operations += 1 + len(worker.stdout.read())
        if round_ % 3 == 2:
            with Store(root) as store:
                assert store.check() == [], f"after round {round_}"
                for layer in store.list(f"kind=={Kind.ACTIVE}"):
                    with store.mounted(layer.key) as tree:
                        list(tree.rglob("*"))
    with Store(root) as store:
        assert store.check() == []
        for image in store.images.list():
            store.images.remove(image.name)
        store.collect_garbage()
        while layers := list(store.list()):
            parents = {layer.parent for layer in layers}
            for layer in layers:
                if layer.key not in parents:
                    store.remove(layer.key)
        assert list(store.driver.volumes()) == []
        assert os.listdir(store.root / "records") == []
    assert operations > 50
    assert not [point.target for point in mount_table.read() if point.target.is_relative_to(root)]
    if (image_file := root / "backing.img").exists():
        assert loop.find(image_file) == []
