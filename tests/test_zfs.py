"""The zfs driver and its backing, on the ZFS that is here: OpenZFS in the kernel, or zfs-fuse."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from layerfs import mount_table, mounts
from layerfs.backing import Backing, BackingSpec
from layerfs.backings import zfs_tools
from layerfs.backings.zfs_fuse import Daemon
from layerfs.backings.zfs_tools import Tools
from layerfs.driver import Driver, Mount
from layerfs.drivers import zfs
from layerfs.drivers.vfs import VfsDriver
from layerfs.drivers.zfs import ZfsDriver
from layerfs.errors import Damaged, EnvironmentUnfit, FailedPrecondition, InvalidArgument, LayerfsError, NotFound
from layerfs.kernel import loop
from layerfs.kernel import mountapi as api
from layerfs.opening import Wanted, close_session, open_session
from layerfs.testing import DriverConformance, Tree, read_tree
from layerfs.testing.kills import killed
from layerfs.testing.workbench import Workbench


def _missing() -> str:
    """Why nothing of this can be tried here; empty where it can."""
    if os.geteuid() != 0:
        return "pools and mounts need root"
    try:
        zfs_tools.check_usable()
    except EnvironmentUnfit as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing() or "-")
in_kernel = pytest.mark.skipif(zfs_tools.in_user_space(), reason="zfs-fuse has no zfs diff")
in_user_space = pytest.mark.skipif(not zfs_tools.in_user_space(), reason="OpenZFS has no daemon that could die")

MIB = 1 << 20
SIZE = 256 * MIB
SPEC = BackingSpec("zfs", SIZE)


def left_over(root: Path) -> list[str]:
    """What of the backings below ``root`` is still there: mounts, daemons, pools, loop devices."""
    found = [str(m.target) for m in mount_table.read() if m.target.is_relative_to(root)]
    for folder in root.rglob("backing.json"):
        backing = Backing(folder.parent)
        if (pid := Daemon(backing.root).pid()) is not None:
            found.append(f"process {pid}")
        if not zfs_tools.in_user_space():
            tools = Tools(None, backing.root / "zfs.lock")
            found += [pool for pool in tools.zpool("list", "-H", "-o", "name").split() if pool == backing.facts["pool"]]
    return found + [str(device) for image in root.rglob("*.img") for device in loop.find(image)]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A directory for one backing."""
    root = tmp_path / "a root, with: odd\\name"
    yield root
    left = left_over(tmp_path)
    for point in reversed(mount_table.read()):
        if point.target.is_relative_to(tmp_path):
            mounts.unmount(point.target, lazy=True)
    assert left == []


@pytest.fixture
def up(root: Path) -> Iterator[Backing]:
    backing = Backing.create(root, SPEC)
    try:
        backing.up()
        yield backing
    finally:
        backing.destroy()


@pytest.fixture
def driver(up: Backing) -> ZfsDriver:
    return ZfsDriver(up.path)


@pytest.fixture
def bench(driver: ZfsDriver) -> Workbench:
    return Workbench(driver)


class TestZfs(DriverConformance):
    driver_class = ZfsDriver
    filesystem = "zfs"


# The backing


def test_life_of_a_backing(root: Path) -> None:
    made = Backing.create(root, SPEC)
    assert left_over(root) == []
    made.up()
    made.up()
    point = [m for m in mount_table.read() if m.target == Path(os.path.realpath(made.path))][-1]
    assert (point.type in zfs_tools.TYPES, point.source) == (True, made.facts["pool"])
    assert made.path.stat().st_mode & 0o777 == 0o700
    (made.path / "file").write_text("kept")
    assert SIZE // 4 < made.space().total <= SIZE  # OpenZFS keeps 128 MiB for itself
    assert 0 < made.space().free <= made.space().total
    made.down()
    made.down()
    assert left_over(root) == []
    assert list(made.path.iterdir()) == []
    again = Backing.create(root, SPEC)
    again.up()
    assert (again.path / "file").read_text() == "kept"
    again.destroy()
    assert os.listdir(root) == []


