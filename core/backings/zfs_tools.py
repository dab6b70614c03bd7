"""The programs zfs(8) and zpool(8): which implementation is here, running them, and what they mean by their words."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from layerfs.backings.zfs_fuse import PACKAGE as FUSE_PACKAGE
from layerfs.backings.zfs_fuse import Daemon
from layerfs.errors import EnvironmentUnfit, FailedPrecondition, LayerfsError, OutOfSpace
from layerfs.probing import kernel_knows
from layerfs.programs import find, run, search_path, tool

_PACKAGE = "zfsutils-linux"
_BUSY_SECONDS = 3.0  # datasets are busy for moments after an unmount
_HUNG_SECONDS = 300.0

TYPES = ("zfs", "fuse.zfs")
"""What the mount table calls datasets that OpenZFS, or zfs-fuse, has mounted."""


class ZfsRefused(LayerfsError):
    """zfs(8) or zpool(8) said no; ``words`` are its own."""

    def __init__(self, what: str, words: str) -> None:
        super().__init__(f"{what}: {words}")
        self.words = words

    @property
    def exists(self) -> bool:
        return "already exists" in self.words

    @property
    def missing(self) -> bool:
        return "does not exist" in self.words or "no such pool" in self.words or "could not find any" in self.words

    @property
    def busy(self) -> bool:
        return "busy" in self.words


def in_user_space() -> bool:
    """Whether the ZFS of this host is zfs-fuse; OpenZFS where both a kernel module and its programs are there."""
    return find("zfs-fuse") is not None and not (kernel_knows("zfs") and find("zgenhostid"))


def check_usable() -> None:
    """Raise `EnvironmentUnfit`, saying what to do, where neither implementation can work here."""
    if in_user_space():
        if not Path("/dev/fuse").exists():
            raise EnvironmentUnfit("zfs-fuse needs /dev/fuse; load the module: modprobe fuse")
    elif find("zpool") is None:
        raise EnvironmentUnfit(f"ZFS is not installed; install the package {_PACKAGE}, or {FUSE_PACKAGE} (user space)")
    elif not kernel_knows("zfs"):
        raise EnvironmentUnfit("the kernel has no ZFS; install the package zfs-dkms, or zfs-fuse, which needs none")


def module_loaded() -> bool:
    """Whether OpenZFS is in the kernel at this moment."""
    return "\tzfs\n" in Path("/proc/filesystems").read_text()


def load_module() -> None:
    """Have the kernel know OpenZFS, whose programs do not load its module themselves."""
    if not module_loaded():
        run(["modprobe", "zfs"], "kmod")


class Tools:
    """Runs the two programs.

    Args:
        daemon: the zfs-fuse to talk to; None for OpenZFS, or the system's own zfs-fuse.
        lock: a file that every command has locked as long as it runs, be its caller killed meanwhile; see `settled`.
    """

    def __init__(self, daemon: Daemon | None, lock: Path) -> None:
        self.daemon = daemon
        self._lock = lock

    def zfs(self, *arguments: str) -> str:
        """Run zfs(8) and return what it printed. Raises what `_run` raises."""
        return self._run("zfs", *arguments)

    def zpool(self, *arguments: str) -> str:
        """Run zpool(8) and return what it printed. Raises what `_run` raises."""
        return self._run("zpool", *arguments)

    def patient(self, *arguments: str) -> str:
        """Run zfs(8) again and again for some seconds, as long as all that it says is that something is busy."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return self.zfs(*arguments)
            except ZfsRefused as error:
                if not error.busy or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def properties(self, names: Iterable[str], wanted: Iterable[str]) -> dict[str, dict[str, str]]:
        """Properties of several datasets or snapshots by one command; sizes in bytes. Missing ones are left out."""
        names = list(names)
        found: dict[str, dict[str, str]] = {}
        try:
            text = self.zfs("get", "-Hp", "-o", "name,property,value", ",".join(wanted), *names)
        except ZfsRefused as error:
            if not error.missing:
                raise
            if len(names) == 1:
                return {}
            for name in names:
                found |= self.properties([name], wanted)
            return found
        for line in text.splitlines():
            name, key, value = line.split("\t")
            found.setdefault(name, {})[key] = value
        return found

    def settled(self) -> None:
        """Wait until no command runs any more that a killed process began."""
        with self.held() as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)

    @contextmanager
    def held(self, *, alone: bool = False) -> Iterator[int]:
        """A descriptor that keeps `settled` waiting while it is open anywhere, and with ``alone`` all others too."""
        fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield fd
        finally:
            os.close(fd)

    def _run(self, program: str, *arguments: str) -> str:
        """Run a program to its end.

        Raises `ZfsRefused` with its words, `OutOfSpace`, `EnvironmentUnfit`, and `FailedPrecondition` where the daemon
        has ended or hangs.
        """
        package = FUSE_PACKAGE if self.daemon else _PACKAGE
        command = [*(self.daemon.inside() if self.daemon else ()), tool(program, package), *arguments]
        what = " ".join([program, *arguments[:1], repr(arguments[-1])])
        with self.held(alone=self.daemon is not None) as fd:  # zfs-fuse takes many at once badly: it hangs
            try:
                result = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    check=False,
                    pass_fds=(fd,),
                    timeout=_HUNG_SECONDS,
                    env={**os.environ, "LC_ALL": "C", "PATH": search_path()},  # both call mount(8) and umount(8)
                )
            except subprocess.TimeoutExpired as error:
                reason = f"{what} has not ended after {_HUNG_SECONDS:.0f} s"
                if self.daemon and (pid := self.daemon.pid()):
                    reason = (
                        f"{reason}; end zfs-fuse (process {pid}) and open the store again; committed layers are safe"
                    )
                raise FailedPrecondition(reason) from error
        if result.returncode:
            raise _error(what, " ".join((result.stderr or result.stdout).decode(errors="replace").split()))
        return result.stdout.decode(errors="surrogateescape")


def _error(what: str, words: str) -> LayerfsError:
    lower = words.lower()
    if "out of space" in lower or os.strerror(errno.ENOSPC).lower() in lower or "quota exceeded" in lower:
        return OutOfSpace(f"{what}: {words}; free some space, or make it larger with `layerfs grow`")
    if "permission denied" in lower:
        return EnvironmentUnfit(f"{what}: {words}; run it as root")
    if "daemon is running" in lower or "failed to initialize" in lower:
        return FailedPrecondition(f"{what}: {words}; open the store again")
    return ZfsRefused(what, words or "it failed without a word")
