"""Mounting what a driver describes: attach, take down, or open as a directory without a place in the file tree."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from layerfs import mount_table
from layerfs.driver import Mount
from layerfs.errors import EnvironmentUnfit, FailedPrecondition, refused
from layerfs.kernel import fuse
from layerfs.kernel import mountapi as api
from layerfs.kernel.openat2 import RESOLVE_IN_ROOT, openat2

_ATTRIBUTES = {
    "ro": api.MOUNT_ATTR_RDONLY,
    "nosuid": api.MOUNT_ATTR_NOSUID,
    "nodev": api.MOUNT_ATTR_NODEV,
    "noexec": api.MOUNT_ATTR_NOEXEC,
    "noatime": api.MOUNT_ATTR_NOATIME,
    "strictatime": api.MOUNT_ATTR_STRICTATIME,
    "nodiratime": api.MOUNT_ATTR_NODIRATIME,
    "nosymfollow": api.MOUNT_ATTR_NOSYMFOLLOW,
}
_FLAGS = {
    "ro": api.MS_RDONLY,
    "nosuid": api.MS_NOSUID,
    "nodev": api.MS_NODEV,
    "noexec": api.MS_NOEXEC,
    "noatime": api.MS_NOATIME,
    "relatime": api.MS_RELATIME,
    "strictatime": api.MS_STRICTATIME,
    "nodiratime": api.MS_NODIRATIME,
    "nosymfollow": api.MS_NOSYMFOLLOW,
}
_NOT_FOR_THE_FILE_SYSTEM = frozenset(
    {*_FLAGS, "rw", "suid", "dev", "exec", "defaults", "bind", "rbind", "atime", "diratime"}
)

# What a kernel without the new calls answers (ENOSYS), and one whose overlayfs has no lowerdir+ (EINVAL).
_TOO_OLD = frozenset({errno.ENOSYS, errno.EINVAL})

_PATIENCE = 3.0
"""Seconds that an unmount waits for FUSE daemons that hold the mount."""

_new_api = True
"""False once the kernel has turned out not to know the calls that `_detached` uses."""


def attach(mounts: Sequence[Mount], target: Path) -> None:
    """Mount ``mounts`` in their order at the directory ``target``; when one fails, none stays.

    A mount's own ``target`` is looked up inside what is mounted so far, where links cannot lead out of it.
    Raises `EnvironmentUnfit` for lack of privilege or of a file system type, `KernelRefused` otherwise.
    """
    with ExitStack() as stack:
        done: list[int] = []
        try:
            for mount in mounts:
                with _reported(mount, target), _place(mount, target) as place:
                    done.append(stack.enter_context(_fd(_mounted(mount, place))))
        except BaseException:
            for fd in reversed(done):
                _umount(Path(os.readlink(_named(fd))), api.MNT_DETACH)
            raise


def unmount(target: Path, *, lazy: bool = False) -> None:
    """Take down the mount at ``target`` with the mounts below it; nothing mounted there is no error.

    With ``lazy`` it goes from the file tree at once, and from the kernel when its last user closes it.
    Raises `FailedPrecondition` naming the processes that hold it.
    """
    try:
        if lazy:
            _umount(target, api.MNT_DETACH)
        elif not _umounted_alone(target):
            for inner in mount_table.below(target):
                _umount_patiently(inner)
            _umount_patiently(target)
    except OSError as error:
        if error.errno == errno.EBUSY:
            kernel = "the kernel itself (a loop device, a swap file, another mount)"
            who = ", ".join(mount_table.holders(target)) or kernel
            raise FailedPrecondition(f"unmounting {str(target)!r}: it is in use by {who}; end that first") from error
        raise refused(f"unmounting {str(target)!r}", error) from error


@contextmanager
def opened(mounts: Sequence[Mount]) -> Iterator[int]:
    """A directory descriptor of the tree that ``mounts`` show, without a place in the file tree.

    The mount is gone when the context ends, however the process ends. A plain read-write bind needs no privilege: its
    source is opened as it is, and so is a read-only one for a process that may not mount.
    Raises what `attach` raises.
    """
    with ExitStack() as stack:
        first = mounts[0]
        with _reported(first):
            fd = _opened_alone(first, stack) if len(mounts) == 1 else _opened_hidden(mounts, stack)
        yield stack.enter_context(_fd(fd))


# Making mounts


def _opened_alone(mount: Mount, stack: ExitStack) -> int:
    """Open the directory that one mount shows; ``stack`` keeps the mount for as long as it is needed."""
    if mount.type == "bind" and not mount.read_only:
        return _directory(mount.source)
    try:
        detached = _detached(mount)
    except PermissionError:
        if mount.type != "bind":
            raise
        return _directory(mount.source)
    if detached is None:
        return _opened_hidden([mount], stack)
    return _root(stack.enter_context(_fd(detached)))


def _opened_hidden(mounts: Sequence[Mount], stack: ExitStack) -> int:
    """Open what mounts show that have to stand at a private place for a moment."""
    place = Path(tempfile.mkdtemp(prefix="layerfs-"))
    try:
        attach(mounts, place)
        try:
            if len(mounts) == 1:
                return _directory(place)  # which keeps the mount
            # Those that lie on the first one stay on a copy of all of them.
            copy = api.open_tree(api.AT_FDCWD, str(place), api.OPEN_TREE_CLONE | api.AT_RECURSIVE)
            return _root(stack.enter_context(_fd(copy)))
        finally:
            unmount(place, lazy=True)
    finally:
        place.rmdir()


def _mounted(mount: Mount, place: int) -> int:
    """Mount ``mount`` over the directory that ``place`` has open; an O_PATH descriptor of its root."""
    fd = _detached(mount)
    if fd is not None:
        try:
            api.move_mount(fd, place)
        except OSError:
            os.close(fd)
            raise
        return fd
    # The classic calls take names only; once mounted, the name leads to the new mount, `place` to what it covers.
    name = os.readlink(_named(place))
    if _known(mount.type):
        _mount_classic(mount, name)
    else:
        _mount_helper(mount, name)
    return os.open(name, os.O_PATH | os.O_CLOEXEC)


def _detached(mount: Mount) -> int | None:
    """A detached mount, as an O_PATH descriptor; None where only the classic way can make it."""
    global _new_api  # noqa: PLW0603 - what the kernel can do is one fact for the whole process
    if not _new_api or not _known(mount.type) or _too_long(mount):
        return None
    try:
        return _detached_bind(mount) if mount.type == "bind" else _detached_new(mount)
    except OSError as error:
        if error.errno not in _TOO_OLD or not _lacks_new_api():
            raise
    _new_api = False
    return None


def _detached_bind(mount: Mount) -> int:
    recursive = "rbind" in mount.options
    flags = api.OPEN_TREE_CLONE | (api.AT_RECURSIVE if recursive else 0)
    fd = api.open_tree(api.AT_FDCWD, mount.source, flags)
    try:
        if attributes := _attributes(mount):
            api.mount_setattr(fd, attributes, _cleared(attributes), recursive=recursive)
    except OSError:
        os.close(fd)
        raise
    return fd


def _detached_new(mount: Mount) -> int:
    if not (mount.read_only and _has_one_superblock(mount)):
        return _detached_superblock(mount, read_only=mount.read_only)
    try:
        return _detached_superblock(mount, read_only=False)
    except OSError as error:
        if error.errno not in _ONLY_READ_ONLY:
            raise
    return _detached_superblock(mount, read_only=True)


def _has_one_superblock(mount: Mount) -> bool:
    """Whether all mounts of the source share one superblock: with a block device, and with zfs.

    The kernel refuses (EBUSY) to show it read-only where it is mounted writable, and the other way round. What is only
    looked at is therefore read-only as a mount, and as a whole only if it must be.
    """
    try:
        return mount.type == "zfs" or stat.S_ISBLK(os.stat(mount.source).st_mode)
    except OSError:
        return False


_ONLY_READ_ONLY = frozenset({errno.EBUSY, errno.EACCES, errno.EROFS})
"""What the kernel says to a writable mount of what can only be mounted read-only."""


def _detached_superblock(mount: Mount, *, read_only: bool) -> int:
    with ExitStack() as stack:
        context = stack.enter_context(_fd(api.fsopen(mount.type)))
        if mount.source:
            api.fsconfig_string(context, "source", mount.source)
        if read_only:
            api.fsconfig_flag(context, "ro")
        for key, value in _settings(mount):
            if value is None:
                api.fsconfig_flag(context, key)
            else:
                api.fsconfig_string(context, key, _short(value, stack) if key in _DIRECTORIES else value)
        api.fsconfig_create(context)
        return api.fsmount(context, _attributes(mount))


_DIRECTORIES = frozenset({"lowerdir+", "upperdir", "workdir"})


def _settings(mount: Mount) -> Iterator[tuple[str, str | None]]:
    """The options that are the file system's own, with overlay's directories taken apart and free of escapes."""
    for option in mount.options:
        if option in _NOT_FOR_THE_FILE_SYSTEM:
            continue
        key, equals, value = option.partition("=")
        if mount.type == "overlay" and key == "lowerdir":
            yield from (("lowerdir+", _unescaped(part)) for part in _split(value))
        elif mount.type == "overlay" and key in ("upperdir", "workdir"):
            yield key, _unescaped(value)
        else:
            yield key, value if equals else None


def _short(path: str, stack: ExitStack) -> str:
    """A name for the directory that overlayfs takes as it is: itself, or by way of a descriptor of it.

    The kernel takes up to 255 bytes, and undoes escapes in some of these options but not in others.
    """
    if len(os.fsencode(path)) <= api.VALUE_LIMIT and not re.search(r"[\\,:]", path):
        return path
    return _named(stack.enter_context(_fd(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))))


def _mount_classic(mount: Mount, target: str) -> None:
    """mount(2), for kernels before 6.8 (overlay's ``lowerdir+``) or 5.12 (read-only bind mounts)."""
    flags = 0
    for option in mount.options:
        flags |= _FLAGS.get(option, 0)
    if mount.type == "bind":
        recursive = api.MS_REC if "rbind" in mount.options else 0
        api.mount(mount.source, target, "", api.MS_BIND | recursive)
        if flags:
            _remount(target, flags)
        return
    late = flags & api.MS_RDONLY if _has_one_superblock(mount) else 0
    with ExitStack() as stack:
        data = os.fsencode(",".join(_classic_options(mount, stack)))
        try:
            _in_fd_directory(lambda: api.mount(mount.source, target, mount.type, flags & ~late, data))
        except OSError as error:
            if not late or error.errno not in _ONLY_READ_ONLY:
                raise
            _in_fd_directory(lambda: api.mount(mount.source, target, mount.type, flags, data))
    if late:
        _remount(target, flags)


def _remount(target: str, flags: int) -> None:
    """Change the flags of the mount at ``target``, not those of its file system."""
    try:
        api.mount("", target, "", api.MS_BIND | api.MS_REMOUNT | flags)
    except OSError:
        api.umount(target, api.MNT_DETACH)
        raise


def _classic_options(mount: Mount, stack: ExitStack) -> Iterator[str]:
    """The option string, with overlay's directories as the bare numbers of their descriptors.

    They are names relative to /proc/self/fd: 500 layers fit into the one page that mount(2) takes.
    """
    lower: list[str] = []
    for key, value in _settings(mount):
        if value is not None and key in _DIRECTORIES:
            fd = stack.enter_context(_fd(os.open(value, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)))
            if key == "lowerdir+":
                lower.append(str(fd))
            else:
                yield f"{key}={fd}"
        else:
            yield key if value is None else f"{key}={value}"
    if lower:
        yield "lowerdir=" + ":".join(lower)


def _in_fd_directory(call: Callable[[], None]) -> None:
    """Run ``call`` in a thread that has a working directory of its own: /proc/self/fd."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            api.unshare_cwd()
            os.chdir("/proc/self/fd")
            call()
        except BaseException as error:  # handed to the caller's thread below
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def _mount_helper(mount: Mount, target: str) -> None:
    """Have a program mount: that of a FUSE file system, else mount(8), which knows the helper of the type."""
    options = ["-o", ",".join(mount.options)] if mount.options else []
    if is_fuse(mount.type):
        command = [_fuse_program(mount.type), mount.source, target, *options]
    else:
        program = shutil.which("mount")
        if program is None:
            raise EnvironmentUnfit(f"mounting type {mount.type!r} needs mount(8); install the package mount")
        command = [program, "-t", mount.type, *options, "--", mount.source, target]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if result.returncode:
        words = result.stderr.decode(errors="replace").strip() or f"{command[0]} ended with {result.returncode}"
        raise OSError(errno.ENODEV if "unknown filesystem" in words else errno.EIO, words)


def is_fuse(filesystem: str) -> bool:
    """Whether a program serves this type: ``fuse.PROGRAM`` or ``fuse3.PROGRAM``."""
    return filesystem.startswith(("fuse.", "fuse3."))


def _fuse_program(filesystem: str) -> str:
    """The program of the type, from beside the interpreter, where an environment that is not active has it, or PATH.

    It is called as mount(8) would call it, but needs no root then.
    """
    name = filesystem.partition(".")[2]
    program = shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), *os.get_exec_path()]))
    if program is None:
        raise EnvironmentUnfit(f"mounting type {filesystem!r} needs the program {name!r}, which is not in PATH")
    return program


def _known(filesystem: str) -> bool:
    """Whether the kernel itself mounts this type, without a helper program."""
    return "." not in filesystem and filesystem != "fuse"


def _too_long(mount: Mount) -> bool:
    """Whether an option is longer than the new API can pass; overlay's are taken apart."""
    longest = max(map(len, map(os.fsencode, mount.options)), default=0)
    return mount.type != "overlay" and longest > api.VALUE_LIMIT


def _lacks_new_api() -> bool:
    """Whether this kernel cannot build an overlay layer by layer, or has no mount API of that kind at all."""
    try:
        with _fd(api.fsopen("overlay")) as context:
            api.fsconfig_string(context, "lowerdir+", "/")
            if _takes_anything(context):
                return True
            api.mount_setattr(context, 0)
    except OSError as error:
        return error.errno == errno.ENOSYS or (error.errno == errno.EINVAL and "lowerdir+" in str(error))
    return False


def _takes_anything(context: int) -> bool:
    """Whether this file system only collects its options and looks at them when it is made (overlayfs before 6.5)."""
    try:
        api.fsconfig_string(context, "no-such-option", "1")
    except OSError:
        return False
    return True


def _attributes(mount: Mount) -> int:
    result = 0
    for option in mount.options:
        result |= _ATTRIBUTES.get(option, 0)
    return result


def _cleared(attributes: int) -> int:
    """What mount_setattr(2) wants cleared along with them: the old access-time mode when a new one is set."""
    times = api.MOUNT_ATTR_NOATIME | api.MOUNT_ATTR_STRICTATIME
    return api.MOUNT_ATTR_ATIME if attributes & times else 0


# Places and names


@contextmanager
def _fd(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _named(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _root(mount_fd: int) -> int:
    """A descriptor for reading the root directory of the mount that an O_PATH descriptor stands for."""
    return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount_fd)


def _directory(path: str | Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


@contextmanager
def _place(mount: Mount, target: Path) -> Iterator[int]:
    """The directory (or file) that ``mount`` is to cover."""
    with _fd(os.open(target, os.O_PATH | os.O_CLOEXEC)) as base:
        if not mount.target:
            yield base
            return
        with _fd(openat2(base, mount.target, os.O_PATH, resolve=RESOLVE_IN_ROOT)) as place:
            yield place


@contextmanager
def _reported(mount: Mount, target: Path | None = None) -> Iterator[None]:
    """Turn what the kernel says in the body into an error of the family."""
    try:
        yield
    except OSError as error:
        where = f" at {str(target / mount.target)!r}" if target else ""
        step = f"mounting {mount.type} of {mount.source!r}{where}"
        if error.errno == errno.ENODEV:
            text = f"{step}: this kernel has no such file system; load its module (modprobe {mount.type})"
            raise EnvironmentUnfit(text) from error
        raise refused(step, error) from error


def _split(value: str) -> list[str]:
    """Split at the colons that no backslash escapes."""
    return re.findall(r"(?:\\.|[^:\\])+", value, re.DOTALL)


def _unescaped(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL)


# Taking down


def _umounted_alone(target: Path) -> bool:
    """Whether a mount was there with none below it, which has gone.

    Looking for those below reads the list of all mounts, which takes milliseconds where there are a thousand.
    """
    try:
        return _umount(target, 0)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False


def _umount(target: Path, flags: int) -> bool:
    """Unmount; false where there is neither a mount point nor anything at all."""
    try:
        api.umount(target, flags | api.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.EPERM and any(is_fuse(mount.type) for mount in mount_table.at(target)):
            fuse.unmount_by_helper(str(target), lazy=bool(flags & api.MNT_DETACH))
        elif error.errno in (errno.EINVAL, errno.ENOENT):
            return False
        else:
            raise
    return True


def _umount_patiently(target: Path) -> None:
    """Unmount; FUSE daemons that use the mount get some time, since they may be about to end with mounts of theirs."""
    ends = time.monotonic() + _PATIENCE
    last = False
    while True:
        try:
            _umount(target, 0)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or last:
                raise
        last = time.monotonic() > ends or not mount_table.daemons(target)  # one more try: they may have ended just now
        time.sleep(0.01)
