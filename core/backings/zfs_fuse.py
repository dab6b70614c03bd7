"""zfs-fuse, the ZFS in user space, as a daemon of one backing's own.

The program has fixed paths: its socket, its lock, its list of pools. So each daemon runs in a mount namespace of its
own, on a small file tree of its own, where these places are its alone: a tmpfs with the system's programs and devices,
and the backing's directory at the path that it has outside. Everything else is left out, so that no mount of the
machine is kept busy. The backing's ``data`` is a shared mount (mount_namespaces(7)) in both, and what the daemon mounts
there appears outside as well. `Daemon.inside` is what to put before a command that talks to the daemon.

``zfs-fuse.pid`` is locked by the daemon for as long as it lives, from before it becomes that program; so a daemon whose
process was killed, or whose starter was, is never mistaken.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from layerfs import mount_table, mounts
from layerfs.errors import EnvironmentUnfit, FailedPrecondition, LayerfsError
from layerfs.kernel import fusectl
from layerfs.kernel import mountapi as api
from layerfs.locks import LockFile
from layerfs.programs import tool

PACKAGE = "zfs-fuse"
FILES = ("zfs-fuse.pid", "zfs-fuse.log")

# Extended attributes cost it speed, but layers have them. The kernel checks permissions, and so may cache what it was
# told: nothing but the kernel changes these file systems.
_ARGUMENTS = ("--no-daemon", "--no-kstat-mount", "--enable-xattr", "--fuse-mount-options=default_permissions")
_CACHING = ("--fuse-attr-timeout=3600", "--fuse-entry-timeout=3600", "--max-arc-size=128")
_SOCKET = "run/zfs/zfs_socket"
_ALIVE = 0
_START_SECONDS, _SETTLE_SECONDS, _END_SECONDS = 30.0, 20.0, 10.0


class Daemon:
    """The daemon of the backing in the directory ``root``, running or not."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def pid(self) -> int | None:
        """Its process, None where it does not run."""
        file = self.root / "zfs-fuse.pid"
        if not file.exists():
            return None
        lock = LockFile(file)
        try:
            return int(file.read_text() or 0) or None if lock.is_held(_ALIVE) else None
        finally:
            lock.close()

    def is_there(self) -> bool:
        """Whether it runs; then it is waited for until it answers, should it have been started just now."""
        deadline = time.monotonic() + _START_SECONDS
        while self.pid() is not None and time.monotonic() < deadline:
            if self._answers():
                return True
            time.sleep(0.01)
        return self.pid() is not None

    def inside(self) -> list[str]:
        """What to put before a command for it to run beside the daemon. Raises `FailedPrecondition` if it is dead."""
        pid = self.pid()
        if pid is None:
            raise FailedPrecondition(
                f"the zfs-fuse of {str(self.root)!r} has ended; open the store again (committed layers are safe)"
            )
        return [tool("nsenter", "util-linux"), f"--mount=/proc/{pid}/ns/mnt", "--"]

    def start(self, keep: int) -> None:
        """Start it, with a shared mount at ``data``, and wait until it answers.

        ``keep`` is a descriptor that the new process has open until it has become zfs-fuse.
        Raises `EnvironmentUnfit` with its own words where it gives up.
        """
        command = [sys.executable, "-m", __name__, str(self.root), tool("zfs-fuse", PACKAGE), str(keep)]
        log = self.root / "zfs-fuse.log"
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=(keep,), start_new_session=True
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                words = " ".join(log.read_text(errors="replace").split())[-500:]
                raise EnvironmentUnfit(f"zfs-fuse does not start: {words or 'it does not answer'}")
            time.sleep(0.01)
        # It is to live on without us: as a child it would be waited for, or be told of as a zombie.
        _forget(process)

    def is_stuck(self, path: Path) -> bool:
        """Whether it has let the file system at ``path`` wait for long."""
        try:
            subprocess.run(["stat", "-f", path], capture_output=True, check=False, timeout=_SETTLE_SECONDS)
        except subprocess.TimeoutExpired:
            return True
        return False

    def stop(self) -> None:
        """End it; its pools have to be exported."""
        pid = self.pid()
        if pid is None:
            return
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            if self.pid() == pid:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)
        deadline = time.monotonic() + _END_SECONDS
        while self.pid() is not None:
            _reap(pid)
            if time.monotonic() > deadline:
                raise LayerfsError(f"zfs-fuse (process {pid}) of {str(self.root)!r} does not end")
            time.sleep(0.005)
        _reap(pid)

    def _answers(self) -> bool:
        pid = self.pid()
        if pid is None:
            return False
        with socket.socket(socket.AF_UNIX) as client:
            try:
                fd = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_CLOEXEC)
            except OSError:
                return False
            try:
                client.connect(f"/proc/self/fd/{fd}/{_SOCKET}")
            except OSError:
                return False
            finally:
                os.close(fd)
        return True


