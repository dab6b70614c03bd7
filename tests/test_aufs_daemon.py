"""The program layerfs-aufs: how it is called, and how its daemon comes and goes."""

from __future__ import annotations

import contextlib
import operator
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from layerfs import mount_table, mounts
from layerfs.drivers.aufs import options
from layerfs.errors import InvalidArgument

PROGRAM = shutil.which("layerfs-aufs", path=os.pathsep.join([os.path.dirname(sys.executable), *os.get_exec_path()]))

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting without a place for it takes root"),
    pytest.mark.skipif(PROGRAM is None, reason="layerfs-aufs is not installed"),
]

MIB = 1 << 20

Result = TypeVar("Result")


class Union:
    """A union below a directory, mounted by the program as a user would."""

    def __init__(self, place: Path) -> None:
        self.lower, self.upper, self.work = place / "lower", place / "upper", place / "work"
        self.target = place / "mnt"
        for directory in (self.lower, self.upper, self.work, self.target):
            directory.mkdir()

    @property
    def options(self) -> str:
        return f"lowerdir={self.lower},upperdir={self.upper},workdir={self.work}"

    def mount(self, *arguments: str) -> None:
        assert PROGRAM is not None
        subprocess.run([PROGRAM, "-o", self.options, *arguments, str(self.target)], check=True)

    def unmount(self) -> None:
        mounts.unmount(self.target)
        assert self.wait_for_end()

    def daemons(self) -> list[int]:
        """The processes that serve a union with this upper directory."""
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                with contextlib.suppress(OSError):
                    links = [os.readlink(link) for link in (process / "fd").iterdir()]
                    if str(self.upper) in links and "/dev/fuse" in links:
                        found.append(int(process.name))
        return found

    def wait_for_end(self) -> bool:
        for _ in range(500):
            if not self.daemons():
                return True
            time.sleep(0.01)
        return False


