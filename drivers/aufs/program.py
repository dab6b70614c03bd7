"""``layerfs-aufs``: mounts a union and becomes the daemon that serves it.

It returns when the union is mounted; whoever uses it before the daemon answers waits for that. The daemon ends when the
mount is gone, wherever it went: unmounted, detached and closed, or with its mount namespace.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import resource
import signal
import sys
import time
from typing import Final

from layerfs.drivers.aufs import options as command_line
from layerfs.drivers.aufs.operations import PASSTHROUGH, WANTED
from layerfs.drivers.aufs.options import Options
from layerfs.drivers.aufs.server import Server
from layerfs.drivers.aufs.tree import Tree
from layerfs.errors import EnvironmentUnfit, InvalidArgument, LayerfsError, refused
from layerfs.kernel import fuse, mountapi
from layerfs.treecopy import remove_tree

NAME: Final = "layerfs-aufs"
_WORK: Final = "aufs"
_PATIENCE: Final = 5.0
"""Seconds to wait for the daemon of an earlier mount of the same upper to end."""
_READ_AHEAD_KIB: Final = 1024
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def main() -> None:
    """The program. Ends with the exit code of the error, as `layerfs.errors` has them."""
    try:
        options = command_line.parse(sys.argv[1:])
        if options.help:
            print(command_line.USAGE, end="")
            return
        _run(options)
    except LayerfsError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _run(options: Options) -> None:
    _allow_many_files()
    os.umask(0)
    target = os.path.realpath(options.target)
    lower = [_opened(path, "the branch") for path in options.lower]
    upper = work = None
    if options.upper is not None and options.work is not None and not options.flags & mountapi.MS_RDONLY:
        upper = _opened(options.upper, "the upper directory")
        work = _work_directory(options.work, upper)
    elif options.upper is not None:
        lower.insert(0, _opened(options.upper, "the upper directory"))
    branches = lower if upper is None else (upper, *lower)
    # Reading changes the times of files that the kernel reads itself, which those below a read-only union must keep.
    untouched = upper is not None or all(os.fstatvfs(fd).f_flag & (os.ST_RDONLY | os.ST_NOATIME) for fd in lower)
    wanted = PASSTHROUGH if untouched and fuse.can_pass_through(branches) else WANTED
    tree = Tree(upper, lower, limit=_limit())
    fuse_options = ["default_permissions"]
    if options.allow_other or os.geteuid() == 0:
        fuse_options.append("allow_other")
    try:
        device = fuse.mount(target, NAME, options.source, fuse_options, options.flags)
    except OSError as error:
        raise _unmountable(target, error) from error
    if not options.foreground:
        _become_daemon({device, *lower, *(fd for fd in (upper, work) if fd is not None)})
    _serve(device, wanted, tree, work, target)


def _serve(device: int, wanted: int, tree: Tree, work: int | None, target: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: fuse.unmount(target))
    os.chdir("/")
    try:
        granted = fuse.negotiate(device, wanted)
        _read_ahead(target)
        # What is there now stays; what comes is freed by reference counts, as nodes are taken apart when forgotten.
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 20, 20)
        Server(device, tree, work, passthrough=bool(granted.flags & fuse.PASSTHROUGH)).run()
    except BaseException:
        with contextlib.suppress(OSError):
            fuse.unmount(target)
        raise


def _become_daemon(kept: set[int]) -> None:
    """Leave the caller, who goes on at once: the union is mounted. Of all descriptors only ``kept`` stay open."""
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _opened(path: str, what: str) -> int:
    try:
        return os.open(path, _DIRECTORY)
    except OSError as error:
        raise refused(f"opening {what} {path!r}", error, "name directories that exist") from error


def _work_directory(path: str, upper: int) -> int:
    """The work directory, empty, and held by this process alone for as long as it lives."""
    outer = _opened(path, "the work directory")
    if os.fstat(outer).st_dev != os.fstat(upper).st_dev:
        raise InvalidArgument(f"the work directory {path!r} is on another file system than the upper directory")
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(_WORK, 0o700, dir_fd=outer)
        work = os.open(_WORK, _DIRECTORY | os.O_NOFOLLOW, dir_fd=outer)
        os.close(outer)
        _lock(work, path)
        for name in os.listdir(work):  # of a daemon that was killed
            remove_tree(work, name)
    except OSError as error:
        raise refused(f"preparing the work directory {path!r}", error) from error
    return work


def _lock(work: int, path: str) -> None:
    ends = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(work, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > ends:
                text = f"the work directory {path!r} is in use by another union; unmount that first"
                raise EnvironmentUnfit(text) from None
        time.sleep(0.005)


def _allow_many_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _limit() -> int:
    """How many directories may be open: a part of what is allowed, since files have to be opened too."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(1024, most // 4))


def _unmountable(target: str, error: OSError) -> LayerfsError:
    step = f"mounting on {target!r}"
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO) and not os.path.exists("/dev/fuse"):
        return EnvironmentUnfit(f"{step}: there is no /dev/fuse; load the module: modprobe fuse")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return EnvironmentUnfit(f"{step}: /dev/fuse may not be used; chmod a+rw /dev/fuse")
    if not os.path.isdir(target):
        return InvalidArgument(f"{step}: it is no directory")
    return refused(step, error)


def _read_ahead(target: str) -> None:
    """Let the kernel read ahead more than its usual 128 KiB, which takes root."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/mountinfo", "rb") as table:
        name = os.fsencode(target)
        for line in reversed(table.readlines()):
            fields = line.split()
            if fields[4] == name:
                with open(f"/sys/class/bdi/{fields[2].decode()}/read_ahead_kb", "w") as file:
                    file.write(str(_READ_AHEAD_KIB))
                return


if __name__ == "__main__":
    main()
