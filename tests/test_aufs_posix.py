"""What programs may expect of a root file system: each check runs in a plain directory, which proves it, and in a union
whose files all come from lower branches."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from layerfs import mounts
from layerfs.drivers.aufs.driver import AufsDriver
from layerfs.kernel.libc import libc

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="several users and devices need root")

NOBODY = 65534
LONGEST = "l" * 255
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


def fill_base(root: Path) -> None:
    (root / "file").write_bytes(b"0123456789" * 1000)
    (root / "large").write_bytes(os.urandom(1 << 20) + b"end")
    (root / "empty").touch()
    (root / "dir" / "sub" / "deep").mkdir(parents=True)
    (root / "dir" / "one").write_bytes(b"1")
    (root / "dir" / "sub" / "two").write_bytes(b"2")
    (root / "dir" / "sub" / "deep" / "three").write_bytes(b"3")
    (root / "hollow").mkdir()
    for name in ("a", "b", "dir/c"):
        with contextlib.suppress(FileExistsError):
            (root / name).unlink(missing_ok=True)
    (root / "a").write_bytes(b"linked")
    os.link(root / "a", root / "b")
    os.link(root / "a", root / "dir" / "c")
    for directory in (root, root / "dir" / "sub"):
        (directory / LONGEST).write_bytes(b"long")
    os.symlink("file", root / "symlink")
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))


def fill_middle(root: Path) -> None:
    (root / "dir" / "sub" / "four").write_bytes(b"4")
    (root / "dir" / "one").unlink()
    (root / "dir" / "sub" / "deep" / "three").write_bytes(b"three")
    (root / "shared").mkdir()
    os.chmod(root / "shared", 0o1777)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory that every user can reach."""
    with tempfile.TemporaryDirectory(prefix="layerfs-posix-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def driver(place: Path) -> AufsDriver:
    """With two sealed layers."""
    (place / "store").mkdir()
    driver = AufsDriver(place / "store")
    target = place / "making"
    target.mkdir()
    driver.create("base", ())
    with mounted(driver, target, "base"):
        fill_base(target)
    driver.seal("base", ())
    driver.create("middle", ["base"])
    with mounted(driver, target, "middle", "base"):
        fill_middle(target)
    driver.seal("middle", ["base"])
    return driver


@pytest.fixture(params=["plain", "union"])
def root(request: pytest.FixtureRequest, place: Path, driver: AufsDriver) -> Iterator[Path]:
    target = place / "root"
    target.mkdir()
    try:
        if request.param == "plain":
            fill_base(target)
            fill_middle(target)
            yield target
            return
        driver.create("top", ["middle", "base"])
        with mounted(driver, target, "top", "middle", "base"):
            yield target
        driver.remove("top")
    finally:
        shutil.rmtree(target)


@contextlib.contextmanager
def mounted(driver: AufsDriver, target: Path, volume: str, *parents: str) -> Iterator[None]:
    mounts.attach(driver.mounts(volume, parents), target)
    try:
        yield
    finally:
        mounts.unmount(target)


def as_user(uid: int, action: Callable[[], object], *, gid: int | None = None, groups: tuple[int, ...] = ()) -> int:
    """Run ``action`` as another user in a process of its own; 1 if it returns True, or the number of its `OSError`."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(groups)
            os.setgid(uid if gid is None else gid)
            os.setuid(uid)
            code = int(action() is True)
        except OSError as error:
            code = error.errno or 255
        except BaseException:
            code = 255
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def refused(number: int, action: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is checked below
        action()
    assert caught.value.errno == number, errno.errorcode[caught.value.errno or 0]


# Renaming


def test_a_file_is_renamed_over_another(root: Path) -> None:
    inode = os.stat(root / "file").st_ino
    os.rename(root / "file", root / "large")
    assert (root / "large").read_bytes().startswith(b"0123")
    assert os.stat(root / "large").st_ino == inode
    assert not (root / "file").exists()
    assert "file" not in os.listdir(root)


def test_a_directory_with_all_that_is_in_it_is_renamed(root: Path) -> None:
    inode = os.stat(root / "dir").st_ino
    held = os.open(root / "dir" / "sub", os.O_RDONLY)
    os.rename(root / "dir", root / "hollow" / "moved")
    assert os.stat(root / "hollow" / "moved").st_ino == inode
    assert (root / "hollow" / "moved" / "sub" / "deep" / "three").read_bytes() == b"three"
    assert sorted(os.listdir(root / "hollow" / "moved")) == ["c", "sub"]
    assert sorted(os.listdir(held)) == ["deep", "four", LONGEST, "two"]
    assert not (root / "dir").exists()
    os.close(held)
    os.mkdir(root / "dir")
    assert os.listdir(root / "dir") == []
    (root / "hollow" / "moved" / "c").write_bytes(b"through a moved name")
    assert (root / "a").read_bytes() == b"through a moved name"


def test_a_directory_is_renamed_over_an_empty_one_only(root: Path) -> None:
    refused(errno.ENOTEMPTY, lambda: os.rename(root / "hollow", root / "dir"))
    shutil.rmtree(root / "dir" / "sub")
    (root / "dir" / "c").unlink()
    os.rename(root / "hollow", root / "dir")
    assert os.listdir(root / "dir") == []
    refused(errno.ENOTDIR, lambda: os.rename(root / "dir", root / "file"))
    refused(errno.EISDIR, lambda: os.rename(root / "file", root / "dir"))
    (root / "shared" / "below").mkdir()
    refused(errno.EINVAL, lambda: os.rename(root / "shared", root / "shared" / "below" / "x"))


def test_two_names_change_places(root: Path) -> None:
    renameat2 = libc.renameat2
    done = renameat2(-100, os.fsencode(root / "dir"), -100, os.fsencode(root / "file"), 2)
    assert done == 0
    assert (root / "dir").read_bytes().startswith(b"0123")
    assert (root / "file" / "sub" / "deep" / "three").read_bytes() == b"three"
    assert renameat2(-100, os.fsencode(root / "a"), -100, os.fsencode(root / "empty"), 1) != 0
    assert renameat2(-100, os.fsencode(root / "a"), -100, os.fsencode(root / "fresh"), 1) == 0
    assert (root / "fresh").read_bytes() == b"linked"


def test_back_and_forth_leaves_what_was_there(root: Path) -> None:
    for _ in range(3):
        os.rename(root / "dir" / "sub", root / "sub")
        os.rename(root / "sub", root / "dir" / "sub")
        os.rename(root / "file", root / "elsewhere")
        os.rename(root / "elsewhere", root / "file")
    assert (root / "dir" / "sub" / "deep" / "three").read_bytes() == b"three"
    assert sorted(os.listdir(root / "dir" / "sub")) == ["deep", "four", LONGEST, "two"]


# Links


def test_what_is_written_through_one_name_shows_under_all(root: Path) -> None:
    inode = os.stat(root / "a").st_ino
    with open(root / "b", "ab") as file:
        file.write(b" and more")
    assert (root / "a").read_bytes() == (root / "dir" / "c").read_bytes() == b"linked and more"
    assert {os.stat(root / name).st_ino for name in ("a", "b", "dir/c")} == {inode}
    assert os.stat(root / "a").st_nlink == 3


def test_link_counts_follow_what_happens(root: Path) -> None:
    assert os.stat(root / "a").st_nlink == 3
    os.unlink(root / "b")
    assert os.stat(root / "a").st_nlink == 2
    os.link(root / "a", root / "new")
    assert os.stat(root / "new").st_nlink == 3
    os.unlink(root / "dir" / "c")
    os.unlink(root / "a")
    assert os.stat(root / "new").st_nlink == 1
    with open(root / "new", "rb") as file:
        os.unlink(root / "new")
        assert os.fstat(file.fileno()).st_nlink == 0
        assert file.read() == b"linked"


def test_directories_count_their_subdirectories(root: Path) -> None:
    before = os.stat(root / "dir").st_nlink
    assert before == 3
    (root / "dir" / "another").mkdir()
    assert os.stat(root / "dir").st_nlink == before + 1
    os.rename(root / "dir" / "another", root / "another")
    shutil.rmtree(root / "dir" / "sub")
    assert os.stat(root / "dir").st_nlink == 2


def test_symbolic_links_and_their_attributes(root: Path) -> None:
    os.chown(root / "symlink", 7, 8, follow_symlinks=False)
    os.utime(root / "symlink", ns=(1, 2_000_000_003), follow_symlinks=False)
    info = os.lstat(root / "symlink")
    assert (info.st_uid, info.st_gid, info.st_mtime_ns) == (7, 8, 2_000_000_003)
    assert os.readlink(root / "symlink") == "file"
    assert os.stat(root / "symlink").st_uid == 0
    os.symlink("x" * 4000, root / "long")
    assert os.readlink(root / "long") == "x" * 4000
    refused(errno.ELOOP, lambda: os.open(root / "symlink", os.O_RDONLY | os.O_NOFOLLOW))


# Open files


def test_an_open_file_lives_on_without_its_name(root: Path) -> None:
    for name in ("file", "large"):
        size = os.stat(root / name).st_size
        with open(root / name, "r+b") as file:
            os.unlink(root / name)
            assert os.fstat(file.fileno()).st_size == size
            file.seek(0, os.SEEK_END)
            file.write(b"!")
            file.flush()
            os.fchmod(file.fileno(), 0o600)
            os.fsync(file.fileno())
            info = os.fstat(file.fileno())
            assert (info.st_size, stat.S_IMODE(info.st_mode), info.st_nlink) == (size + 1, 0o600, 0)
            file.seek(size)
            assert file.read() == b"!"
        (root / name).write_bytes(b"another")
        assert os.stat(root / name).st_size == 7


def test_a_file_open_for_reading_lives_on_and_may_be_changed(root: Path) -> None:
    with open(root / "file", "rb") as file:
        os.unlink(root / "file")
        os.fchown(file.fileno(), 5, 6)
        os.utime(file.fileno(), ns=(1, 1))
        info = os.fstat(file.fileno())
        assert (info.st_uid, info.st_gid, info.st_mtime_ns) == (5, 6, 1)
        assert file.read(4) == b"0123"


def test_a_reader_sees_what_is_written_after_it_opened(root: Path) -> None:
    with open(root / "file", "rb", buffering=0) as reader, open(root / "large", "rb", buffering=0) as other:
        assert reader.read(3) == b"012"
        with open(root / "file", "r+b") as writer:
            writer.write(b"WRITTEN")
        assert os.pread(reader.fileno(), 7, 0) == b"WRITTEN"
        with open(root / "large", "r+b") as writer:
            writer.write(b"WRITTEN")
        assert os.pread(other.fileno(), 7, 0) == b"WRITTEN"
        assert os.pread(other.fileno(), 9, 1 << 20) == b"end"


def test_append_and_truncate(root: Path) -> None:
    fds = [os.open(root / "file", os.O_WRONLY | os.O_APPEND) for _ in range(2)]
    for number in range(10):
        os.write(fds[number % 2], b"%d" % number)
    assert (root / "file").read_bytes().endswith(b"90123456789")
    assert os.stat(root / "file").st_size == 10_010
    os.close(os.open(root / "file", os.O_WRONLY | os.O_TRUNC))
    assert os.stat(root / "file").st_size == 0
    os.write(fds[0], b"again")
    assert (root / "file").read_bytes() == b"again"
    os.truncate(root / "large", 1 << 19)
    assert os.stat(root / "large").st_size == 1 << 19
    os.ftruncate(fds[1], 1 << 16)
    assert (root / "file").read_bytes() == b"again" + bytes((1 << 16) - 5)
    for fd in fds:
        os.close(fd)


def test_truncating_a_file_that_is_only_read_elsewhere(root: Path) -> None:
    with open(root / "file", "rb", buffering=0) as reader:
        os.close(os.open(root / "file", os.O_WRONLY | os.O_TRUNC))
        assert reader.read() == b""


def test_shared_mappings_show_in_the_file_and_in_each_other(root: Path) -> None:
    with open(root / "file", "r+b") as one, open(root / "file", "r+b") as two, open(root / "file", "rb") as three:
        maps = [mmap.mmap(one.fileno(), 0), mmap.mmap(two.fileno(), 0)]
        read_only = mmap.mmap(three.fileno(), 0, prot=mmap.PROT_READ)
        private = mmap.mmap(three.fileno(), 0, flags=mmap.MAP_PRIVATE)
        private[0:4] = b"mine"
        maps[0][0:6] = b"MAPPED"
        assert maps[1][0:6] == read_only[0:6] == b"MAPPED"
        maps[0].flush()
        assert os.pread(two.fileno(), 6, 0) == b"MAPPED"
        os.pwrite(two.fileno(), b"written", 4096)
        assert maps[0][4096:4103] == b"written"
        for mapping in (*maps, read_only, private):
            mapping.close()
    assert (root / "file").read_bytes().startswith(b"MAPPED")


def test_holes_and_allocated_space(root: Path) -> None:
    with open(root / "sparse", "wb") as file:
        file.truncate(8 << 20)
        os.pwrite(file.fileno(), b"data", 4 << 20)
        os.fsync(file.fileno())
        assert os.fstat(file.fileno()).st_blocks * 512 < 1 << 20
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 4 << 20
        os.posix_fallocate(file.fileno(), 0, 1 << 20)
        assert os.fstat(file.fileno()).st_size == 8 << 20
    with open(root / "sparse", "rb") as source, open(root / "copy", "wb") as target:
        assert os.copy_file_range(source.fileno(), target.fileno(), 4, 4 << 20, 0) == 4
    assert (root / "copy").read_bytes() == b"data"


def test_data_that_is_not_yet_written_back_is_no_hole(root: Path) -> None:
    """What cp(1) relies on when it copies a file that somebody is writing."""
    with open(root / "growing", "wb", buffering=0) as file, open(root / "growing", "rb") as reader:
        for number in range(1, 4):
            file.write(b"x" * (1 << 20))
            assert os.lseek(reader.fileno(), (number << 20) - 1, os.SEEK_DATA) == (number << 20) - 1
            assert os.lseek(reader.fileno(), 0, os.SEEK_HOLE) == number << 20
        subprocess.run(["cp", root / "growing", root / "copied"], check=True)
    assert (root / "copied").read_bytes() == b"x" * (3 << 20)


def test_a_file_without_a_name(root: Path) -> None:
    fd = os.open(root / "shared", os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"hidden")
    assert os.listdir(root / "shared") == []
    os.link(f"/proc/self/fd/{fd}", root / "shared" / "named", src_dir_fd=fd, follow_symlinks=True)
    os.close(fd)
    assert (root / "shared" / "named").read_bytes() == b"hidden"
    info = os.stat(root / "shared" / "named")
    assert (stat.S_IMODE(info.st_mode) & ~0o022, info.st_nlink) == (0o640, 1)


def test_locks(root: Path) -> None:
    with open(root / "file", "r+b") as one, open(root / "file", "r+b") as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        refused(errno.EAGAIN, lambda: fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB))
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_many_write_at_once(root: Path) -> None:
    def append(number: int) -> None:
        with open(root / "shared" / "log", "ab", buffering=0) as file:
            file.writelines(b"%d" % number * 100 + b"\n" for _ in range(50))

    threads = [threading.Thread(target=append, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (root / "shared" / "log").read_bytes().splitlines()
    assert len(lines) == 400
    assert all(len(line) == 100 and len(set(line)) == 1 for line in lines)


# Attributes


def test_modes_owners_and_times(root: Path) -> None:
    for name in ("file", "dir", "fifo", "null"):
        os.chmod(root / name, 0o2751)
        os.chown(root / name, 123, 456)
        os.utime(root / name, ns=(1_000_000_000_123_456_789, -1_500_000_000))
        info = os.stat(root / name)
        assert (info.st_uid, info.st_gid) == (123, 456), name
        assert (info.st_atime_ns, info.st_mtime_ns) == (1_000_000_000_123_456_789, -1_500_000_000), name
    assert os.stat(root / "null").st_rdev == os.makedev(1, 3)
    assert stat.S_IMODE(os.stat(root / "dir").st_mode) == 0o2751


def test_times_change_when_they_have_to(root: Path) -> None:
    os.utime(root / "dir", ns=(0, 0))
    os.utime(root / "file", ns=(0, 0))
    (root / "dir" / "new").touch()
    assert os.stat(root / "dir").st_mtime_ns > 0
    with open(root / "file", "ab") as file:
        file.write(b"x")
    assert os.stat(root / "file").st_mtime_ns > 0
    os.utime(root / "dir", ns=(0, 0))
    os.chmod(root / "dir" / "sub" / "two", 0o600)
    os.chmod(root / "dir" / "c", 0o600)
    assert os.stat(root / "dir").st_mtime_ns == 0
    before = os.stat(root / "file").st_ctime_ns
    os.chmod(root / "file", 0o600)
    assert os.stat(root / "file").st_ctime_ns > before


def test_writing_through_a_mapping_changes_times_also_when_the_file_is_closed(root: Path) -> None:
    with open(root / "file", "r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
    for _ in range(2):
        mapping[0:1] = b"x"
        mapping.flush()
        os.utime(root / "file", ns=(0, 0))
        assert os.stat(root / "file").st_mtime_ns == 0
        mapping[0:1] = b"y"
        mapping.flush()
        assert os.stat(root / "file").st_mtime_ns > 0
    mapping.close()


def test_direct_reading_and_writing(root: Path) -> None:
    block = mmap.mmap(-1, 1 << 16)
    fd = os.open(root / "large", os.O_RDWR | os.O_DIRECT)
    with open(root / "large", "r+b", buffering=0) as other:
        assert os.preadv(fd, [block], 0) == 1 << 16
        assert block[:] == os.pread(other.fileno(), 1 << 16, 0)
        other.write(b"other")
        os.preadv(fd, [block], 0)
        assert block[:5] == b"other"
        block[:5] = b"block"
        assert os.pwritev(fd, [block], 0) == 1 << 16
        assert os.pread(other.fileno(), 5, 0) == b"block"
    os.close(fd)


def test_extended_attributes(root: Path) -> None:
    for path in (root / "file", root / "dir"):
        os.setxattr(path, "user.one", b"\0\xff")
        os.setxattr(path, "user.two", b"")
        refused(errno.EEXIST, partial(os.setxattr, path, "user.one", b"", os.XATTR_CREATE))
        refused(errno.ENODATA, partial(os.setxattr, path, "user.none", b"", os.XATTR_REPLACE))
        refused(errno.ENODATA, partial(os.getxattr, path, "user.none"))
        assert {"user.one", "user.two"} <= set(os.listxattr(path))
        assert os.getxattr(path, "user.one") == b"\0\xff"
        os.removexattr(path, "user.two")
        assert "user.two" not in os.listxattr(path)
    refused(errno.EPERM, lambda: os.setxattr(root / "symlink", "user.x", b"", follow_symlinks=False))
    os.setxattr(root / "file", "trusted.t", b"t")
    assert as_user(NOBODY, lambda: "trusted.t" in os.listxattr(root / "file")) == 0
    assert os.getxattr(root / "file", "trusted.t") == b"t"


def test_writing_clears_capabilities_and_special_bits(root: Path) -> None:
    os.chmod(root / "file", 0o6777)
    os.setxattr(root / "file", "security.capability", CAPABILITY)

    def write() -> None:
        with open(root / "file", "r+b", buffering=0) as file:
            file.write(b"x")

    assert as_user(NOBODY, write) == 0
    assert stat.S_IMODE(os.stat(root / "file").st_mode) == 0o777
    refused(errno.ENODATA, lambda: os.getxattr(root / "file", "security.capability"))
    os.chmod(root / "file", 0o6777)
    assert as_user(NOBODY, lambda: os.truncate(root / "file", 10)) == 0
    assert stat.S_IMODE(os.stat(root / "file").st_mode) == 0o777
    os.chmod(root / "file", 0o6777)
    write()
    assert stat.S_IMODE(os.stat(root / "file").st_mode) == 0o6777
    os.chown(root / "file", NOBODY, NOBODY)
    assert stat.S_IMODE(os.stat(root / "file").st_mode) == 0o777


def test_writing_clears_special_bits_that_were_set_since_the_file_was_opened(root: Path) -> None:
    (root / "file").chmod(0o666)

    def write() -> bool:
        fd = os.open(root / "file", os.O_WRONLY)
        os.write(fd, b"x")
        os.write(ask, b"x")
        os.read(answer, 1)
        return os.write(fd, b"x") == 1

    asked, ask = os.pipe()
    answer, told = os.pipe()

    def change() -> None:
        os.read(asked, 1)
        os.chmod(root / "file", 0o6777)
        os.write(told, b"x")

    changer = threading.Thread(target=change)
    changer.start()
    assert as_user(NOBODY, write) == 1
    changer.join()
    for fd in (asked, ask, answer, told):
        os.close(fd)
    assert stat.S_IMODE(os.stat(root / "file").st_mode) == 0o777


def test_capabilities_survive_what_does_not_write(root: Path) -> None:
    os.setxattr(root / "file", "security.capability", CAPABILITY)
    os.rename(root / "file", root / "moved")
    os.chmod(root / "moved", 0o755)
    assert os.getxattr(root / "moved", "security.capability") == CAPABILITY


def test_access_control_lists(root: Path) -> None:
    if shutil.which("setfacl") is None:
        pytest.skip("setfacl is not installed")
    os.chmod(root / "file", 0o600)
    assert as_user(NOBODY, lambda: os.close(os.open(root / "file", os.O_RDONLY))) == errno.EACCES
    subprocess.run(["setfacl", "-m", f"u:{NOBODY}:r", root / "file"], check=True)
    assert as_user(NOBODY, lambda: os.close(os.open(root / "file", os.O_RDONLY))) == 0
    subprocess.run(["setfacl", "-d", "-m", f"u:{NOBODY}:rwx", root / "shared"], check=True)
    os.close(os.open(root / "shared" / "heir", os.O_CREAT | os.O_WRONLY, 0o666))
    listed = subprocess.run(["getfacl", "-cn", root / "shared" / "heir"], check=True, capture_output=True, text=True)
    assert f"user:{NOBODY}:rwx" in listed.stdout


# Users


def test_permissions_are_checked_for_each_user(root: Path) -> None:
    os.chmod(root / "file", 0o640)
    os.chown(root / "file", 0, 77)
    reading = lambda: os.close(os.open(root / "file", os.O_RDONLY))  # noqa: E731
    assert as_user(NOBODY, reading) == errno.EACCES
    assert as_user(NOBODY, reading, groups=(77,)) == 0
    assert as_user(NOBODY, lambda: os.mkdir(root / "dir" / "mine")) == errno.EACCES
    assert as_user(NOBODY, lambda: os.chmod(root / "large", 0o777)) == errno.EPERM
    assert as_user(NOBODY, lambda: os.chown(root / "large", NOBODY, NOBODY)) == errno.EPERM


def test_what_a_user_makes_is_the_user_s(root: Path) -> None:
    def make() -> None:
        os.umask(0o027)
        where = root / "shared"
        (where / "made").mkdir(mode=0o777)
        os.close(os.open(where / "made" / "file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.symlink("x", where / "made" / "link")
        os.mkfifo(where / "made" / "fifo", 0o666)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(where / "made" / "socket"))
            server.listen()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(where / "made" / "socket"))

    assert as_user(1234, make, gid=4321) == 0
    made = root / "shared" / "made"
    assert stat.S_IMODE(os.stat(made).st_mode) == 0o750
    assert stat.S_IMODE(os.stat(made / "file").st_mode) == 0o640
    for path in (made, made / "file", made / "link", made / "fifo", made / "socket"):
        info = os.lstat(path)
        assert (info.st_uid, info.st_gid) == (1234, 4321), path


def test_a_set_group_id_directory_gives_its_group(root: Path) -> None:
    os.chown(root / "shared", 0, 55)
    os.chmod(root / "shared", 0o3777)

    def make() -> None:
        (root / "shared" / "sub").mkdir()
        (root / "shared" / "file").touch()

    assert as_user(1234, make, gid=4321) == 0
    assert os.stat(root / "shared" / "sub").st_gid == os.stat(root / "shared" / "file").st_gid == 55
    assert os.stat(root / "shared" / "sub").st_mode & stat.S_ISGID


def test_a_sticky_directory_protects_files_of_others(root: Path) -> None:
    (root / "shared" / "kept").touch()
    os.chown(root / "shared" / "kept", 1, 1)
    assert as_user(NOBODY, lambda: os.unlink(root / "shared" / "kept")) == errno.EPERM
    assert as_user(NOBODY, lambda: os.rename(root / "shared" / "kept", root / "shared" / "x")) == errno.EPERM
    assert as_user(1, lambda: os.unlink(root / "shared" / "kept")) == 0


def test_a_program_runs_and_is_busy_meanwhile(root: Path) -> None:
    shutil.copy("/bin/sleep", root / "program")
    with subprocess.Popen([root / "program", "60"]) as process:
        try:
            refused(errno.ETXTBSY, lambda: os.open(root / "program", os.O_WRONLY))
        finally:
            process.kill()


def test_fifos_carry_data(root: Path) -> None:
    def write() -> None:
        with open(root / "fifo", "wb") as file:
            file.write(b"through the pipe")

    thread = threading.Thread(target=write)
    thread.start()
    assert (root / "fifo").read_bytes() == b"through the pipe"
    thread.join()
    assert (root / "null").read_bytes() == b""


# Directories and names


def test_a_removed_directory_is_gone_but_can_be_stood_in(root: Path) -> None:
    fd = os.open(root / "hollow", os.O_RDONLY)
    os.rmdir(root / "hollow")
    assert os.listdir(fd) == []
    assert os.fstat(fd).st_nlink == 0
    refused(errno.ENOENT, lambda: os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    os.mkdir(root / "hollow")
    assert os.listdir(root / "hollow") == []


def test_what_was_deleted_and_made_again_is_new(root: Path) -> None:
    shutil.rmtree(root / "dir")
    refused(errno.ENOENT, lambda: os.stat(root / "dir"))
    (root / "dir").mkdir()
    (root / "dir" / "sub").mkdir()
    assert os.listdir(root / "dir") == ["sub"]
    assert os.listdir(root / "dir" / "sub") == []
    os.unlink(root / "file")
    os.mkdir(root / "file")
    os.rmdir(root / "file")
    os.symlink("dir", root / "file")
    assert sorted(os.listdir(root / "file")) == ["sub"]


def test_the_right_error_numbers(root: Path) -> None:
    refused(errno.EEXIST, lambda: os.mkdir(root / "dir"))
    refused(errno.EEXIST, lambda: os.symlink("x", root / "file"))
    refused(errno.EEXIST, lambda: os.link(root / "a", root / "b"))
    refused(errno.EEXIST, lambda: os.open(root / "file", os.O_CREAT | os.O_EXCL))
    refused(errno.ENOTEMPTY, lambda: os.rmdir(root / "dir"))
    refused(errno.ENOTDIR, lambda: os.rmdir(root / "file"))
    refused(errno.ENOTDIR, lambda: os.stat(root / "file" / "x"))
    refused(errno.EISDIR, lambda: os.unlink(root / "dir"))
    refused(errno.EISDIR, lambda: os.open(root / "dir", os.O_WRONLY))
    refused(errno.ENOENT, lambda: os.unlink(root / "none"))
    refused(errno.ENOENT, lambda: os.rename(root / "none", root / "x"))
    refused(errno.EPERM, lambda: os.link(root / "dir", root / "x"))
    refused(errno.ENAMETOOLONG, lambda: os.mkdir(root / ("n" * 256)))
    refused(errno.EINVAL, lambda: os.readlink(root / "file"))
    with open(root / "file", "rb") as file:
        refused(errno.EBADF, lambda: os.write(file.fileno(), b""))


def test_names_to_the_limit(root: Path) -> None:
    longest = "n" * 255
    (root / "hollow" / longest).write_bytes(b"x")
    os.rename(root / "hollow" / longest, root / "dir" / longest)
    assert (root / "dir" / longest).read_bytes() == b"x"
    os.unlink(root / "dir" / longest)
    assert longest not in os.listdir(root / "dir")
    deep = root
    for _ in range(12):
        deep = deep / ("d" * 250)
        deep.mkdir()
    (deep / "file").write_bytes(b"deep")
    assert (deep / "file").read_bytes() == b"deep"


def test_the_longest_names_can_be_deleted(root: Path) -> None:
    """No whiteout can have a name that long."""
    before = sorted(os.listdir(root))
    os.unlink(root / LONGEST)
    assert not (root / LONGEST).exists()
    assert sorted(os.listdir(root)) == [name for name in before if name != LONGEST]
    assert (root / "dir" / "sub" / LONGEST).read_bytes() == b"long"
    os.rename(root / "dir" / "sub" / LONGEST, root / LONGEST)
    assert sorted(os.listdir(root / "dir" / "sub")) == ["deep", "four", "two"]
    assert (root / LONGEST).read_bytes() == b"long"
    assert (root / "a").read_bytes() == (root / "b").read_bytes() == b"linked"
    assert os.stat(root / "a").st_nlink == 3


def test_the_root_itself_is_changed(root: Path) -> None:
    os.chmod(root, 0o1751)
    os.chown(root, 3, 4)
    os.utime(root, ns=(5, 6_000_000_007))
    os.setxattr(root, "user.root", b"1")
    info = os.stat(root)
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, info.st_mtime_ns) == (0o1751, 3, 4, 6_000_000_007)
    assert os.getxattr(root, "user.root") == b"1"
    os.removexattr(root, "user.root")
    os.chown(root, 0, 0)
    os.chmod(root, 0o755)


def test_listing_while_entries_go(root: Path) -> None:
    many = root / "many"
    many.mkdir()
    for number in range(5000):
        (many / f"{number:05}").touch()
    for entry in os.scandir(many):
        os.unlink(entry)
    assert os.listdir(many) == []
    many.rmdir()


def test_a_listing_can_be_resumed(root: Path) -> None:
    many = root / "many"
    many.mkdir()
    for number in range(3000):
        (many / f"{number:05}").touch()
    script = (
        "import ctypes, os, sys; libc = ctypes.CDLL(None, use_errno=True); libc.opendir.restype = ctypes.c_void_p;"
        "libc.readdir.restype = ctypes.c_void_p; libc.telldir.restype = ctypes.c_long;"
        "d = ctypes.c_void_p(libc.opendir(sys.argv[1].encode()));"
        "name = lambda: (p := libc.readdir(d)) and ctypes.string_at(p + 19);"
        "first = [name() for _ in range(1500)]; at = libc.telldir(d); then = name();"
        "[name() for _ in range(700)]; libc.seekdir(d, ctypes.c_long(at)); again = name();"
        "rest = list(iter(name, None)); assert then == again, (then, again);"
        "assert len({*first, again, *rest}) == 3002, len({*first, again, *rest});"
        "os.unlink(os.path.join(sys.argv[1].encode(), b'00000')); libc.rewinddir(d);"
        "names = list(iter(name, None)); assert len(names) == 3001 and b'00000' not in names, len(names)"
    )
    subprocess.run([sys.executable, "-c", script, many], check=True)


def test_statfs_tells_of_the_backing(root: Path) -> None:
    info = os.statvfs(root)
    assert info.f_namemax == 255
    assert info.f_blocks > info.f_bfree > 0
    assert info.f_files > 0 or info.f_ffree == 0
    assert shutil.disk_usage(root).total == shutil.disk_usage(root.parent).total


def test_watchers_are_told(root: Path) -> None:
    if shutil.which("inotifywait") is None:
        pytest.skip("inotifywait is not installed")
    watch = subprocess.Popen(
        ["inotifywait", "-q", "-t", "10", "-e", "close_write", root / "dir"], stdout=subprocess.PIPE, text=True
    )
    assert watch.stdout is not None
    for _ in range(50):
        (root / "dir" / "seen").write_bytes(b"x")
        with contextlib.suppress(subprocess.TimeoutExpired):
            watch.wait(0.1)
            break
    assert "seen" in watch.stdout.read()
    watch.stdout.close()