@pytest.fixture
def union(tmp_path: Path) -> Iterator[Union]:
    union = Union(tmp_path)
    yield union
    with contextlib.suppress(OSError):
        mounts.unmount(union.target, lazy=True)
    assert union.wait_for_end()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, for many files."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    mounts.unmount(tmp_path)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user can reach."""
    with tempfile.TemporaryDirectory(prefix="layerfs-aufs-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_it_is_called_as_fuse_overlayfs_is(union: Union, tmp_path: Path) -> None:
    (union.lower / "below").write_bytes(b"below")
    (tmp_path / "a:b,c\\d").mkdir()
    (tmp_path / "a:b,c\\d" / "odd").write_bytes(b"odd")
    odd = options.escaped(str(tmp_path / "a:b,c\\d"))
    assert PROGRAM is not None
    given = f"volatile,lowerdir={union.lower}:{odd},lazytime,upperdir={union.upper},workdir={union.work}"
    subprocess.run([PROGRAM, "-o", given, str(union.target)], check=True)
    assert sorted(os.listdir(union.target)) == ["below", "odd"]
    (union.target / "below").write_bytes(b"above")
    union.unmount()
    assert (union.upper / "below").read_bytes() == b"above"
    assert (union.lower / "below").read_bytes() == b"below"


def test_it_is_a_helper_of_mount(union: Union) -> None:
    """mount(8) takes no PATH from its caller, so the program has to be where the system's programs are."""
    (union.lower / "below").write_bytes(b"below")
    script = """
        mount -t tmpfs tmpfs /usr/local/sbin
        ln -s "$1" /usr/local/sbin/
        mount -t fuse.layerfs-aufs somewhere "$2" -o "$3"
        findmnt -n -o FSTYPE,SOURCE "$2"
        rm "$2/below"
        umount "$2"
    """
    command = ["unshare", "--mount", "sh", "-euc", script, "sh", PROGRAM or "", str(union.target), union.options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["fuse.layerfs-aufs", "somewhere"]
    assert union.wait_for_end()
    assert os.listdir(union.upper) == [".wh.below"]


@pytest.mark.skipif(shutil.which("containers-storage") is None, reason="containers-storage is not installed")
def test_it_is_the_mount_program_of_podman_s_storage(tmp_path: Path) -> None:
    def storage(verb: str, *arguments: str) -> str:
        command = ["containers-storage", verb, "--graph", str(tmp_path / "graph"), "--run", str(tmp_path / "run")]
        command += ["--storage-driver", "overlay", "--storage-opt", f"overlay.mount_program={PROGRAM}", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    try:
        lower = storage("create-layer").split()[0]
        root = Path(storage("mount", lower).strip())
        assert [point.type for point in mount_table.read() if point.target == root] == ["fuse.layerfs-aufs"]
        (root / "dir").mkdir()
        (root / "dir" / "inner").write_bytes(b"x")
        (root / "gone").write_bytes(b"x")
        storage("unmount", lower)
        upper = storage("create-layer", lower).split()[0]
        root = Path(storage("mount", upper).strip())
        assert sorted(os.listdir(root)) == ["dir", "gone"]
        shutil.rmtree(root / "dir")
        (root / "dir").mkdir()
        (root / "gone").unlink()
        storage("unmount", upper)
        assert sorted(storage("changes", upper, lower).splitlines()) == [
            'Delete "/dir/inner"',
            'Delete "/gone"',
            'Modify "/dir"',
        ]
    finally:
        storage("shutdown", "--force")


def test_without_an_upper_it_is_read_only(union: Union) -> None:
    (union.lower / "below").write_bytes(b"below")
    assert PROGRAM is not None
    subprocess.run([PROGRAM, "-o", f"lowerdir={union.lower}", str(union.target)], check=True)
    with pytest.raises(OSError, match="Read-only"):
        (union.target / "new").touch()
    mounts.unmount(union.target)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "mount point"),
        (["/tmp"], "nothing to mount"),
        (["-o", "lowerdir=/none/such", "/tmp"], "/none/such"),
        (["-o", "lowerdir=/,upperdir=/tmp", "/tmp"], "workdir"),
        (["-o", "lowerdir=/", "/none/such"], "no directory"),
        (["--unknown", "/tmp"], "--unknown"),
        (["-o"], "-o needs"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], said: str) -> None:
    assert PROGRAM is not None
    done = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode in (2, 3, 10)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_options_are_taken_apart_at_their_own_separators() -> None:
    parsed = options.parse(["-o", "lowerdir=/a\\:b:/c\\,d,upperdir=/u\\\\,workdir=/w", "-o", "ro,rw", "source", "/t"])
    assert parsed.lower == ["/a:b", "/c,d"]
    assert (parsed.upper, parsed.work, parsed.source, parsed.target) == ("/u\\", "/w", "source", "/t")
    assert parsed.flags == 0
    with pytest.raises(InvalidArgument):
        options.parse(["a", "b", "c"])


def test_it_outlives_its_caller_and_ends_with_the_mount(union: Union) -> None:
    union.mount()
    (daemon,) = union.daemons()
    deadline = time.monotonic() + 20  # the caller goes on before the daemon has settled
    while os.readlink(f"/proc/{daemon}/cwd") != "/" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.getsid(daemon) == daemon
    assert os.readlink(f"/proc/{daemon}/cwd") == "/"
    union.unmount()


def test_one_upper_is_not_served_twice(union: Union, tmp_path: Path) -> None:
    union.mount()
    (tmp_path / "second").mkdir()
    assert PROGRAM is not None
    second = subprocess.run(
        [PROGRAM, "-o", union.options, str(tmp_path / "second")], capture_output=True, text=True, check=False
    )
    assert second.returncode == 3
    assert "in use" in second.stderr
    union.unmount()
    union.mount()
    union.unmount()


def test_a_terminated_daemon_takes_its_mount_with_it(union: Union) -> None:
    union.mount()
    (union.target / "file").write_bytes(b"kept")
    (daemon,) = union.daemons()
    os.kill(daemon, signal.SIGTERM)
    assert union.wait_for_end()
    assert union.target not in [point.target for point in mount_table.read()]
    assert (union.upper / "file").read_bytes() == b"kept"


def test_the_mount_lives_as_long_as_anybody_uses_it(union: Union) -> None:
    union.mount()
    with open(union.target / "file", "wb", buffering=0) as file:
        mounts.unmount(union.target, lazy=True)
        file.write(b"written after the unmount")
        assert union.daemons()
    assert union.wait_for_end()
    assert (union.upper / "file").read_bytes() == b"written after the unmount"


def test_a_killed_daemon_leaves_nothing_half_copied(union: Union) -> None:
    """Large files are copied up, a directory is moved, and links are broken up while the daemon is killed."""
    noise = random.Random(1)
    for number in range(4):
        (union.lower / f"large{number}").write_bytes(bytes([number]) * (8 * MIB))
    (union.lower / "dir").mkdir()
    for number in range(300):
        (union.lower / "dir" / f"f{number}").write_bytes(b"%d" % number * 100)
    script = """
import os, sys
root = sys.argv[1]
for number in range(4):
    with open(f"{root}/large{number}", "r+b") as file:
        file.write(b"new")
os.rename(f"{root}/dir", f"{root}/moved")
for number in range(0, 300, 3):
    os.unlink(f"{root}/moved/f{number}")
"""
    for _ in range(6):
        union.mount()
        (daemon,) = union.daemons()
        with subprocess.Popen([sys.executable, "-c", script, str(union.target)], stderr=subprocess.DEVNULL):
            time.sleep(noise.uniform(0.02, 0.25))
            os.kill(daemon, signal.SIGKILL)
        mounts.unmount(union.target, lazy=True)
        assert union.wait_for_end()
        union.mount()
        for number in range(4):
            held = (union.target / f"large{number}").read_bytes()
            assert len(held) == 8 * MIB
            assert held[3:] == bytes([number]) * (8 * MIB - 3)
        where = [name for name in ("dir", "moved") if (union.target / name).exists()]
        assert len(where) == 1
        names = os.listdir(union.target / where[0])
        assert len(names) == 300 or where == ["moved"]
        for name in names:
            assert (union.target / where[0] / name).read_bytes() == name[1:].encode() * 100
        union.unmount()
        assert os.listdir(union.work / "aufs") == []
        for place in (union.upper, union.work):
            shutil.rmtree(place)
            place.mkdir()


def test_a_killed_caller_leaves_no_daemon(union: Union) -> None:
    """`layerfs.mounts.opened` keeps a mount by a descriptor alone."""
    noise = random.Random(2)
    script = f"""
import time
from layerfs import mount_table, mounts
from layerfs.driver import Mount
with mounts.opened([Mount("fuse3.layerfs-aufs", "killed", {tuple(union.options.split(","))!r})]):
    print("open", flush=True)
    time.sleep(60)
"""
    for number in range(4):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
            assert union.daemons()
            time.sleep(noise.uniform(0, 0.05) * number)
            process.kill()
        assert union.wait_for_end()
    assert not [point for point in mount_table.read() if point.type == "fuse.layerfs-aufs" and point.source == "killed"]


def test_others_are_answered_while_a_large_file_is_copied_up(union: Union) -> None:
    with open(union.lower / "large", "wb") as file:
        file.writelines(os.urandom(MIB) for _ in range(256))
    (union.lower / "small").write_bytes(b"small")
    union.mount()
    with subprocess.Popen(["truncate", "-s", "+1", str(union.target / "large")]) as process:
        seen = 0
        while process.poll() is None:
            assert (union.target / "small").read_bytes() == b"small"
            (union.target / f"new{seen}").touch()
            seen += 1
    assert process.returncode == 0
    assert seen > 1
    assert os.stat(union.upper / "large").st_size == 256 * MIB + 1


def test_no_error_ends_the_daemon(union: Union) -> None:
    """Branches that somebody takes away, a full disk, an operation that nobody knows."""
    (union.lower / "gone").write_bytes(b"x")
    (union.lower / "dir").mkdir()
    (union.lower / "dir" / "file").write_bytes(b"x")
    union.mount()
    assert os.path.exists(union.target / "gone")
    os.unlink(union.lower / "gone")
    shutil.rmtree(union.lower / "dir")
    with pytest.raises(OSError, match="No such file"):
        (union.target / "gone").read_bytes()
    with pytest.raises(OSError, match="No such file"):
        os.listdir(union.target / "dir")
    with pytest.raises(OSError, match="No such file"):
        (union.target / "dir" / "new").touch()
    with pytest.raises(OSError, match="Operation not permitted"):
        (union.target / ".wh.x").touch()
    with pytest.raises(OSError, match="No such file"):
        os.stat(union.target / ".wh.x")
    (union.target / "fine").write_bytes(b"x")
    union.unmount()


def test_a_full_disk_is_told_and_leaves_no_part(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], check=True)
    try:
        (tmp_path / "lower").mkdir()
        (tmp_path / "lower" / "large").write_bytes(os.urandom(16 * MIB))
        for name in ("upper", "work"):
            (small / name).mkdir()
        (tmp_path / "mnt").mkdir()
        given = f"lowerdir={tmp_path / 'lower'},upperdir={small / 'upper'},workdir={small / 'work'}"
        assert PROGRAM is not None
        subprocess.run([PROGRAM, "-o", given, str(tmp_path / "mnt")], check=True)
        try:
            with pytest.raises(OSError, match="No space left"):
                open(tmp_path / "mnt" / "large", "r+b").close()
            assert os.listdir(small / "upper") == []
            assert os.listdir(small / "work" / "aufs") == []
            assert os.stat(tmp_path / "mnt" / "large").st_size == 16 * MIB
            os.unlink(tmp_path / "mnt" / "large")
            (tmp_path / "mnt" / "fits").write_bytes(bytes(MIB))
        finally:
            mounts.unmount(tmp_path / "mnt")
    finally:
        mounts.unmount(small)


