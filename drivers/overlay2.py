"""overlay2: the kernel's own union mount (Documentation/filesystems/overlayfs.rst).

Whiteouts are character devices 0:0, as the kernel makes them itself. Those that others wrote as empty files with the
attribute ``overlay.whiteout`` in a directory marked ``overlay.opaque=x`` (Linux 6.7) are understood. The attributes are
called ``trusted.overlay.…``, or ``user.overlay.…`` with the mount option ``userxattr`` in a user namespace; a store
that was begun in one keeps that for good.

Options that decide what a layer looks like are given on every mount, so that no module parameter changes them:

- ``index=on`` keeps hard links together when one of their names is copied up, as every other driver does. It also makes
  the kernel refuse (EBUSY) to mount a volume for writing that is mounted for writing elsewhere, where ``index=off``
  would silently let both write. A user namespace has no index: there a copy-up breaks hard links.
- ``redirect_dir`` and ``metacopy`` are off: with them an upper directory alone does not tell what a layer changes.
- ``xino`` is left alone: all layers lie on one file system, whose inode numbers are shown as they are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from layerfs import mounts
from layerfs.apply import NeedsParents
from layerfs.driver import Capability, Mount, Probe, Problem, Whiteouts
from layerfs.errors import Damaged, EnvironmentUnfit, InvalidArgument, LayerfsError, refused
from layerfs.kernel import xattr
from layerfs.kernel.handles import file_handle
from layerfs.kernel.libc import check as checked
from layerfs.kernel.libc import libc
from layerfs.kernel.openat2 import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2
from layerfs.probing import filesystem_of, kernel_knows, nearest, tells_types
from layerfs.treecopy import remove_tree
from layerfs.union import UnionDriver
from layerfs.volume_dirs import opened
from layerfs.walk import walk

_DEFAULTS = {"index": "on", "redirect_dir": "off", "metacopy": "off", "volatile": "off"}

_USER_MARK = ".userxattr"
"""A file in the driver's root: its layers use ``user.overlay.…``, whoever mounts them."""

# What the kernel notes about the very inodes of an upper directory; a copy has others.
_OWN_NOTES = ("origin", "impure", "nlink", "uuid", "upper")

# struct ovl_fb: version, magic, length, flags, type, uuid, and then the file system's own handle.
_INDEX_HEAD = struct.Struct("=BBBBB16s")


