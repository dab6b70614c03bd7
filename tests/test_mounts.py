"""layerfs.mounts against the kernel itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs import mount_table, mounts
from layerfs.driver import Mount
from layerfs.errors import EnvironmentUnfit, FailedPrecondition, KernelRefused, LayerfsError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

AWKWARD = ["plain", "co:lon", "com,ma", "sp ace", "back\\slash", os.fsdecode(b"\xff\xfe"), "x" * 200]


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for point in reversed(mount_table.read()):
        if point.target.is_relative_to(tmp_path):
            mounts.unmount(point.target, lazy=True)


@pytest.fixture(params=["new calls", "mount(2)"])
def api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "mount(2)":
        monkeypatch.setattr(mounts, "_new_api", False)


def escaped(path: Path) -> str:
    return "".join("\\" + c if c in "\\:," else c for c in str(path))


def overlay(base: Path, lowers: list[Path], *, writable: bool = False) -> Mount:
    options = ["lowerdir=" + ":".join(map(escaped, lowers))]
    if writable:
        for name in ("upper", "work"):
            (base / name).mkdir()
            options.append(f"{name}dir={escaped(base / name)}")
    return Mount("overlay", "overlay", ("rw" if writable else "ro", *options))


def layers(base: Path, count: int, *, pad: str = "") -> list[Path]:
    made = []
    for number in range(count):
        layer = base / f"{pad}{number}"
        layer.mkdir(parents=True)
        (layer / f"file{number}").write_text(str(number))
        made.append(layer)
    return made


def mounted_below(path: Path) -> list[Path]:
    return [m.target for m in mount_table.read() if m.target.is_relative_to(path)]


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("name", AWKWARD)
def test_overlay_takes_any_directory_name(scratch: Path, name: str) -> None:
    base = scratch / name / ("deep" if len(name) < 100 else name)
    (base / "target").mkdir(parents=True)
    mount = overlay(base, layers(base, 2), writable=True)
    mounts.attach([mount], base / "target")
    assert sorted(os.listdir(base / "target")) == ["file0", "file1"]
    (base / "target" / "new").write_text("x")
    assert (base / "upper" / "new").read_text() == "x"
    assert base / "target" in mounted_below(scratch)
    mounts.unmount(base / "target")
    assert mounted_below(scratch) == []


@pytest.mark.usefixtures("api")
def test_overlay_of_400_layers(scratch: Path) -> None:
    target = scratch / "target"
    target.mkdir()
    lowers = layers(scratch / "l", 400, pad="a-long-name-that-would-fill-a-page-quickly-")
    mounts.attach([overlay(scratch, lowers, writable=True)], target)
    assert len(os.listdir(target)) == 400
    mounts.unmount(target)
    with mounts.opened([overlay(scratch, lowers)]) as fd:
        assert len(os.listdir(fd)) == 400


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("name", AWKWARD)
def test_bind_read_only(scratch: Path, name: str) -> None:
    source, target = scratch / name, scratch / "target"
    source.mkdir()
    target.mkdir()
    mounts.attach([Mount("bind", str(source), ("bind", "ro"))], target)
    with pytest.raises(OSError, match="Read-only"):
        (target / "f").touch()
    (source / "f").touch()
    assert os.listdir(target) == ["f"]
    mounts.unmount(target)
    mounts.attach([Mount("bind", str(source), ("rbind", "rw"))], target)
    (target / "g").touch()
    assert (source / "g").exists()
    mounts.unmount(target)


@pytest.mark.usefixtures("api")
def test_second_mount_goes_below_the_first_and_never_outside(scratch: Path) -> None:
    source, target, outside = scratch / "source", scratch / "target", scratch / "outside"
    (source / "sub").mkdir(parents=True)
    (outside / "etc").mkdir(parents=True)
    target.mkdir()
    (source / "link").symlink_to(outside / "etc")
    tmpfs = Mount("tmpfs", "tmpfs", ("size=1M", "mode=0711", "nosuid"), "sub")
    bind = Mount("bind", str(source), ("bind",))
    mounts.attach([bind, tmpfs], target)
    assert mounted_below(scratch) == [target, target / "sub"]
    assert (target / "sub").stat().st_mode & 0o777 == 0o711
    mounts.unmount(target)
    assert mounted_below(scratch) == []
    escape = Mount("tmpfs", "tmpfs", (), "link")
    with pytest.raises(KernelRefused):
        mounts.attach([bind, escape], target)
    assert mounted_below(scratch) == []
    with mounts.opened([bind, tmpfs]) as fd:
        assert os.statvfs(f"/proc/self/fd/{fd}/sub").f_blocks * 4096 == 1 << 20
    assert mounted_below(scratch) == []


@pytest.mark.usefixtures("api")
def test_failure_says_what_and_leaves_nothing(scratch: Path) -> None:
    target = scratch / "target"
    target.mkdir()
    with pytest.raises(KernelRefused, match="overlay"):
        mounts.attach([Mount("overlay", "overlay", (f"lowerdir={scratch}/absent",))], target)
    with pytest.raises(EnvironmentUnfit, match="modprobe nosuchfs"):
        mounts.attach([Mount("nosuchfs", "none")], target)
    with pytest.raises(LayerfsError), mounts.opened([Mount("bind", str(scratch / "absent"), ("ro",))]):
        pass
    with pytest.raises(KernelRefused):
        mounts.attach([Mount("tmpfs", "tmpfs"), Mount("tmpfs", "tmpfs", (), "absent")], target)
    assert mounted_below(scratch) == []


def test_what_the_file_system_says_is_in_the_error(scratch: Path) -> None:
    with pytest.raises(KernelRefused, match="absent"):
        mounts.attach([Mount("overlay", "overlay", (f"lowerdir={scratch}:{scratch}/absent",))], scratch)
    with pytest.raises(KernelRefused, match=r"(?i)unknown parameter.*frobnicate"):
        mounts.attach([Mount("tmpfs", "tmpfs", ("frobnicate=1",))], scratch)


@pytest.mark.usefixtures("api")
def test_opened_has_no_place_and_is_writable(scratch: Path) -> None:
    mount = overlay(scratch, layers(scratch / "l", 1), writable=True)
    with mounts.opened([mount]) as fd:
        os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        assert sorted(os.listdir(fd)) == ["file0", "new"]
        assert mounted_below(scratch) == []
        assert not any(m.type == "overlay" and m.target.name.startswith("layerfs-") for m in mount_table.read())
    assert (scratch / "upper" / "new").exists()
    with mounts.opened([mount]) as fd:  # the upper directory is free again at once
        assert "new" in os.listdir(fd)


def test_opened_bind(scratch: Path) -> None:
    with mounts.opened([Mount("bind", str(scratch), ("bind", "rw"))]) as fd:
        assert os.fstat(fd).st_ino == scratch.stat().st_ino
        os.mkdir("d", dir_fd=fd)
    with mounts.opened([Mount("bind", str(scratch), ("bind", "ro"))]) as fd:
        with pytest.raises(OSError, match="Read-only"):
            os.mkdir("e", dir_fd=fd)
        assert os.listdir(fd) == ["d"]


def test_opened_bind_needs_no_privilege(scratch: Path) -> None:
    code = (
        "import os, sys; from layerfs.driver import Mount; from layerfs.mounts import opened\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "for mode in ('rw', 'ro'):\n"
        "    with opened([Mount('bind', '/usr', ('bind', mode))]) as fd: assert 'bin' in os.listdir(fd)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=scratch)


def test_unmount_of_what_is_not_mounted(scratch: Path) -> None:
    mounts.unmount(scratch)
    mounts.unmount(scratch / "absent")
    (scratch / "plain" / "target").mkdir(parents=True)
    mounts.attach([Mount("tmpfs", "tmpfs")], scratch / "plain" / "target")
    mounts.unmount(scratch / "plain")  # what is mounted below it goes all the same
    assert mounted_below(scratch) == []


def test_busy_names_the_holder(scratch: Path) -> None:
    target = scratch / "target"
    target.mkdir()
    mounts.attach([Mount("tmpfs", "tmpfs")], target)
    (target / "data").write_bytes(b"x" * 4096)
    by_cwd = subprocess.Popen(["sleep", "100"], cwd=target)
    code = (
        "import mmap, os, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); f.close(); print(flush=True)"
    )
    by_map = subprocess.Popen(
        [sys.executable, "-c", code + "; sys.stdin.read()", str(target / "data")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    by_file = os.open(target / "data", os.O_RDONLY)
    try:
        assert by_map.stdout is not None
        by_map.stdout.readline()
        with pytest.raises(FailedPrecondition) as caught:
            mounts.unmount(target)
    finally:
        os.close(by_file)
        for process in (by_cwd, by_map):
            process.kill()
            process.communicate()
    for pid in (by_cwd.pid, by_map.pid, os.getpid()):
        assert f"{pid} (" in str(caught.value)
    assert "(sleep)" in str(caught.value)
    mounts.unmount(target)
    assert mounted_below(scratch) == []


def test_lazy_unmount_of_a_busy_tree(scratch: Path) -> None:
    target = scratch / "target"
    target.mkdir()
    mounts.attach([Mount("tmpfs", "tmpfs")], target)
    fd = os.open(target, os.O_RDONLY)
    mounts.unmount(target, lazy=True)
    os.close(fd)
    assert mounted_below(scratch) == []


def test_table_undoes_escapes(scratch: Path) -> None:
    target = scratch / os.fsdecode(b"a b\tc\\040\n\xff#")
    target.mkdir()
    mounts.attach([Mount("tmpfs", "a source", ("size=64k", "noexec", "ro"))], target)
    (point,) = [m for m in mount_table.read() if m.target == target]
    assert (point.type, point.source, point.root) == ("tmpfs", "a source", "/")
    assert {"noexec", "ro"} <= set(point.options)
    assert {"size=64k", "ro"} <= set(point.super_options)
    assert point.parent in {m.id for m in mount_table.read()}


def test_killed_process_leaves_no_mount(scratch: Path) -> None:
    mount = overlay(scratch, layers(scratch / "l", 1), writable=True)
    code = (
        "import os, signal; from layerfs.driver import Mount; from layerfs.mounts import opened\n"
        f"with opened([Mount('overlay', 'overlay', {mount.options!r})]) as fd:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert mounted_below(scratch) == []
    with mounts.opened([mount]) as fd:
        assert "file0" in os.listdir(fd)