@pytest.mark.parametrize("inner", ["", "unshare --user --map-root-user --mount"], ids=["fusermount3", "user namespace"])
def test_it_works_without_root(public: Path, inner: str) -> None:
    """As nobody, who has got /dev/fuse; elsewhere udev gives it to everybody."""
    union = Union(public)
    (union.lower / "dir").mkdir()
    (union.lower / "dir" / "file").write_bytes(b"below\n")
    for path in (union.lower, union.lower / "dir", union.lower / "dir" / "file", union.upper, union.work, union.target):
        os.chown(path, 65534, 65534)
    device = public / "fuse"
    os.mknod(device, 0o020666, os.makedev(10, 229))
    device.chmod(0o666)
    act = """
        "$1" -o "$3" "$2"
        cat "$2/dir/file"
        echo more >>"$2/dir/file"
        mv "$2/dir" "$2/moved"
        rm "$2/moved/file"
        echo new >"$2/new"
        fusermount3 -u "$2" || umount "$2"
    """
    outer = 'mount --bind "$1" /dev/fuse; shift; exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"'
    command = ["unshare", "--mount", "sh", "-euc", outer, "sh", str(device), *inner.split()]
    command += ["sh", "-euc", act, "sh", PROGRAM or "", str(union.target), union.options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 126 and "Permission denied" in done.stderr:  # as the shell says of a program it may not run
        pytest.skip("nobody may not run this environment's interpreter")
    assert (done.returncode, done.stdout) == (0, "below\n"), done.stderr
    assert union.wait_for_end()
    assert sorted(os.listdir(union.upper)) == [".wh.dir", "moved", "new"]
    assert os.listdir(union.upper / "moved") == []
    assert (union.lower / "dir" / "file").read_bytes() == b"below\n"


def test_a_directory_of_100_000_entries(memory: Path) -> None:
    union = Union(memory)
    (union.lower / "many").mkdir()
    for number in range(95_000):
        os.mknod(union.lower / "many" / f"lower{number}")
    union.mount()
    many = union.target / "many"
    for number in range(5_000):
        os.mknod(many / f"upper{number}")
    assert len(os.listdir(many)) == 100_000
    assert sum(entry.stat().st_nlink for entry in os.scandir(many)) == 100_000
    for number in range(0, 95_000, 50):
        os.unlink(many / f"lower{number}")
    assert len(set(os.listdir(many))) == 98_100
    union.unmount()


def test_a_large_lower_directory_is_renamed_while_others_are_answered(memory: Path) -> None:
    union = Union(memory)
    (union.lower / "many").mkdir()
    for number in range(20_000):
        os.mknod(union.lower / "many" / f"{number}")
    (union.lower / "other").mkdir()
    union.mount()
    (union.target / "other" / "first").touch()
    command = ["python3", "-c", "import os, sys; os.rename(sys.argv[1] + '/many', sys.argv[1] + '/renamed')"]
    with subprocess.Popen([*command, str(union.target)]) as process:
        seen = 0
        while process.poll() is None:
            (union.target / "other" / f"{seen}").touch()  # the kernel holds the parent of what is being renamed
            seen += 1
    assert process.returncode == 0
    assert seen > 1
    assert len(os.listdir(union.target / "renamed")) == 20_000
    assert not (union.target / "many").exists()
    union.unmount()
    assert len(os.listdir(union.upper / "renamed")) == 20_000
    assert (union.upper / ".wh.many").exists()


# Files that the kernel reads and writes itself: it goes on while the daemon is stopped


def without(daemon: int, action: Callable[[], Result]) -> Result | None:
    """What ``action`` returns while the daemon is stopped, or None where it waits for that."""
    with ThreadPoolExecutor(1) as pool:
        os.kill(daemon, signal.SIGSTOP)
        try:
            return pool.submit(action).result(timeout=5)
        except TimeoutError:
            return None
        finally:
            os.kill(daemon, signal.SIGCONT)


def test_the_upper_s_files_are_read_and_written_by_the_kernel_itself(union: Union) -> None:
    (union.upper / "old").write_bytes(b"o" * MIB)
    union.mount()
    (daemon,) = union.daemons()
    with open(union.target / "old", "rb", buffering=0) as old, open(union.target / "new", "w+b", buffering=0) as new:
        new.write(b"n")  # the first time the kernel asks whether there are capabilities to be taken away
        assert without(daemon, lambda: old.read(2 * MIB)) == b"o" * MIB
        assert without(daemon, lambda: new.write(b"n" * MIB)) == MIB
        assert without(daemon, lambda: os.pread(new.fileno(), 2 * MIB, 0)) == b"n" * (MIB + 1)
        assert os.stat(union.target / "new").st_size == MIB + 1
        assert (union.upper / "new").stat().st_size == MIB + 1
    union.unmount()


def test_a_union_that_nobody_writes_is_read_by_the_kernel_itself(memory: Path) -> None:
    subprocess.run(["mount", "-o", "remount,noatime", str(memory)], check=True)
    union = Union(memory)
    (union.lower / "file").write_bytes(b"x" * MIB)
    union.mount("-o", "ro")
    (daemon,) = union.daemons()
    with open(union.target / "file", "rb", buffering=0) as file:
        assert without(daemon, lambda: file.read(2 * MIB)) == b"x" * MIB
    union.unmount()


def test_reading_changes_no_times_below_a_union_that_nobody_writes(union: Union) -> None:
    (union.lower / "file").write_bytes(b"x")
    os.utime(union.lower / "file", (1, 2))
    union.mount("-o", "ro")
    assert (union.target / "file").read_bytes() == b"x"
    assert os.stat(union.lower / "file").st_atime == 1
    union.unmount()


def test_what_was_copied_up_is_read_by_the_kernel_itself_once_all_readers_of_the_lower_file_are_gone(
    union: Union,
) -> None:
    (union.lower / "one").write_bytes(b"lower" * MIB)
    os.link(union.lower / "one", union.lower / "two")
    union.mount()
    (daemon,) = union.daemons()
    one, two = union.target / "one", union.target / "two"
    with open(one, "rb", buffering=0) as reader:
        assert reader.read(5) == b"lower"
        with open(two, "r+b", buffering=0) as writer:
            writer.write(b"upper")
            assert os.pread(reader.fileno(), 5, 0) == b"upper"
            with open(one, "ab") as appender:
                appender.write(b"end")
            assert os.pread(writer.fileno(), 9, 5 * MIB) == b"end"
            assert os.fstat(reader.fileno()).st_size == os.stat(two).st_size == 5 * MIB + 3
        os.close(os.open(two, os.O_WRONLY | os.O_TRUNC))
        assert os.pread(reader.fileno(), 5, 0) == b""
        assert os.stat(one).st_size == 0
    with open(two, "wb") as writer:
        writer.write(b"again")
    with open(one, "rb", buffering=0) as reader:
        assert without(daemon, lambda: reader.read(9)) == b"again"
    assert (union.lower / "one").read_bytes() == b"lower" * MIB


@pytest.mark.parametrize(
    ("inner", "below", "served"),
    [
        ("", "directory", "by the kernel"),
        ("", "overlay", "by the daemon"),
        ("unshare --user --map-root-user --mount", "directory", "by the daemon"),
    ],
)
def test_files_are_served_where_the_kernel_may_not_read_them_itself(
    union: Union, inner: str, below: str, served: str
) -> None:
    (union.upper / "file").write_text(served)
    if below == "overlay":
        options = f"lowerdir={union.lower}:{union.target}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(union.lower)], check=True)
    act = """
        "$1" -o "$3" "$2"
        true <"$2/file"  # the first close tells the kernel that it need not tell of others
        exec 3<"$2/file"
        echo open
        read -r stopped
        timeout 1 cat <&3 || printf 'by the daemon'
        echo
        read -r continued
        exec 3<&-
        umount "$2"
    """
    command = [*inner.split(), "sh", "-euc", act, "sh", PROGRAM or "", str(union.target), union.options]
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            (daemon,) = union.daemons()
            os.kill(daemon, signal.SIGSTOP)
            try:
                process.stdin.write("stopped\n")
                process.stdin.flush()
                assert process.stdout.readline() == f"{served}\n"
            finally:
                os.kill(daemon, signal.SIGCONT)
            process.stdin.write("continued\n")
        assert process.returncode == 0
        assert union.wait_for_end()
    finally:
        if below == "overlay":
            mounts.unmount(union.lower)


def test_a_file_that_is_gone_and_closed_takes_no_space(memory: Path) -> None:
    """The kernel holds what it reads and writes itself until it is told not to."""
    union = Union(memory)
    union.mount()
    (daemon,) = union.daemons()

    def used() -> tuple[int, int]:
        """Descriptors of the daemon, and blocks of the file system."""
        info = os.statvfs(memory)
        return len(os.listdir(f"/proc/{daemon}/fd")), info.f_blocks - info.f_bfree

    (union.target / "first").touch()
    (union.target / "first").unlink()
    before = used()
    for number in range(20):
        (union.target / f"{number}").write_bytes(bytes(MIB))
        with open(union.target / f"{number}", "r+b") as file:
            os.unlink(union.target / f"{number}")
            file.write(b"x")
    deadline = time.monotonic() + 20  # the daemon hears a little later that a file is closed
    while any(map(operator.gt, used(), before)) and time.monotonic() < deadline:
        time.sleep(0.01)
    descriptors, blocks = used()
    assert descriptors <= before[0]
    assert blocks <= before[1]
    union.unmount()
