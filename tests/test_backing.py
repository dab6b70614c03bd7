"""layerfs.backing on sparse files and loop devices."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from layerfs import filesystems, mount_table, mounts, programs
from layerfs.backing import Backing, BackingSpec
from layerfs.backings import places
from layerfs.driver import Mount
from layerfs.errors import (
    AlreadyExists,
    Damaged,
    EnvironmentUnfit,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfSpace,
)
from layerfs.kernel import loop

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="loop devices and mounts need root")

MIB = 1 << 20
SIZE = 400 * MIB
MADE = ["btrfs", "ext4", "xfs", "xfs-noreflink"]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A directory for one backing; afterwards nothing may be mounted in it, and no loop device stand on it."""
    root = tmp_path / "a root, with: odd\\name"
    yield root
    left = [m.target for m in mount_table.read() if m.target.is_relative_to(tmp_path)]
    devices = [d for image in tmp_path.rglob("*.img") for d in loop.find(image)]
    for target in reversed(left):
        mounts.unmount(target, lazy=True)
    for device in devices:
        loop.detach(device)
    assert (left, devices) == ([], [])


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A block device to be given as one."""
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(SIZE)
    with open(image, "r+b") as file:
        path, fd = loop.attach(file.fileno(), "disk")
    yield str(path)
    os.close(fd)


@pytest.mark.parametrize("filesystem", MADE)
def test_life_of_a_backing(root: Path, filesystem: str) -> None:
    made = Backing.create(root, BackingSpec(filesystem, SIZE))
    assert root.stat().st_mode & 0o777 == 0o700
    made.up()
    made.up()
    (point,) = [m for m in mount_table.read() if m.target == made.path]
    assert point.type == filesystems.KINDS[filesystem].type
    assert made.path.stat().st_mode & 0o777 == 0o700
    (made.path / "file").write_text("kept")
    assert SIZE // 2 < made.space().total <= SIZE
    assert 0 < made.space().free <= made.space().total
    made.down()
    made.down()
    assert loop.find(root / "backing.img") == []
    assert not (made.path / "file").exists()
    again = Backing.create(root, BackingSpec(filesystem, SIZE))
    again.up()
    assert (again.path / "file").read_text() == "kept"
    Backing(root).destroy()
    assert os.listdir(root) == []
    made.destroy()


def test_plain_directory(root: Path) -> None:
    made = Backing.create(root, BackingSpec())
    made.up()
    (made.path / "sub").mkdir()
    made.down()
    assert (made.path / "sub").exists()
    assert made.space().free > 0
    with pytest.raises(InvalidArgument, match="no size"):
        made.grow(SIZE)
    made.destroy()
    assert os.listdir(root) == []


@pytest.mark.parametrize("filesystem", MADE)
def test_grow(root: Path, filesystem: str) -> None:
    made = Backing.create(root, BackingSpec(filesystem, SIZE))
    made.up()
    try:
        (made.path / "file").write_text("kept")
        before = made.space().total
        with pytest.raises(InvalidArgument, match="cannot shrink"):
            made.grow(SIZE - 1)
        made.grow(2 * SIZE)
        assert made.space().total > before + SIZE * 8 // 10
        made.down()
        made.grow(3 * SIZE)
        assert Backing(root).spec.size == 3 * SIZE
        assert not os.path.ismount(made.path)
        made.up()
        assert made.space().total > before + 2 * SIZE * 8 // 10
        assert (made.path / "file").read_text() == "kept"
    finally:
        made.destroy()


@pytest.mark.parametrize("filesystem", MADE)
def test_holes_return_when_files_go(root: Path, filesystem: str) -> None:
    made = Backing.create(root, BackingSpec(filesystem, SIZE))
    made.up()
    try:
        (made.path / "big").write_bytes(os.urandom(64 * MIB))
        os.sync()
        full = (root / "backing.img").stat().st_blocks * 512
        (made.path / "big").unlink()
        made.down()
        made.up()
        subprocess.run(["fstrim", made.path], check=True)
        assert (root / "backing.img").stat().st_blocks * 512 < full - 48 * MIB
    finally:
        made.destroy()


def test_spec_is_json() -> None:
    spec = BackingSpec("btrfs", 5, None)
    assert BackingSpec(**json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


@pytest.mark.parametrize(
    "spec",
    [
        BackingSpec("ntfs"),
        BackingSpec("btrfs", 1000),
        BackingSpec("dir", SIZE),
        BackingSpec("ext4", SIZE, "/dev/loop0"),
        BackingSpec("ext4", None, "/dev/null"),
        BackingSpec("ext4", SIZE, metadata_size=SIZE),
    ],
)
def test_specs_that_cannot_be(root: Path, spec: BackingSpec) -> None:
    with pytest.raises(InvalidArgument):
        Backing.create(root, spec)
    with pytest.raises(NotFound):
        Backing(root)


def test_a_driver_finds_the_backing_around_it(root: Path) -> None:
    made = Backing.create(root, BackingSpec())
    made.up()
    inner = made.path / "data" / "driver"
    inner.mkdir(parents=True)
    for place in (made.path, inner):
        found = Backing.around(place)
        assert found is not None
        assert os.path.samefile(found.root, root)
    assert Backing.around(root) is None
    made.destroy()


def test_another_kind_is_refused(root: Path) -> None:
    made = Backing.create(root, BackingSpec())
    with pytest.raises(AlreadyExists, match="'dir'"):
        Backing.create(root, BackingSpec("ext4", SIZE))
    made.destroy()


def test_default_size(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Backing.create(root, BackingSpec("btrfs"))
    free = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
    assert made.spec.size is not None
    assert min(free * 7 // 10, 1 << 40) < made.spec.size <= min(free * 9 // 10, 1 << 40)
    assert (root / "backing.img").stat().st_blocks * 512 < 100 * MIB
    made.destroy()
    monkeypatch.setattr(places, "free_bytes", lambda _: 200 * MIB)
    with pytest.raises(OutOfSpace, match=r"256\.0 MiB"):
        Backing.create(root, BackingSpec("btrfs"))


def test_missing_tool_names_the_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(programs, "_SYSTEM_FOLDERS", "/nowhere")
    with pytest.raises(EnvironmentUnfit, match="btrfs-progs"):
        Backing.create(root, BackingSpec("btrfs", SIZE))


def test_failed_mkfs_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(filesystems.KINDS["ext4"], mkfs=("mkfs.ext4", "-q", "-F", "--nonsense"))
    monkeypatch.setitem(filesystems.KINDS, "ext4", broken)
    with pytest.raises(Exception, match=r"mkfs\.ext4 .* failed"):
        Backing.create(root, BackingSpec("ext4", SIZE))
    assert os.listdir(root) == ["backing.lock"]


@pytest.mark.parametrize("filesystem", MADE)
def test_on_a_device(root: Path, device: str, filesystem: str) -> None:
    made = Backing.create(root, BackingSpec(filesystem, device=device))
    made.up()
    (made.path / "file").write_text("kept")
    with pytest.raises(FailedPrecondition, match="in use"):
        Backing.create(root.parent / "other", BackingSpec("ext4", device=device), force=True)
    made.down()
    with pytest.raises(FailedPrecondition, match=f"{filesystems.KINDS[filesystem].type}.*force"):
        Backing.create(root.parent / "other", BackingSpec("ext4", device=device))
    Backing.create(root, BackingSpec(filesystem, device=device)).up()
    assert (made.path / "file").read_text() == "kept"
    made.destroy()
    Backing.create(root, BackingSpec("ext4", device=device)).destroy()


def test_a_device_with_any_data_is_refused(root: Path, device: str) -> None:
    entry = bytes([0, 0, 2, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + (4096).to_bytes(4, "little")
    Path(device).write_bytes(bytes(446) + entry + bytes(48) + b"\x55\xaa")
    with pytest.raises(FailedPrecondition, match="dos"):
        Backing.create(root, BackingSpec("btrfs", device=device))
    Backing.create(root, BackingSpec("btrfs", device=device), force=True).destroy()


def test_a_foreign_file_system_is_not_mounted(root: Path) -> None:
    made = Backing.create(root, BackingSpec("ext4", SIZE))
    subprocess.run(["mkfs.ext4", "-q", "-F", root / "backing.img"], check=True, capture_output=True)
    with pytest.raises(Damaged, match="does not hold"):
        made.up()
    (root / "backing.img").unlink()
    with pytest.raises(Damaged, match="gone"):
        made.up()
    made.destroy()


def test_busy_backing_stays_up(root: Path, tmp_path: Path) -> None:
    made = Backing.create(root, BackingSpec("ext4", SIZE))
    made.up()
    try:
        (tmp_path / "target").mkdir()
        with open(made.path / "file", "w"), pytest.raises(FailedPrecondition, match=str(os.getpid())):
            made.down()
        for mount in (
            Mount("bind", str(made.path), ("bind",)),
            Mount("overlay", "overlay", ("ro", f"lowerdir={overlaid(made.path)}")),
        ):
            mounts.attach([mount], tmp_path / "target")
            with pytest.raises(FailedPrecondition, match=r"target|still open"):
                made.down()
            with pytest.raises(FailedPrecondition, match=r"target|still open"):
                made.destroy()
            mounts.unmount(tmp_path / "target")
            with mounts.opened([mount, Mount("tmpfs", "tmpfs", (), "a")]), pytest.raises(FailedPrecondition):
                made.down()
        assert os.path.ismount(made.path)
    finally:
        made.destroy()


def overlaid(path: Path) -> str:
    (path / "a" / "a").mkdir(parents=True)
    (path / "b").mkdir()
    text = str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
    return f"{text}/a:{text}/b"


def test_many_at_once(root: Path) -> None:
    def use(_: int) -> None:
        made = Backing.create(root, BackingSpec("ext4", SIZE))
        made.up()
        assert os.path.ismount(made.path)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(use, range(12)))
    assert len(loop.find(root / "backing.img")) == 1
    assert len([m for m in mount_table.read() if m.target == root / "data"]) == 1
    Backing(root).destroy()


KILLED = """
import os, signal, sys
from pathlib import Path
from layerfs.backing import Backing, BackingSpec
left = int(sys.argv[3])
def trace(frame, event, arg):
    global left
    file = frame.f_code.co_filename
    if "/backings/" not in file and not file.endswith(("/backing.py", "/filesystems.py", "/loop.py")):
        return None
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace
sys.settrace(trace)
made = Backing.create(Path(sys.argv[1]), BackingSpec(sys.argv[2], 400 << 20))
made.up()
made.grow(500 << 20)
made.down()
made.destroy()
sys.settrace(None)
print(int(sys.argv[3]) - left)
"""


def test_kill_at_any_point_can_be_put_right(root: Path) -> None:
    """A process is killed at every so many lines; what it leaves must come up again, and then go without a trace."""
    command = [sys.executable, "-c", KILLED, str(root), "btrfs"]
    steps = int(subprocess.run([*command, str(10**9)], check=True, capture_output=True).stdout)
    assert steps > 300
    for step in range(1, steps * 9 // 10, steps // 25):  # how often the end waits for the kernel varies
        assert subprocess.run([*command, str(step)], check=False).returncode == -9
        if step % 2:
            Backing.create(root, BackingSpec("btrfs", SIZE)).up()
            (root / "data" / "file").write_text("x")
            Backing(root).down()
        try:
            Backing(root).destroy()
        except NotFound:
            assert not (root / "backing.img").exists()
        assert set(os.listdir(root) if root.exists() else []) <= {"backing.lock", "backing.json.new"}
        assert not [m for m in mount_table.read() if m.target.is_relative_to(root)]