class Overlay2Driver(UnionDriver):
    """Kernel overlay mounts of plain directories, on any file system that can be an upper layer."""

    name = "overlay2"
    summary = "a layer is a directory, a child an overlay mount over its parents"

    def __init__(self, root: Path, options: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(root, options)
        self._settings = _settings(options)
        self._user: bool | None = None

    @classmethod
    def probe(cls, root: Path) -> Probe:
        if not kernel_knows("overlay"):
            return Probe(False, "the kernel has no overlay file system", "load its module: modprobe overlay")
        place = nearest(root)
        filesystem = filesystem_of(place)
        try:
            with tempfile.TemporaryDirectory(prefix=".layerfs-probe-", dir=place) as scratch:
                return _tried(Path(scratch), filesystem)
        except OSError as error:
            return Probe(False, f"{str(place)!r} cannot be written to: {error.strerror}", "choose another --root")

    @property
    def capabilities(self) -> Capability:
        return super().capabilities | Capability.SHARED_CACHE | Capability.ROOTLESS

    @property
    def native_changes(self) -> bool:
        return self._settings["redirect_dir"] == self._settings["metacopy"] == "off"

    @property
    def whiteouts(self) -> Whiteouts:
        return OverlayWhiteouts(self._prefix)

    def hidden_by(self, dir_fd: int, name: bytes, info: os.stat_result) -> bytes | None:
        if stat.S_ISCHR(info.st_mode):
            return name if info.st_rdev == 0 else None
        marked = (
            stat.S_ISREG(info.st_mode)
            and info.st_size == 0
            and _attribute(b"/proc/self/fd/%d/%s" % (dir_fd, name), f"{self._prefix}whiteout") is not None
            and _attribute(dir_fd, f"{self._prefix}opaque") == b"x"
        )
        return name if marked else None

    def is_opaque(self, dir_fd: int) -> bool:
        return _attribute(dir_fd, f"{self._prefix}opaque") == b"y"

    def union(self, volume: str, lowers: Sequence[Path], *, read_only: bool) -> list[Mount]:
        """See `UnionDriver.union`.

        To be read only, a volume is one more lower layer, which works while it is mounted elsewhere; but where the
        index holds what the upper does not, the index has to be used.
        """
        upper = self.upper_path(volume)
        if read_only and self.is_complete(volume):
            layers = ["lowerdir=" + ":".join(map(_escaped, (upper, *lowers)))]
            index = "off"
        else:
            work = self.work_path(volume)
            layers = ["lowerdir=" + ":".join(map(_escaped, lowers))]
            layers += [f"upperdir={_escaped(upper)}", f"workdir={_escaped(work)}"]
            index = "off" if self._in_user_namespace else self._settings["index"]
            if self._settings["volatile"] == "on" and not read_only:
                self._forgive_volatile(volume)
                layers.append("volatile")
        options = ["ro" if read_only else "rw", *layers, f"index={index}", *self._shape]
        return [Mount("overlay", "overlay", tuple(options))]

    def create(self, volume: str, parents: Sequence[str], *, size: int | None = None) -> None:
        self._settle_names()
        super().create(volume, parents, size=size)

    def seal(self, volume: str, parents: Sequence[str]) -> None:
        super().seal(volume, parents)
        if self._settings["volatile"] == "on":
            try:
                with opened(self.upper_path(volume)) as fd:
                    checked(libc.syncfs(fd))
            except OSError as error:
                raise refused(f"writing out the volume {volume!r}", error) from error

    def is_complete(self, volume: str) -> bool:
        return not any(self._pending(volume))

    def complete(self, volume: str, parents: Sequence[str]) -> None:
        """Copy up every name of the files that the index holds together.

        Until it is touched, a further name of a copied-up file is only in a lower layer, and shows the upper's file by
        way of the index, which other mounts do not have.
        """
        handles = set(self._pending(volume))
        if not handles:
            return
        try:
            with mounts.opened(self.mounts(volume, parents)) as tree:
                for parent in parents:
                    with opened(self.upper_path(parent)) as lower:
                        _touch_names(tree, lower, handles)
        except OSError as error:
            raise refused(f"copying up the hard links of the volume {volume!r}", error) from error

    def disown(self, upper: int) -> None:
        notes = tuple(self._prefix + note for note in _OWN_NOTES)
        for _, fd, entries in walk(upper):
            files = [f"/proc/self/fd/{fd}/{e.name}" for e in entries if not e.is_dir(follow_symlinks=False)]
            for file in (f"/proc/self/fd/{fd}/.", *files):
                for key in os.listxattr(file, follow_symlinks=False):
                    # An empty origin is not about an inode: it says that a directory may hold whiteouts.
                    if key in notes and xattr.get(file, key, follow_symlinks=False):
                        os.removexattr(file, key, follow_symlinks=False)

    def check(self, volume: str, parents: Sequence[str]) -> Iterator[Problem]:
        problems = list(super().check(volume, parents))
        yield from problems
        if problems or not parents or not self.work_path(volume).exists():
            return
        if self._crashed_volatile(volume):
            what = "it was mounted with volatile=on when the machine went down: files may be damaged"
            yield Problem(volume, what, repairable=True)
        elif self._is_stale(volume, parents):
            what = "its index does not fit its files any more, as after a copy of the whole store"
            yield Problem(volume, what, repairable=True)

    def repair(self, volume: str, parents: Sequence[str]) -> None:
        """See `Driver.repair`: a new work directory, and no notes about inodes that are not there any more."""
        if not self.work_path(volume).exists():
            return
        if self._crashed_volatile(volume) or self._is_stale(volume, parents):
            with opened(self.work_path(volume)) as work:
                for name in os.listdir(work):
                    remove_tree(work, name)
            with opened(self.upper_path(volume)) as upper:
                self.disown(upper)

    def status(self) -> dict[str, str]:
        return {
            "file system": filesystem_of(self.root),
            "attributes": f"{self._prefix}*",
            "hard links": "break at copy-up" if self._breaks_links else "kept at copy-up (index=on)",
            "native changes": "yes" if self.native_changes else "no: redirect_dir or metacopy is on",
        }

    # Names of attributes

    @property
    def _in_user_namespace(self) -> bool:
        """Whether this process may not use ``trusted.…`` attributes, or this store does not."""
        if self._user is None:
            self._user = (self.root / _USER_MARK).exists() or not _may_trust(self.root)
        return self._user

    @property
    def _prefix(self) -> str:
        return "user.overlay." if self._in_user_namespace else "trusted.overlay."

    @property
    def _breaks_links(self) -> bool:
        return self._in_user_namespace or self._settings["index"] == "off"

    @property
    def _shape(self) -> list[str]:
        """The options that decide how layers are read and written, the same on every mount."""
        if self._in_user_namespace:
            if not self.native_changes:
                raise EnvironmentUnfit("redirect_dir=on and metacopy=on need root: leave them out in a user namespace")
            return ["redirect_dir=nofollow", "metacopy=off", "userxattr"]
        redirect = "on" if self._settings["redirect_dir"] == "on" else "nofollow"
        return [f"redirect_dir={redirect}", f"metacopy={self._settings['metacopy']}"]

    def _settle_names(self) -> None:
        if self._in_user_namespace and not (self.root / _USER_MARK).exists():
            (self.root / _USER_MARK).touch()

    # The index and the work directory

    def _pending(self, volume: str) -> Iterator[tuple[int, bytes]]:
        """The handles of the lower files that are copied up, but not under all of their names."""
        index = self.work_path(volume) / "index"
        try:
            names = os.listdir(index)
        except FileNotFoundError:
            return
        for name in names:
            if re.fullmatch("(?:[0-9a-f]{2})+", name) and not stat.S_ISDIR((index / name).lstat().st_mode):
                # U-1: the inode has as many names as the upper has, but for that in the index itself.
                if _attribute(os.fsencode(index / name), f"{self._prefix}nlink") == b"U-1":
                    continue
                raw = bytes.fromhex(name)
                yield _INDEX_HEAD.unpack_from(raw)[4], raw[_INDEX_HEAD.size :]

    def _volatile_mark(self, volume: str) -> Path:
        return self.work_path(volume) / "work" / "incompat" / "volatile"

    def _crashed_volatile(self, volume: str) -> bool:
        """Whether a volatile mount of an earlier boot has left its mark; that of this boot has lost nothing."""
        booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        try:
            return self._volatile_mark(volume).stat().st_ctime < booted - 1
        except FileNotFoundError:
            return False

    def _forgive_volatile(self, volume: str) -> None:
        """Remove the mark that keeps the kernel from mounting again what was mounted with ``volatile``."""
        if self._crashed_volatile(volume):
            raise Damaged(
                f"the volume {volume!r} was mounted with volatile=on when the machine went down; "
                "`layerfs check --repair` accepts it as it is"
            )
        with contextlib.suppress(FileNotFoundError), opened(self._volatile_mark(volume).parent) as fd:
            remove_tree(fd, "volatile")

    def _is_stale(self, volume: str, parents: Sequence[str]) -> bool:
        """Whether the kernel refuses the volume because its notes about inodes do not fit (ESTALE)."""
        if self._breaks_links or not (self.work_path(volume) / "index").exists():
            return False
        try:
            with mounts.opened(self.union(volume, [self.upper_path(p) for p in parents], read_only=False)):
                return False
        except LayerfsError as error:
            return getattr(error, "errno", None) == errno.ESTALE


class OverlayWhiteouts:
    """Deletions as kernel overlayfs marks them, see `layerfs.driver.Whiteouts`.

    Where mknod(2) of the device 0:0 is forbidden, `hide` raises `NeedsParents`: a mount can still delete there.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def hide(self, dir_fd: int, name: bytes) -> None:
        remove_tree(dir_fd, name)
        if _attribute(dir_fd, f"{self._prefix}opaque") == b"y":
            return
        # The kernel looks for whiteouts in merged directories only. An empty origin tells it to look here as well, so
        # that a whiteout for something that no lower layer has is not seen as a file.
        with contextlib.suppress(FileExistsError):
            os.setxattr(dir_fd, f"{self._prefix}origin", b"", os.XATTR_CREATE)
        try:
            os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=dir_fd)
        except PermissionError as error:
            raise NeedsParents("mknod of a whiteout is forbidden here") from error

    def make_opaque(self, dir_fd: int) -> None:
        os.setxattr(dir_fd, f"{self._prefix}opaque", b"y")


def _settings(options: Mapping[str, str]) -> dict[str, str]:
    for key, value in options.items():
        if key not in _DEFAULTS:
            raise InvalidArgument(f"overlay2 has no option {key!r}; it has {', '.join(sorted(_DEFAULTS))}")
        if value not in ("on", "off"):
            raise InvalidArgument(f"overlay2's option {key} is on or off, not {value!r}")
    if options.get("metacopy") == "on":
        if options.get("redirect_dir") == "off":
            raise InvalidArgument("overlay2's metacopy=on needs redirect_dir=on")
        return {**_DEFAULTS, **options, "redirect_dir": "on"}
    return {**_DEFAULTS, **options}


def _escaped(path: Path) -> str:
    return re.sub(r"([\\,:])", r"\\\1", str(path))


def _attribute(file: int | bytes, key: str) -> bytes | None:
    """An extended attribute of a descriptor, or of a path that is not followed; None where there is none."""
    try:
        return xattr.get(file, key, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOENT, errno.EPERM):
            return None
        raise


def _may_trust(root: Path) -> bool:
    """Whether this process may set ``trusted.…`` attributes, which takes CAP_SYS_ADMIN in the first user namespace."""
    key = "trusted.layerfs.probe"
    try:
        os.setxattr(root, key, b"")
        os.removexattr(root, key)
    except OSError:
        return False
    return True


def _touch_names(tree: int, lower: int, handles: set[tuple[int, bytes]]) -> None:
    """Copy up each name in the mounted ``tree`` that still shows one of the files ``handles`` of a lower layer."""
    for path, fd, entries in walk(lower):
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                continue
            info = entry.stat(follow_symlinks=False)
            name = os.fsencode(entry.name)
            if info.st_nlink > 1 and file_handle(fd, name) in handles:
                _touch(tree, path, name, info.st_ino)


def _touch(tree: int, path: bytes, name: bytes, inode: int) -> None:
    """Set the times of a file that has the number ``inode`` to what they are, by which the kernel copies it up."""
    try:
        place = openat2(tree, path or b".", os.O_PATH | os.O_DIRECTORY, resolve=RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
    except OSError:  # a nearer layer has something else there, or nothing
        return
    try:
        info = os.stat(name, dir_fd=place, follow_symlinks=False)
        if info.st_ino == inode:
            os.utime(name, ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=place, follow_symlinks=False)
    except FileNotFoundError:
        pass
    finally:
        os.close(place)


def _tried(scratch: Path, filesystem: str) -> Probe:
    """Mount a small overlay in the empty directory ``scratch``, without a place in the file tree, and delete in it."""
    driver = Overlay2Driver(scratch)
    driver.create("lower", ())
    (driver.upper_path("lower") / "file").touch()
    driver.create("upper", ["lower"])
    if not tells_types(driver.upper_path("lower")):
        reason = f"{filesystem} does not tell the types of directory entries"
        return Probe(False, reason, "make that file system anew with them (mkfs.xfs -n ftype=1)")
    try:
        with mounts.opened(driver.mounts("upper", ["lower"])) as tree:
            os.unlink("file", dir_fd=tree)
    except (OSError, LayerfsError) as error:
        return Probe(False, f"an overlay mount on {filesystem} fails: {error}", _remedy(error))
    return Probe(True, f"kernel overlayfs on {filesystem}" + (", in a user namespace" * driver._in_user_namespace))


def _remedy(error: Exception) -> str:
    if isinstance(error, EnvironmentUnfit):
        return "run it as root, or in a user namespace: unshare --map-root-user --mount (package util-linux)"
    return "put the store on ext4, xfs, btrfs or tmpfs, with --root or on a backing of its own"
