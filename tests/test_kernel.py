"""The thin functions of layerfs.kernel, each against the kernel itself."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from layerfs import mounts
from layerfs.driver import Mount
from layerfs.errors import InvalidArgument, KernelRefused
from layerfs.kernel import btrfs, loop, quota, userns, xattr
from layerfs.kernel.clone import reflink
from layerfs.kernel.openat2 import (
    RESOLVE_BENEATH,
    RESOLVE_IN_ROOT,
    RESOLVE_NO_SYMLINKS,
    RESOLVE_NO_XDEV,
    openat2,
)
from layerfs.sizes import format_size, parse_size

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="loop devices and mounts need root")

MIB = 1 << 20

MakeFileSystem = Callable[..., Path]


@pytest.fixture
def opened() -> Iterator[Callable[[str | Path], int]]:
    with ExitStack() as stack:

        def open_(path: str | Path) -> int:
            fd = os.open(path, os.O_RDONLY)
            stack.callback(os.close, fd)
            return fd

        yield open_


@pytest.fixture
def file_system(tmp_path: Path) -> Iterator[MakeFileSystem]:
    """Makes a file system on a sparse file and mounts it through `layerfs.kernel.loop`."""
    with ExitStack() as stack:

        def make(command: list[str], kind: str, *options: str, size: int = 256 * MIB) -> Path:
            image, target = tmp_path / "image", tmp_path / "mounted"
            image.touch()
            os.truncate(image, size)
            subprocess.run([*command, image], check=True, capture_output=True)
            target.mkdir()
            with open(image, "r+b") as file:
                device, fd = loop.attach(file.fileno(), str(image))
            try:
                mounts.attach([Mount(kind, str(device), options)], target)
            finally:
                os.close(fd)
            stack.callback(mounts.unmount, target)
            return target

        yield make
    assert not (tmp_path / "image").exists() or loop.find(tmp_path / "image") == []


# openat2


def test_openat2_stays_inside(tmp_path: Path, opened: Callable[[str | Path], int]) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "passwd").write_text("inside")
    (root / "absolute").symlink_to("/etc/passwd")
    (root / "climbing").symlink_to("../../../../etc/passwd")
    fd = opened(root)
    for name in ("absolute", b"climbing", "../../etc/passwd", "/etc/passwd"):
        with os.fdopen(openat2(fd, name, os.O_RDONLY, resolve=RESOLVE_IN_ROOT)) as file:
            assert file.read() == "inside"
        with pytest.raises(OSError, match="cross-device"):
            openat2(fd, name, os.O_RDONLY, resolve=RESOLVE_BENEATH)
    with pytest.raises(OSError, match="symbolic links"):
        openat2(fd, "absolute", os.O_RDONLY, resolve=RESOLVE_NO_SYMLINKS)
    with pytest.raises(OSError, match="cross-device"):
        openat2(opened("/"), "proc/self", os.O_RDONLY, resolve=RESOLVE_NO_XDEV)


def test_openat2_creates_and_closes_on_exec(tmp_path: Path, opened: Callable[[str | Path], int]) -> None:
    fd = openat2(opened(tmp_path), "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o640)
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileExistsError):
        openat2(opened(tmp_path), "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o640)
    with pytest.raises(OSError, match="NUL"):
        openat2(opened(tmp_path), b"new\0er", os.O_RDONLY)


# clone


@needs_root
def test_reflink(file_system: MakeFileSystem, tmp_path: Path) -> None:
    target = file_system(["mkfs.btrfs", "-q"], "btrfs")
    content = os.urandom(100_000)
    (target / "a").write_bytes(content)
    with open(target / "a", "rb") as src, open(target / "b", "wb") as dst, open(tmp_path / "c", "wb") as other:
        assert reflink(src.fileno(), dst.fileno())
        assert not reflink(src.fileno(), other.fileno())
    assert (target / "b").read_bytes() == content


# btrfs


@needs_root
def test_btrfs_subvolumes(file_system: MakeFileSystem, opened: Callable[[str | Path], int]) -> None:
    target = file_system(["mkfs.btrfs", "-q"], "btrfs", "user_subvol_rm_allowed")
    top = opened(target)
    btrfs.create(top, "one")
    with pytest.raises(FileExistsError):
        btrfs.create(top, b"one")
    one = opened(target / "one")
    (target / "one" / "file").write_text("x")
    btrfs.snapshot(one, top, "two", read_only=True)
    two = opened(target / "two")
    assert (target / "two" / "file").read_text() == "x"
    assert btrfs.is_subvolume(two)
    assert btrfs.is_read_only(two)
    assert not btrfs.is_read_only(one)
    assert btrfs.info(two).parent_uuid == btrfs.info(one).uuid
    assert btrfs.info(two).name == b"two"
    assert btrfs.info(two).read_only
    with pytest.raises(OSError, match="Read-only"):
        (target / "two" / "file").write_text("y")
    btrfs.set_read_only(two, False)
    (target / "two" / "file").write_text("y")
    (target / "plain").mkdir()
    assert not btrfs.is_subvolume(opened(target / "plain"))
    for bad in ("", "a/b", b"a\0b", "x" * 5000):
        with pytest.raises(OSError, match="no name"):
            btrfs.create(top, bad)


@needs_root
def test_btrfs_destroy_takes_nested_subvolumes_along(
    file_system: MakeFileSystem, opened: Callable[[str | Path], int]
) -> None:
    target = file_system(["mkfs.btrfs", "-q"], "btrfs")
    top = opened(target)
    btrfs.create(top, "one")
    (target / "one" / "a" / "b").mkdir(parents=True)
    deep = os.open(target / "one" / "a" / "b", os.O_RDONLY)
    btrfs.create(deep, "in 1")
    inner = os.open(target / "one" / "a" / "b" / "in 1", os.O_RDONLY)
    btrfs.create(inner, "in 2")
    btrfs.set_read_only(inner, True)
    one = os.open(target / "one", os.O_RDONLY)
    for number in range(300):
        btrfs.create(one, f"n{number}")
    found = btrfs.nested(one)
    assert len(found) == 301
    assert (b"a/b", b"in 1") in found
    assert (b".", b"n7") in found
    btrfs.set_read_only(one, True)
    for fd in (one, inner, deep):
        os.close(fd)
    btrfs.destroy(top, "one")
    assert os.listdir(target) == []
    assert btrfs.nested(top) == []
    with pytest.raises(FileNotFoundError):
        btrfs.destroy(top, "one")


@needs_root
def test_btrfs_quota(file_system: MakeFileSystem, opened: Callable[[str | Path], int]) -> None:
    target = file_system(["mkfs.btrfs", "-q"], "btrfs")
    top = opened(target)
    btrfs.create(top, "one")
    one = opened(target / "one")
    assert btrfs.quota_group(top, btrfs.info(one).id) is None
    btrfs.enable_quota(top)
    btrfs.enable_quota(top)
    btrfs.wait_for_rescan(top)
    (target / "one" / "shared").write_bytes(os.urandom(MIB))
    os.sync()
    btrfs.snapshot(one, top, "two")
    two = opened(target / "two")
    (target / "two" / "own").write_bytes(os.urandom(2 * MIB))
    btrfs.sync(top)
    used = btrfs.quota_group(top, btrfs.info(two).id)
    assert used is not None
    assert 3 * MIB <= used.referenced < 4 * MIB
    assert 2 * MIB <= used.exclusive < 3 * MIB
    btrfs.limit(two, referenced=5 * MIB)
    with pytest.raises(OSError, match="quota"):
        (target / "two" / "big").write_bytes(os.urandom(20 * MIB))
    btrfs.limit(two)
    (target / "two" / "big").write_bytes(os.urandom(8 * MIB))


@needs_root
def test_btrfs_search_by_generation(file_system: MakeFileSystem, opened: Callable[[str | Path], int]) -> None:
    target = file_system(["mkfs.btrfs", "-q"], "btrfs")
    btrfs.create(opened(target), "one")
    one = opened(target / "one")
    for number in range(5000):
        (target / "one" / f"file{number}").touch()
    btrfs.sync(one)
    before = btrfs.info(one).generation
    inodes = {i.objectid for i in btrfs.search(one, 0, types=(btrfs.INODE_ITEM_KEY, btrfs.INODE_ITEM_KEY))}
    assert len(inodes) == 5001
    changed = target / "one" / "file77"
    changed.write_text("new")
    btrfs.sync(one)
    kinds = (btrfs.INODE_ITEM_KEY, btrfs.INODE_ITEM_KEY)
    recent = {i.objectid for i in btrfs.search(one, 0, types=kinds, min_transid=before + 1)}
    assert changed.stat().st_ino in recent
    assert len(recent) < 1000


# loop


@needs_root
def test_loop_device(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"\0" * MIB)
    with open(image, "r+b") as file:
        device, fd = loop.attach(file.fileno(), "name", direct_io=True)
    try:
        assert loop.find(image) == [device]
        image.rename(tmp_path / "renamed")
        assert loop.find(tmp_path / "renamed") == [device]
        os.pwrite(fd, b"x" * 4096, 4096)
        os.fsync(fd)
        assert os.lseek(fd, 0, os.SEEK_END) == MIB
        os.truncate(tmp_path / "renamed", 2 * MIB)
        loop.set_capacity(fd)
        assert os.lseek(fd, 0, os.SEEK_END) == 2 * MIB
    finally:
        os.close(fd)
    assert (tmp_path / "renamed").read_bytes()[4096:8192] == b"x" * 4096
    assert _soon(lambda: loop.find(tmp_path / "renamed") == [])
    loop.detach(device)


def _soon(condition: Callable[[], bool]) -> bool:
    """Whether it comes true; udev may hold a device for a moment."""
    for _ in range(100):
        if condition():
            return True
        time.sleep(0.05)
    return False


@needs_root
def test_loop_devices_for_many_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from layerfs.kernel import loop\n"
        "with open(sys.argv[1], 'r+b') as f: path, fd = loop.attach(f.fileno())\n"
        "print(path, flush=True); sys.stdin.read()\n"
    )
    processes = []
    for number in range(6):
        (tmp_path / str(number)).write_bytes(b"\0" * MIB)
        command = [sys.executable, "-c", code, str(tmp_path / str(number))]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    paths = [process.stdout.readline() for process in processes if process.stdout]
    for process in processes:
        process.communicate()
    assert len(set(paths)) == 6
    assert all(path.startswith("/dev/loop") for path in paths)


# quota


@needs_root
def test_project_quota_on_ext4(file_system: MakeFileSystem, opened: Callable[[str | Path], int]) -> None:
    mkfs = ["mkfs.ext4", "-q", "-F", "-O", "quota,project", "-E", "quotatype=prjquota"]
    try:
        target = file_system(mkfs, "ext4", "prjquota")
    except KernelRefused:
        pytest.skip("this kernel has no ext4 quota (CONFIG_QFMT_V2)")
    assert quota.supported(target)
    (target / "limited").mkdir()
    fd = opened(target / "limited")
    assert quota.project(fd) == 0
    quota.set_project(fd, 4711)
    assert quota.project(fd) == 4711
    quota.set_limit(fd, 4711, MIB + 1)
    (target / "limited" / "sub").mkdir()
    (target / "limited" / "sub" / "file").write_bytes(b"x" * 500_000)
    os.sync()
    used = quota.usage(fd, 4711)
    assert 500_000 <= used.space < 600_000
    assert used.inodes == 3
    assert used.limit == MIB + 1024
    os.chmod(target, 0o755)
    os.chmod(target / "limited", 0o777)
    code = (
        "import os, sys\n"
        "os.chdir(sys.argv[1]); os.setgid(65534); os.setuid(65534)\n"
        "try: open('big', 'wb').write(b'x' * 2_000_000)\n"
        "except OSError as error: sys.exit(error.errno)\n"
    )
    os.chmod(target.parent, 0o755)
    result = subprocess.run([sys.executable, "-c", code, "."], check=False, cwd=target / "limited")
    assert result.returncode == errno.EDQUOT


@needs_root
def test_project_quota_is_not_claimed_where_it_is_not(file_system: MakeFileSystem) -> None:
    assert not quota.supported("/proc")
    assert not quota.supported("/dev")
    assert not quota.supported("/absent")
    assert not quota.supported(file_system(["mkfs.ext4", "-q", "-F"], "ext4"))


# user namespaces


def test_ids_outside_a_user_namespace() -> None:
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        pytest.skip("this is a user namespace itself")
    assert not userns.in_user_namespace()
    assert userns.mapped(0)
    assert userns.mapped(4_000_000_000)


ENTER = """
import ctypes, os, sys, tempfile
from pathlib import Path
from layerfs import mounts
from layerfs.driver import Mount
from layerfs.kernel import mountapi, userns
import pwd, subprocess
if os.geteuid() == 0:
    if len(sys.argv) > 1:  # ranges for the user nobody, seen by this process only
        os.chmod(sys.argv[1], 0o644)
        mountapi.libc.unshare(0x20000)
        mountapi.mount("", "/", "", mountapi.MS_REC | mountapi.MS_PRIVATE)
        for name in ("/etc/subuid", "/etc/subgid"):
            mountapi.mount(sys.argv[1], name, "", mountapi.MS_BIND)
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, which setuid cleared: /proc/self is ours again
userns.enter()
assert (os.geteuid(), os.getegid()) == (0, 0), os.geteuid()
assert userns.in_user_namespace()
assert userns.mapped(0) and userns.mapped_group(0)
many = userns.mapped(100)
assert userns.mapped_group(100) == many
place = Path(tempfile.mkdtemp())
mounts.attach([Mount("tmpfs", "tmpfs")], place)
(place / "file").touch()
if many:
    os.chown(place / "file", 100, 65536)