def unmount(point: mount_table.MountPoint) -> None:
    """Unmount a file system of zfs-fuse. Raises `FailedPrecondition` where it is in use.

    The daemon waits, without end and without doing anything else, for the last user of a file system that goes; one
    whose last close it was not told of never goes. So it is given the time to hear of that first.
    """
    if not fusectl.settle(point.device, _SETTLE_SECONDS):
        text = f"unmounting {str(point.target)!r}: zfs-fuse does not answer"
        raise FailedPrecondition(f"{text}; end its process and open the store again, committed layers are safe")
    mounts.unmount(point.target)


def _forget(process: subprocess.Popen[bytes]) -> None:
    """Let the process run on after the object is gone, without a warning."""
    process.returncode = 0


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


# In the process that becomes the daemon


def _become(root: str, program: str, keep: int) -> None:
    os.set_inheritable(keep, False)  # so that it is closed when this is zfs-fuse
    lock = LockFile(Path(root, "zfs-fuse.pid"))
    lock.hold(_ALIVE)
    lock.keep_through_exec()
    Path(root, "zfs-fuse.pid").write_text(str(os.getpid()))
    with contextlib.suppress(OSError):  # a full memory must not cost the file systems of many
        Path("/proc/self/oom_score_adj").write_text("-900")
    _enter_own_tree(root)
    os.execv(program, ["zfs-fuse", *_ARGUMENTS, *_CACHING])  # noqa: S606 - no shell


def _enter_own_tree(root: str) -> None:
    """Make a mount namespace whose root is a tmpfs with what the daemon and its commands need."""
    api.unshare_mounts()
    places: dict[str, str | int] = {path: _clone(path) for path in ("/dev", "/proc", root, f"{root}/data")}
    for entry in os.scandir("/"):
        if entry.name in ("bin", "sbin", "usr") or entry.name.startswith("lib"):
            places[entry.path] = os.readlink(entry.path) if entry.is_symlink() else _clone(entry.path)
    api.mount("", "/", "", api.MS_REC | api.MS_PRIVATE)
    api.mount("tmpfs", root, "tmpfs", 0, b"mode=0755,size=16m")
    os.chdir(root)
    for path, what in places.items():
        here = f".{path}"
        if isinstance(what, str):
            os.symlink(what, here)
            continue
        os.makedirs(here, exist_ok=True)
        target = os.open(here, os.O_PATH | os.O_CLOEXEC)
        api.move_mount(what, target)
        os.close(target)
        os.close(what)
    for path in ("etc/zfs", "run/lock/zfs", "run/zfs", "tmp", "var/lib/zfs"):
        os.makedirs(path, exist_ok=True)
    os.symlink("../run", "var/run")
    os.symlink("../run/lock", "var/lock")
    os.symlink("../proc/self/mounts", "etc/mtab")
    with contextlib.suppress(FileNotFoundError):
        shutil.copy("/etc/ld.so.cache", "etc/ld.so.cache")
    api.pivot_root(".", ".")
    api.umount(".", api.MNT_DETACH)
    os.chdir("/")


def _clone(path: str) -> int:
    return api.open_tree(api.AT_FDCWD, path, api.OPEN_TREE_CLONE)


if __name__ == "__main__":
    _become(sys.argv[1], sys.argv[2], int(sys.argv[3]))