def test_grow(root: Path) -> None:
    made = Backing.create(root, SPEC)
    try:
        made.up()
        (made.path / "file").write_text("kept")
        with pytest.raises(InvalidArgument, match="cannot shrink"):
            made.grow(SIZE - 1)
        made.grow(2 * SIZE)
        assert made.space().total > 2 * SIZE * 8 // 10
        made.down()
        made.grow(4 * SIZE)
        assert left_over(root) == []
        made.up()
        assert made.space().total > 4 * SIZE * 8 // 10
        assert (made.path / "file").read_text() == "kept"
    finally:
        made.destroy()


def test_on_a_device(root: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(SIZE)
    with open(image, "r+b") as file:
        device, fd = loop.attach(file.fileno(), "disk")
    try:
        spec = BackingSpec("zfs", device=str(device))
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        with pytest.raises(FailedPrecondition, match=r"ext4.*force"):
            Backing.create(root, spec)
        made = Backing.create(root, spec, force=True)
        made.up()
        (made.path / "file").write_text("kept")
        made.down()
        with pytest.raises(FailedPrecondition, match=r"zfs_member.*force"):
            Backing.create(tmp_path / "other", BackingSpec("ext4", device=str(device)))
        Backing.create(root, spec).up()
        assert (made.path / "file").read_text() == "kept"
        made.destroy()
        Backing.create(root, BackingSpec("ext4", device=str(device))).destroy()
    finally:
        os.close(fd)


def test_several_at_once_do_not_see_each_other(tmp_path: Path) -> None:
    backings = [Backing.create(tmp_path / name, SPEC) for name in ("one", "two")]
    try:
        for backing in backings:
            backing.up()
            driver = ZfsDriver(backing.path)
            driver.create("v", ())
            with mounts.opened(driver.mounts("v", ())) as fd:
                Path(f"/proc/self/fd/{fd}/{backing.root.name}").write_bytes(b"")
        backings[0].destroy()
        with mounts.opened(ZfsDriver(backings[1].path).mounts("v", ())) as fd:
            assert os.listdir(fd) == ["two"]
    finally:
        for backing in backings:
            backing.destroy()
    assert left_over(tmp_path) == []


def test_what_is_in_use_stays_up(up: Backing, driver: ZfsDriver, tmp_path: Path) -> None:
    driver.create("v", ())
    (mount,) = driver.mounts("v", ())
    (tmp_path / "target").mkdir()
    with open(up.path / "file", "w"), pytest.raises(FailedPrecondition, match=str(os.getpid())):
        up.down()
    mounts.attach([mount], tmp_path / "target")
    with pytest.raises(FailedPrecondition, match="target"):
        up.down()
    with pytest.raises(FailedPrecondition, match="target"):
        up.destroy()
    mounts.unmount(tmp_path / "target")
    with mounts.opened([mount]), pytest.raises(FailedPrecondition):
        up.down()
    (up.path / "file").write_text("still here")


def test_a_lost_pool_is_told(root: Path) -> None:
    made = Backing.create(root, SPEC)
    os.truncate(root / "backing.img", 0)
    os.truncate(root / "backing.img", SIZE)
    with pytest.raises(Damaged, match="does not hold"):
        made.up()
    (root / "backing.img").unlink()
    with pytest.raises(Damaged, match="does not hold"):
        made.up()
    assert left_over(root) == []
    made.destroy()


@in_user_space
def test_a_daemon_that_was_killed(up: Backing, driver: ZfsDriver) -> None:
    driver.create("v", ())
    with mounts.opened(driver.mounts("v", ())) as fd:
        file = os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        os.write(file, b"kept")
        os.fsync(file)
        os.close(file)
    driver.seal("v", ())
    pid = Daemon(up.root).pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while Daemon(up.root).pid() is not None:
        time.sleep(0.01)
    for attempt in (lambda: driver.create("w", ()), lambda: driver.mounts("v", ())):
        with pytest.raises(LayerfsError, match="open the store again"):
            attempt()
    up.up()
    again = ZfsDriver(up.path)
    assert list(again.volumes()) == ["v"]
    with mounts.opened(again.mounts("v", (), read_only=True)) as fd:
        assert Path(f"/proc/self/fd/{fd}/file").read_bytes() == b"kept"
    os.kill(Daemon(up.root).pid() or 0, signal.SIGKILL)  # and now it is taken down instead


KILLED = """
import os, signal, sys
from pathlib import Path
from layerfs.backing import Backing, BackingSpec
left = int(sys.argv[2])
def trace(frame, event, arg):
    global left
    file = frame.f_code.co_filename
    if "/backings/" not in file and not file.endswith(("/backing.py", "/subprocess.py")):
        return None
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace
sys.settrace(trace)
made = Backing.create(Path(sys.argv[1]), BackingSpec("zfs", 256 << 20))
made.up()
made.grow(300 << 20)
made.down()
made.destroy()
sys.settrace(None)
print(int(sys.argv[2]) - left)
"""


def test_kill_at_any_point_can_be_put_right(root: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(root)]
    steps = int(subprocess.run([*command, str(10**9)], check=True, capture_output=True).stdout)
    assert steps > 1000
    for number, step in enumerate(range(1, steps * 9 // 10, steps // 12)):
        assert subprocess.run([*command, str(step)], check=False).returncode == -9
        if number % 2:
            Backing.create(root, SPEC).up()
            (root / "data" / "file").write_text("x")
            Backing(root).down()
        try:
            Backing(root).destroy()
        except NotFound:
            assert not (root / "backing.img").exists()
        assert set(os.listdir(root) if root.exists() else []) <= {"backing.lock", "backing.json.new"}
        assert left_over(root.parent) == []


# The driver


def test_options_are_properties(up: Backing) -> None:
    driver = ZfsDriver(up.path, {"compression": "gzip", "recordsize": "64K"})
    driver.create("v", ())
    with mounts.opened(driver.mounts("v", ())) as fd:
        Path(f"/proc/self/fd/{fd}/zeros").write_bytes(b"same " * MIB)
    assert driver.usage("v", ()).size < MIB
    with pytest.raises(InvalidArgument, match="'mountpoint'"):
        ZfsDriver(up.path, {"mountpoint": "/"})


def test_a_directory_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfit, match="backing"):
        ZfsDriver(tmp_path)


def test_volumes_are_there_again_after_the_backing_was_down(up: Backing, bench: Workbench) -> None:
    base = bench.prepare()
    with bench.mounted(base) as tree:
        (tree / "file").write_bytes(b"x")
    bench.seal(base)
    child = bench.prepare(base, size=20 * MIB)
    before = bench.tree(base)
    up.down()
    up.up()
    again = Workbench(ZfsDriver(up.path), bench.ancestry)
    assert again.tree(base) == again.tree(child) == before
    with again.mounted(child) as tree, pytest.raises(OSError, match=r"quota|space"):
        fill(tree / "big", 40)


def fill(path: Path, mib: int) -> None:
    with open(path, "wb", buffering=0) as file:
        file.writelines(os.urandom(MIB) for _ in range(mib))
        os.fsync(file.fileno())


@pytest.mark.parametrize("first", ["source", "fork"])
def test_a_fork_and_its_source_go_in_any_order(bench: Workbench, first: str) -> None:
    base = bench.prepare()
    with bench.mounted(base) as tree:
        (tree / "file").write_bytes(b"x")
    bench.seal(base)
    source = bench.prepare(base, size=10 * MIB)
    with bench.mounted(source) as tree:
        (tree / "mine").write_bytes(b"y")
    fork = bench.fork(source)
    expected = bench.tree(source)
    kept, gone = (fork, source) if first == "source" else (source, fork)
    bench.remove(gone)
    assert bench.tree(kept) == expected
    with bench.mounted(kept) as tree, pytest.raises(OSError, match=r"quota|space"):
        fill(tree / "big", 20)
    bench.driver.resize(kept, 40 * MIB)
    with bench.mounted(kept) as tree:
        fill(tree / "big", 20)
    bench.seal(kept)
    assert isinstance(bench.driver, ZfsDriver)
    snapshots = bench.driver._tools.zfs("list", "-H", "-r", "-t", "snapshot", "-o", "name", bench.driver._home)
    assert [name.partition("@")[2] for name in snapshots.split()] == ["layer", "layer"]


def test_what_is_mounted_elsewhere_is_not_removed(bench: Workbench, tmp_path: Path) -> None:
    volume = bench.prepare()
    target = tmp_path / "target"
    target.mkdir()
    mounts.attach(bench.driver.mounts(volume, ()), target)
    (target / "file").write_text("x")
    try:
        with pytest.raises(FailedPrecondition, match=r"use|mounted"):
            bench.driver.remove(volume)
        assert (target / "file").read_text() == "x"
    finally:
        mounts.unmount(target)
    assert list(bench.tree(volume)) == [".", "file"]
    bench.remove(volume)
    assert list(bench.driver.volumes()) == []


@in_user_space
def test_more_volumes_than_zfs_fuse_can_mount(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zfs, "_MOST_MOUNTED", 8)
    base = bench.seal(bench.prepare())
    volumes = [bench.prepare(base) for _ in range(20)]
    with bench.opened(volumes[0]) as held:
        for volume in volumes:
            with bench.mounted(volume) as tree:
                (tree / volume).write_bytes(b"x")
        assert os.listdir(held) == [volumes[0]]
    top = bench.driver.root
    assert len([m for m in mount_table.read() if m.target.parent == top]) <= 9
    for volume in volumes:
        assert list(bench.tree(volume)) == [".", volume]


@in_user_space
def test_many_at_once_hide_the_oldest_volumes(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zfs, "_MOST_MOUNTED", 4)
    base = bench.seal(bench.prepare())
    driver = bench.driver

    def life(number: int) -> None:
        volume = f"of-its-own-{number}"
        driver.create(volume, (base,))
        with mounts.opened(driver.mounts(volume, (base,))) as tree:
            os.mkdir("made", dir_fd=tree)
        driver.remove(volume)

    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(life, range(64))] == [None] * 64
    assert list(driver.volumes()) == [base]


@in_user_space
def test_no_more_volumes_are_in_use_than_zfs_fuse_takes(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by zfs-fuse itself, a mount leaves a volume that is busy for as long as the daemon lives."""
    monkeypatch.setattr(zfs, "_MOST_MOUNTED", 2)
    monkeypatch.setattr(zfs, "_MOST_IN_USE", 4)
    base = bench.seal(bench.prepare())
    volumes = [bench.prepare(base) for _ in range(4)]
    with contextlib.ExitStack() as stack:
        for volume in volumes:
            stack.enter_context(bench.mounted(volume))
        with pytest.raises(FailedPrecondition, match="4 are mounted, and zfs-fuse takes few more"):
            bench.driver.create("one-more", (base,))
        bench.driver.remove("one-more")
        assert bench.driver.most_mounted == 4
    bench.driver.create("one-more", (base,))
    bench.driver.remove("one-more")


@in_user_space
@pytest.mark.parametrize("when", ["written out", "asked for what waits"])
def test_a_volume_that_another_hides_meanwhile_is_hidden(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    driver, volume, hidden = bench.driver, bench.prepare(), []
    assert isinstance(driver, ZfsDriver)
    bench.tree(volume)
    write_out, open_file = driver._write_out, os.open

    def hide() -> None:
        mounts.unmount(driver.root / volume)
        hidden.append(when)

    def written_out(volume: str) -> None:
        write_out(volume)
        hide()

    def opened(path: Any, *arguments: Any, **options: Any) -> int:
        fd = open_file(path, *arguments, **options)
        if str(path).endswith("/waiting"):
            hide()
        return fd

    if when == "written out":
        monkeypatch.setattr(driver, "_write_out", written_out)
    else:
        monkeypatch.setattr(os, "open", opened)
    bench.remove(volume)
    assert hidden == [when]
    assert list(driver.volumes()) == []


def test_diffs_are_those_of_other_drivers(bench: Workbench, tmp_path: Path) -> None:
    """Of trees with times that any ZFS can keep."""
    (tmp_path / "vfs").mkdir(mode=0o700)
    other = Workbench(VfsDriver(tmp_path / "vfs"))
    assert [build(each) for each in (bench, other)] == [build(other)] * 2


@in_kernel
@pytest.mark.parametrize("sealed", [False, True])
def test_zfs_diff_says_what_was_written_to(bench: Workbench, sealed: bool) -> None:
    """And nothing else, which is what makes it quick; whatever the names are made of."""
    names = [b"with space", b"tab\tand\nline", b"\xff\xfe", b"back\\0040slash", "Ü✓".encode()]
    base = bench.prepare()
    with bench.mounted(base) as tree:
        for name in names:
            os.mkdir(os.fsencode(tree) + b"/" + name)
            for inner in (b"same", b"other"):
                os.close(os.open(os.fsencode(tree) + b"/" + name + b"/" + inner, os.O_CREAT | os.O_WRONLY))
    bench.seal(base)
    child = bench.prepare(base)
    with bench.mounted(child) as tree:
        for name in names:
            os.chmod(os.fsencode(tree) + b"/" + name + b"/other", 0o600)
        (tree / "new").write_bytes(b"x")
    if sealed:
        bench.seal(child)
    assert isinstance(bench.driver, ZfsDriver)
    assert bench.driver._written_to(child, base) == {b"", b"new", *(name + b"/other" for name in names)}
    changed = [change.path for change in bench.changes(child)]
    assert changed == sorted([b"", b"new", *(name + b"/other" for name in names)])


def build(bench: Workbench) -> list[bytes]:
    """The diffs of a layer, and of one on it that changes what it has in every way."""
    base = bench.prepare()
    with bench.mounted(base) as tree:
        for name in ("same", "content", "mode", "owner", "gone", "retyped", "attribute"):
            (tree / name).write_bytes(name.encode() * 3000)
        (tree / "dir" / "sub").mkdir(parents=True)
        os.link(tree / "same", tree / "dir" / "link")
        os.mkfifo(tree / "fifo")
        os.setxattr(tree / "same", "user.x", b"\0\xff")
        stamp(tree)
    bench.seal(base)
    child = bench.prepare(base)
    with bench.mounted(child) as tree:
        (tree / "content").write_bytes(b"CONTENT" * 3000)
        os.chmod(tree / "mode", 0o4711)
        os.chown(tree / "owner", 1, 2)
        (tree / "gone").unlink()
        (tree / "retyped").unlink()
        (tree / "retyped").symlink_to("same")
        os.setxattr(tree / "attribute", "user.y", b"")
        (tree / "dir" / "new").write_bytes(b"")
        stamp(tree)
    return [bench.diff(base), bench.diff(child)]


def stamp(tree: Path) -> None:
    for above, folders, files in os.walk(tree, topdown=False):
        for name in [*folders, *files, "."]:
            os.utime(f"{above}/{name}", ns=(10**18, 10**18), follow_symlinks=False)


def test_a_store_of_its_own(tmp_path: Path) -> None:
    """What `layerfs init --driver zfs` does, and what stays when the last session ends."""
    session = open_session(tmp_path / "store", Wanted("zfs", {}, None), create=True)
    assert session.backing.spec.filesystem == "zfs"
    session.driver.create("v", ())
    close_session(session)
    assert left_over(tmp_path) == []
    session = open_session(tmp_path / "store", Wanted(None, {}, None), create=False)
    assert list(session.driver.volumes()) == ["v"]
    close_session(session)
    session.backing.destroy()
    assert left_over(tmp_path) == []


# Crashes


def contents(driver: Driver, volume: str, *parents: str) -> Tree:
    with mounts.opened(driver.mounts(volume, parents, read_only=True)) as fd:
        return read_tree(fd)


def put(driver: Driver, volume: str, *parents: str) -> None:
    with mounts.opened(driver.mounts(volume, parents)) as fd:
        Path(f"/proc/self/fd/{fd}/{volume}").write_bytes(os.urandom(9000))


def commands(event: str, _arguments: tuple[Any, ...]) -> bool:
    return event == "subprocess.Popen"


def test_a_killed_call_can_be_repeated(driver: ZfsDriver) -> None:
    driver.create("base", ())
    put(driver, "base")
    driver.seal("base", ())
    expected = contents(driver, "base")

    def repeated(action: Callable[[], None], prepared: Callable[[], None], checked: Callable[[], None]) -> int:
        step = 0
        while True:
            prepared()
            was_killed = killed(action, step, commands)
            action()
            checked()
            driver.remove("child")
            driver.remove("fork")
            assert list(driver.volumes()) == ["base"]
            if not was_killed:
                return step
            step += 1

    def nothing() -> None: ...

    def child() -> None:
        driver.create("child", ["base"])
        put(driver, "child", "base")

    def is_like_base() -> None:
        assert contents(driver, "child", "base") == expected

    def is_like_child() -> None:
        assert contents(driver, "fork", "base") == contents(driver, "child", "base") != expected

    def is_there() -> None:
        assert contents(driver, "child", "base") != expected

    def is_gone() -> None:
        assert list(driver.volumes()) == ["base"]

    assert repeated(lambda: driver.create("child", ["base"]), nothing, is_like_base) > 0
    assert repeated(lambda: driver.fork("fork", "child", ["base"]), child, is_like_child) > 1
    assert repeated(lambda: driver.seal("child", ["base"]), child, is_there) > 0
    assert repeated(lambda: driver.remove("child"), child, is_gone) > 0


LOOP = """
import sys
from pathlib import Path
from layerfs.drivers.zfs import ZfsDriver
driver = ZfsDriver(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    driver.create("child", ["base"])
    driver.fork("fork", "child", ["base"])
    driver.seal("fork", ["base"])
    driver.remove("child")
    driver.create("child", ["fork", "base"])
    driver.remove("child")
    driver.remove("fork")
"""


def test_a_process_killed_at_random_leaves_nothing(driver: ZfsDriver) -> None:
    """Also in the middle of a command, which then runs on by itself."""
    driver.create("base", ())
    put(driver, "base")
    driver.seal("base", ())
    expected = contents(driver, "base")
    chance = random.Random(5)
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", LOOP, driver.root], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chance.random() * 0.4)
            process.kill()
        again = ZfsDriver(driver.root)
        for volume in ("child", "fork"):
            again.remove(volume)
        assert list(again.volumes()) == ["base"]
        assert contents(again, "base") == expected
        assert [m for m in mount_table.read() if m.target.parent == driver.root and m.target.name != "base"] == []


def test_a_mount_namespace_of_its_own_is_told(root: Path) -> None:
    """What one namespace has up, another cannot take apart."""
    if not zfs_tools.in_user_space():
        pytest.skip("OpenZFS mounts a pool in any namespace")
    backing = Backing.create(root, SPEC)
    try:
        pid = os.fork()
        if pid == 0:
            try:
                api.unshare_mounts()
                api.mount("", "/", "", api.MS_REC | api.MS_PRIVATE)
                backing.up()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        with pytest.raises(FailedPrecondition, match="another mount namespace"):
            backing.up()
        os.kill(Daemon(root).pid() or 0, signal.SIGKILL)
        while Daemon(root).pid() is not None:
            time.sleep(0.01)
        backing.up()
    finally:
        backing.destroy()


def test_mounts_are_what_an_engine_can_mount(bench: Workbench) -> None:
    base = bench.seal(bench.prepare())
    (mount,) = bench.driver.mounts(base, (), read_only=True)
    if zfs_tools.in_user_space():
        assert mount == Mount("bind", str(bench.driver.root / base), ("bind", "ro"))
    else:
        assert mount.type == "zfs"
        assert mount.options == ("ro",)
