"""A backing filled to its last block: errors that say so, nothing committed lost, and the space back after ``rm``.

Thin pools have tests of their own (test_devicemapper.py).
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layerfs import layout, mounts, registry
from layerfs.backing import Backing, BackingSpec
from layerfs.database import Database
from layerfs.errors import OutOfSpace
from layerfs.store import Store
from layerfs.testing.images import MadeImage, MadeLayout, tar_of

MakeStore = Callable[..., Store]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MIB = 1 << 20
KINDS = {"btrfs": "btrfs", "zfs": "zfs", "overlay2": "ext4", "aufs": "ext4", "vfs": "xfs"}


def fill(root: Path) -> int:
    """Write until nothing more fits, first in large files and then in ever smaller ones; the bytes written."""
    written, number = 0, 0
    for size in (8 * MIB, MIB, 64 << 10, 4096):
        while True:
            number += 1
            path = root / f"fill{number}"
            try:
                with open(path, "wb", buffering=0) as file:
                    file.write(os.urandom(size))
                    os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                with contextlib.suppress(OSError):
                    path.unlink()
                break
            written += size
    return written


def committed(store: Store, key: str, parent: str = "") -> None:
    store.prepare(f"{key}-work", parent)
    with store.mounted(f"{key}-work") as root:
        (root / key).write_bytes(os.urandom(4 * MIB))
    store.commit(key, f"{key}-work")


@pytest.mark.parametrize("driver", KINDS)
def test_a_store_filled_to_the_last_block(make_store: MakeStore, driver: str, tmp_path: Path) -> None:
    if not (probe := registry.load(driver).probe(tmp_path)).usable:
        pytest.skip(probe.reason)
    store = make_store(driver, backing=BackingSpec(KINDS[driver], size=400 * MIB))
    committed(store, "base")
    store.prepare("child", "base")
    with store.mounted("child") as root:
        written = fill(root)
    assert written > 100 * MIB

    # What still fits may succeed; what does not says that there is no space.
    for step in (lambda: store.prepare("next", "base"), lambda: committed(store, "more", "base")):
        with contextlib.suppress(OutOfSpace), contextlib.suppress(OSError):
            step()
    with contextlib.suppress(OutOfSpace):
        store.commit("full", "child")
    assert [finding for finding in store.check() if finding.name == "base"] == []

    for layer in sorted(store.list(), key=lambda layer: not layer.parent):  # children first
        if layer.key != "base":
            store.remove(layer.key)
    store.cleanup()
    assert store.check() == []
    store.prepare("again", "base")
    with store.mounted("again") as root:
        assert fill(root) > written - 40 * MIB
        assert len((root / "base").read_bytes()) == 4 * MIB


def test_layers_are_removed_from_a_full_disk_that_the_database_is_on_too(tmp_path: Path) -> None:
    disk = Backing.create(tmp_path / "disk", BackingSpec("ext4", size=200 * MIB))
    disk.up()
    root = disk.path / "store"
    try:
        made = MadeLayout(tmp_path / "layout")
        made.add(MadeImage([tar_of({"file": b"x"})]), "made")
        with Store(root, "vfs") as store:
            store.images.import_(made.path)
            committed(store, "base")
            store.prepare("child", "base")
            with mounts.opened(store.mounts("child")) as tree:  # as an engine does it
                assert fill(Path(f"/proc/self/fd/{tree}")) > 50 * MIB
            with pytest.raises(OutOfSpace):
                [store.prepare(f"more{number}", "base") for number in range(1000)]
            assert store.stat("child")
            store.images.remove("made")
        with Store(root) as store:
            store.remove("child")
            assert store.check() == []
            store.prepare("again", "base")
        assert (root / "reserve").stat().st_size == 8 * MIB
    finally:
        disk.destroy()


def test_an_operation_that_fails_on_a_full_disk_leaves_no_layer_busy(tmp_path: Path) -> None:
    disk = Backing.create(tmp_path / "disk", BackingSpec("ext4", size=100 * MIB))
    disk.up()

    class Full(io.RawIOBase):
        """A stream that cannot be written to, because the disk is full by then."""

        def write(self, _data: object, /) -> int:
            fill(disk.path)
            raise OSError(errno.ENOSPC, "no space left")

    try:
        with Store(disk.path / "store", "vfs") as store:
            store.prepare("work")
            with pytest.raises(OutOfSpace, match="writing the archive"):
                store.diff("work", Full())  # type: ignore[arg-type]
            store.diff("work", io.BytesIO())
    finally:
        disk.destroy()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", tmp_path], check=True)
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_database_that_is_opened_on_a_full_disk_says_so(small: Path) -> None:
    """SQLite calls it an error of input and output where its processes' shared file does not fit."""
    Database(small / "db").close()
    fill(small)
    with pytest.raises(OutOfSpace, match="free some space"):
        Database(small / "db")


def test_an_image_that_does_not_fit_into_a_tar_leaves_nothing_there(small: Path) -> None:
    blob = os.urandom((1 << 20) - 8192)
    with layout.writer(small / "image.tar") as writer:
        writer.add_bytes("application/octet-stream", blob)
        with pytest.raises(OutOfSpace, match=r"image\.tar"):
            writer.add_bytes("application/octet-stream", blob[:8190])
    assert not os.listdir(small)


def test_a_full_disk_is_told_as_such_wherever_it_was_met() -> None:
    script = (
        "import click, sys; from layerfs.cli import main\n"
        "@click.command()\n"
        "def full(): raise OSError({}, 'the system said so', '/a/file')\n"
        "sys.exit(main(full))"
    )
    for number, code in ((errno.ENOSPC, 9), (errno.EDQUOT, 9), (errno.EBADF, 70)):
        command = [sys.executable, "-c", script.format(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, "a fault" in done.stderr) == (code, code == 70), done.stderr


def test_engines_are_told_of_a_full_disk() -> None:
    grpc = pytest.importorskip("grpc", reason="layerfs[serve] is not installed")
    from layerfs.serve import snapshots

    class Context:
        def abort(self, code: object, _text: str) -> None:
            raise ConnectionAbortedError(code)

    for error in (OSError(errno.EDQUOT, "quota"), OutOfSpace("full")):
        with pytest.raises(ConnectionAbortedError) as caught:
            snapshots._refuse(Context(), error)  # type: ignore[arg-type]
        assert caught.value.args == (grpc.StatusCode.RESOURCE_EXHAUSTED,)