mounts.unmount(place)
place.rmdir()
print("many" if many else "one")
"""


@pytest.mark.parametrize("ranges", ["", "nobody:100000:65536"])
def test_enter_user_namespace(ranges: str, tmp_path: Path) -> None:
    arguments = []
    if ranges:
        if os.geteuid() != 0 or not shutil.which("newuidmap") or not Path("/etc/subuid").exists():
            pytest.skip("needs root, and the package uidmap")
        (tmp_path / "ranges").write_text(ranges + "\n")
        arguments = [str(tmp_path / "ranges")]
    result = subprocess.run([sys.executable, "-c", ENTER, *arguments], capture_output=True, text=True, check=False)
    if "making a user namespace" in result.stderr:
        pytest.skip("this host forbids user namespaces")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ("many" if ranges else "one")


def test_enter_is_nothing_for_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    before = os.readlink("/proc/self/ns/user")
    userns.enter()
    assert os.readlink("/proc/self/ns/user") == before


# sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("10G", 10 << 30), ("64m", 64 << 20), ("1.5GiB", 3 << 29), ("2 TB", 2 << 40), ("7B", 7)],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1 2", "1e3", "10GG", "0x10", "1.", "NaN"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(InvalidArgument, match="not a size"):
        parse_size(text)


def test_format_size() -> None:
    assert format_size(3 << 29) == "1.5 GiB"
    assert parse_size(format_size(64 << 20)) == 64 << 20


def test_an_extended_attribute_of_any_length_is_read_from_a_path_a_link_or_a_descriptor(
    tmp_path: Path, opened: Callable[[str | Path], int]
) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.touch()
    link.symlink_to(path)
    for value in (b"", b"\0\xff\0", bytes(3000)):
        os.setxattr(path, "user.x", value)
        assert xattr.get(path, "user.x") == value
        assert xattr.get(link, b"user.x") == value
        assert xattr.get(opened(path), "user.x", follow_symlinks=False) == value
    with pytest.raises(OSError, match="link") as refused:
        xattr.get(link, "user.x", follow_symlinks=False)
    assert refused.value.errno in (errno.ENODATA, errno.EOPNOTSUPP)
