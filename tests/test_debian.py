"""A Debian image on every driver: imported, changed by apt-get in a chroot, committed, exported, and replayed.

`nox -s debian` makes the image and its folder of packages, and runs this on this kernel and in a guest.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from layerfs import registry
from layerfs.backing import Backing, BackingSpec
from layerfs.driver import Change
from layerfs.store import Store

PLACE = os.environ.get("LAYERFS_TEST_DEBIAN", "")

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root"),
    pytest.mark.skipif(not PLACE, reason="`nox -s debian` makes the image that this needs"),
    pytest.mark.timeout(1800),
]

INSTALL = """
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
mount --bind "$2" "$1/mnt"
chroot "$1" sh -euc 'apt-get install -q -y --no-install-recommends /mnt/*.deb'
"""


class Recorded(NamedTuple):
    """What apt-get changed, on one driver."""

    archive: Path
    diff_id: str
    changes: list[Change]


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    yield from opened(tmp_path / "store", request.param)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    place = tmp_path_factory.mktemp("recorded")
    for store in opened(place / "store", "overlay2"):
        installed(store)
        with open(place / "changes.tar", "wb") as out:
            store.diff("installed", out)
        yield Recorded(place / "changes.tar", str(store.stat("installed").diff_id), list(store.changes("installed")))


def opened(place: Path, driver: str) -> Iterator[Store]:
    kind = registry.load(driver)
    if not (probe := kind.probe(place.parent)).usable:
        pytest.skip(probe.reason)
    spec = BackingSpec(kind.needs.filesystems[0], size=4 << 30) if kind.needs.filesystems else None
    with Store(place, driver, backing=spec) as store:
        yield store
    Backing(place).destroy()


def installed(store: Store) -> None:
    """Import the image and make the layer ``installed`` on it, by apt-get."""
    store.images.import_(Path(PLACE, "debian.oci"), name="debian")
    store.prepare("work", "debian")
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    with store.mounted("work") as root:
        command = ["unshare", "--mount", "sh", "-euc", INSTALL, "sh", str(root), f"{PLACE}/packages"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert greeting(root) == "Hello, world!\n"
    store.commit("installed", "work")


def greeting(root: Path) -> str:
    return subprocess.run(["chroot", str(root), "hello"], check=True, capture_output=True, text=True).stdout


def layers_of(layout: Path) -> list[str]:
    """The diff IDs that the configuration of a layout's only image names."""

    def blob(digest: str) -> dict[str, object]:
        found = json.loads((layout / "blobs" / digest.replace(":", "/")).read_text())
        assert isinstance(found, dict)
        return found

    [manifest] = json.loads((layout / "index.json").read_text())["manifests"]
    config = blob(blob(manifest["digest"])["config"]["digest"])  # type: ignore[index]
    return list(config["rootfs"]["diff_ids"])  # type: ignore[index]


@pytest.mark.parametrize("store", registry.names(), indirect=True)
def test_apt_get_in_a_chroot_is_a_layer_like_any_other(store: Store, recorded: Recorded, tmp_path: Path) -> None:
    installed(store)
    image = store.images.get("debian")
    below = layers_of(Path(PLACE, "debian.oci"))
    assert [store.stat(key).diff_id for key in image.layers] == below

    store.images.export("installed", tmp_path / "exported", compression="none")
    assert layers_of(tmp_path / "exported") == [*below, store.stat("installed").diff_id]
    for other in opened(tmp_path / "other", "overlay2"):
        [again] = other.images.import_(tmp_path / "exported", name="again")
        other.view("look", again.name)
        with other.mounted("look") as root:
            assert greeting(root) == "Hello, world!\n"

    store.prepare("again", "debian")
    with open(recorded.archive, "rb") as archive:
        store.apply("again", archive)
    assert list(store.changes("again")) == recorded.changes
    assert store.commit("replayed", "again").diff_id == recorded.diff_id
    assert store.check() == []
