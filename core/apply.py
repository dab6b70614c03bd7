"""Unpacks a layer's tar stream into a directory tree, without ever leaving it.

`layerfs.confined` finds the directories, `layerfs.deletions` keeps the whiteouts; here the entries are made. Reading,
decompressing and hashing go on in a thread beside it.

Rules where the OCI image spec leaves freedom:

- The last entry of a path wins. A directory over a directory merges; every other pair replaces what was there, with
  all its children.
- Whiteouts (also ``.wh..wh.opq``) count for the whole layer wherever they stand in it, and never for what the same
  layer brings. Other ``.wh..wh.`` names are aufs's own and are passed over.
- A parent directory that has no entry of its own keeps what it has; where there was none, it is made 0755, owned by
  0:0, with the modification time 0, and is listed in `Applied.implied`. So is the parent of a whiteout.
- A hard link's header says nothing about the inode: owner, mode and times are those of the first entry.
- Access times are set to the modification time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from isal import isal_zlib

from layerfs.compression import ReadAhead
from layerfs.confined import DEFAULT_ACL, ConfinedTree, Directory, NeedsParents, Refused, opened, quoted
from layerfs.deletions import PREFIX, Deletions
from layerfs.driver import Whiteouts
from layerfs.errors import BadLayer, EnvironmentUnfit, LayerfsError, refused
from layerfs.record import RecordWriter
from layerfs.tar import header
from layerfs.tar.header import Entry, label
from layerfs.tar.reader import TarReader

__all__ = ["Applied", "NeedsParents", "apply"]

_LARGE: Final = 1 << 26  # files from this size on are compared with the file system's

_CREATE: Final = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC

# The devices that a container has anyway: null zero full random urandom, tty console ptmx, fuse, net/tun, pts/*.
_USUAL_DEVICES: Final = frozenset(
    [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (10, 229), (10, 200)]
    + [(major, minor) for major in range(136, 144) for minor in range(256)]
)


@dataclass(frozen=True, slots=True)
class Applied:
    """What `apply` did.

    Attributes:
        diff_id: SHA-256 of the uncompressed stream, ``sha256:…``.
        size: bytes of the uncompressed stream.
        entries: entries of the archive, whiteouts among them.
        implied: paths of directories that the layer has no entry for and that were made. In a union's upper
            directory they are to get what the parent's directory of that path has; where the parent has a path that
            is no directory, the layer has to be applied to the merged tree.
        root: whether the archive has an entry for the root directory.
        skipped: (path, reason) of what this user namespace or file system does not allow: device nodes, attributes.
    """

    diff_id: str
    size: int
    entries: int
    implied: frozenset[bytes]
    root: bool
    skipped: tuple[tuple[bytes, str], ...]


def apply(
    stream: BinaryIO,
    root: int,
    *,
    whiteouts: Whiteouts | None = None,
    record: BinaryIO | None = None,
    devices: bool = False,
    verified: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Applied:
    """Unpack the layer ``stream`` into the directory ``root``.

    On any error, `KeyboardInterrupt` included, the tree is left as far as it got: whoever calls this works on a copy.

    Args:
        stream: plain, gzip or zstd; a file or a pipe.
        root: descriptor of a tree that nobody else writes to: the merged view of a layer, or a union's upper.
        whiteouts: None where ``root`` is the merged tree and deletions are real; for an upper, its backend's marks.
        record: takes the tar record (see `layerfs.record`).
        devices: also make devices beyond those that every container has.
        verified: the caller compares the diff ID with a known one; the archive may lack its end then, as umoci's.
        progress: is called with the number of further bytes of ``stream`` that were read.

    Raises:
        BadLayer: the stream is damaged or hostile; the text names the entry.
        NeedsParents: with ``whiteouts`` only: see there.
        OutOfSpace, EnvironmentUnfit, KernelRefused: as everywhere, naming the entry.
    """
    with ReadAhead(stream, digest=True) as blocks:
        told = 0

        def next_block() -> bytes:
            nonlocal told
            block = blocks.next()
            if progress is not None and (read := blocks.consumed) != told:
                step, told = read - told, read
                progress(step)
            return block

        writer = None if record is None else RecordWriter(record)
        reader = TarReader(next_block, None if writer is None else writer.raw, end_mark=not verified)
        applier = _Applier(reader, root, whiteouts, writer, devices)
        with contextlib.closing(applier.tree):
            entries = applier.run()
            implied = applier.finish()
        digest = blocks.hexdigest()
        if writer is not None:
            writer.finish(digest, reader.size)
        tree = applier.tree
        return Applied(
            f"sha256:{digest}", reader.size, entries, frozenset(implied), tree.root.entry, tuple(tree.skipped)
        )


class _Applier:
    """One run of `apply`."""

    def __init__(
        self, reader: TarReader, root: int, whiteouts: Whiteouts | None, record: RecordWriter | None, devices: bool
    ) -> None:
        self._reader = reader
        self._whiteouts = whiteouts
        self._record = record
        self._devices = devices
        self._uid, self._gid = os.geteuid(), os.getegid()
        # The bits that open(2) and mkdir(2) would not give as asked; the others need no chmod(2).
        self._unsure = _umask() | 0o7000
        self.tree = ConfinedTree(root, upper=whiteouts is not None)
        self._deletions = Deletions(self.tree, whiteouts)
        self._make: dict[bytes, Callable[[Directory, bytes, Entry], None]] = {
            header.REGULAR: self._regular,
            header.LINK: self._link,
            header.SYMLINK: self._symlink,
            header.CHAR: self._device,
            header.BLOCK_DEVICE: self._device,
            header.FIFO: self._fifo,
            header.DIRECTORY: self._make_directory,
        }

    def run(self) -> int:
        """Apply every entry; the number of entries."""
        count = 0
        for entry in self._reader:
            count += 1
            try:
                self._entry(entry)
            except OSError as error:
                raise _refusal(entry, error) from error
            except Refused as reason:
                raise BadLayer(f"{label(entry.name)} {reason}") from reason.__cause__
        return count

    def finish(self) -> list[bytes]:
        """What has to wait for the last entry; the implied directories."""
        try:
            self._deletions.carry_out()
            return self.tree.finish()
        except OSError as error:
            raise refused("finishing the layer's directories", error) from error

    def _entry(self, entry: Entry) -> None:
        tree = self.tree
        tree.relax()
        name = entry.name
        if entry.kind == header.DIRECTORY:
            name = name.rstrip(b"/") or (b"." if name else b"")  # "/" is the root's name in umoci's archives
        if PREFIX in name and self._deletions.note(name):
            return
        parent, slash, base = name.rpartition(b"/")
        directory = tree.by_path.get(parent)
        if directory is None or (slash and not parent):
            directory, _ = tree.find(parent or slash)
        if base in (b"", b".", b".."):
            self._dress_itself(base, directory, entry)
            return
        self._make[entry.kind](directory, base, entry)
        if not directory.fresh:
            directory.names.add(base)

    # -- entries -----------------------------------------------------------------------------------------------------

    def _regular(self, parent: Directory, name: bytes, entry: Entry) -> None:
        parent_fd = parent.fd if parent.fd >= 0 else self.tree.fd(parent)
        mode = entry.mode
        if entry.stored >= _LARGE:
            _check_room(entry, parent_fd)
        try:
            fd = os.open(name, _CREATE, mode & 0o777, dir_fd=parent_fd)
        except FileExistsError:
            self._make_way(parent, name)
            fd = os.open(name, _CREATE, mode & 0o777, dir_fd=self.tree.fd(parent))
        try:
            if entry.stored or entry.size:
                self._write(fd, parent, name, entry)
            if parent.inherits:
                os.fchown(fd, entry.uid, entry.gid)
                os.fchmod(fd, mode)
            else:
                if entry.uid != self._uid or entry.gid != self._gid:
                    os.fchown(fd, entry.uid, entry.gid)
                if mode & self._unsure:
                    os.fchmod(fd, mode)
            if entry.xattrs or parent.inherits:
                self.tree.set_attributes(fd, parent.path(name), entry.xattrs)
            mtime = entry.mtime
            os.utime(fd, ns=(mtime, mtime))
        finally:
            os.close(fd)

    def _write(self, fd: int, parent: Directory, name: bytes, entry: Entry) -> None:
        """Write an entry's payload, and what the record says about it."""
        checksum = 0
        segments = entry.segments
        if segments is not None:
            pieces = self._placed(fd, segments)
        elif (whole := self._reader.whole()) is not None:
            pieces = iter((whole,))
        else:
            pieces = self._reader.payload()
        for piece in pieces:
            done = os.write(fd, piece)
            while done < len(piece):
                done += os.write(fd, piece[done:])
            if self._record is not None:
                checksum = isal_zlib.crc32(piece, checksum)
        if segments is not None:
            os.ftruncate(fd, entry.size)
        if self._record is not None and entry.stored:
            self._record.file(parent.path(name), entry.stored, segments, checksum)

    def _placed(self, fd: int, segments: array[int]) -> Iterator[memoryview]:
        """The payload of a sparse file in pieces, the file's position set to where each one belongs."""
        pairs = iter(segments)
        left = 0
        for piece in self._reader.payload():
            while piece:
                while not left:
                    offset, left = next(pairs), next(pairs)
                    os.lseek(fd, offset, os.SEEK_SET)
                part = piece[:left]
                left -= len(part)
                piece = piece[len(part) :]
                yield part

    def _link(self, parent: Directory, name: bytes, entry: Entry) -> None:
        target = entry.link
        above, slash, base = target.rpartition(b"/")
        if base in (b"", b".", b".."):
            raise Refused(f"is a hard link to {quoted(target)}")
        try:
            source, _ = self.tree.find(above or slash, create=False)
            status = os.stat(base, dir_fd=self.tree.fd(source), follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                raise Refused(f"is a hard link to the directory {quoted(target)}")
            if source is parent and base == name:
                return

            def make(fd: int) -> None:
                os.link(base, name, src_dir_fd=self.tree.fd(source), dst_dir_fd=fd, follow_symlinks=False)

            self._place(parent, name, make)
        except FileNotFoundError:
            if self._whiteouts is not None:
                raise NeedsParents(f"{label(entry.name)} is a hard link to a file of a lower layer") from None
            raise Refused(f"is a hard link to {quoted(target)}, which does not exist") from None

    def _symlink(self, parent: Directory, name: bytes, entry: Entry) -> None:
        if not entry.link:
            raise Refused("is a symbolic link to nothing")
        self._place(parent, name, lambda fd: os.symlink(entry.link, name, dir_fd=fd))
        parent_fd = self.tree.fd(parent)
        if parent.inherits or entry.uid != self._uid or entry.gid != self._gid:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent_fd, follow_symlinks=False)
        os.utime(name, ns=(entry.mtime, entry.mtime), dir_fd=parent_fd, follow_symlinks=False)

    def _fifo(self, parent: Directory, name: bytes, entry: Entry) -> None:
        self._place(parent, name, lambda fd: os.mkfifo(name, entry.mode & 0o777, dir_fd=fd))
        self._dress_node(parent, name, entry)

    def _device(self, parent: Directory, name: bytes, entry: Entry) -> None:
        character = entry.kind == header.CHAR
        number = (entry.major, entry.minor)
        if character and number == (0, 0):
            raise Refused("is the character device 0:0, which overlay file systems take for a deletion")
        if not (self._devices or (character and number in _USUAL_DEVICES)):
            kind = "character" if character else "block"
            raise Refused(f"is the {kind} device {entry.major}:{entry.minor}, and devices were not asked for")
        if not (0 <= entry.major < 1 << 12 and 0 <= entry.minor < 1 << 20):
            raise Refused("is a device whose number is out of range")
        mode = (stat.S_IFCHR if character else stat.S_IFBLK) | (entry.mode & 0o777)
        try:
            self._place(parent, name, lambda fd: os.mknod(name, mode, device=os.makedev(*number), dir_fd=fd))
        except PermissionError:
            self.tree.skipped.append((parent.path(name), "device nodes cannot be made in this user namespace"))
            return
        self._dress_node(parent, name, entry)

    def _place(self, parent: Directory, name: bytes, make: Callable[[int], None]) -> None:
        """Let ``make`` create ``name`` in the directory whose descriptor it is given, over whatever is there."""
        try:
            make(self.tree.fd(parent))
        except FileExistsError:
            self._make_way(parent, name)
            make(self.tree.fd(parent))

    def _dress_node(self, parent: Directory, name: bytes, entry: Entry) -> None:
        """Owner, mode, attributes and time of a device or fifo that was just made."""
        parent_fd = self.tree.fd(parent)
        os.chown(name, entry.uid, entry.gid, dir_fd=parent_fd, follow_symlinks=False)
        os.chmod(name, entry.mode, dir_fd=parent_fd)
        if entry.xattrs or parent.inherits:
            with opened(name, os.O_PATH, parent_fd) as fd:
                self.tree.set_attributes(f"/proc/self/fd/{fd}", parent.path(name), entry.xattrs)
        os.utime(name, ns=(entry.mtime, entry.mtime), dir_fd=parent_fd, follow_symlinks=False)

    def _make_directory(self, parent: Directory, name: bytes, entry: Entry) -> None:
        directory = parent.children.get(name)
        mode = entry.mode
        plain = replaced = False
        if directory is None:
            parent_fd = self.tree.fd(parent)
            try:
                os.mkdir(name, mode & 0o777, dir_fd=parent_fd)
                fresh = True
            except FileExistsError:
                fresh = not stat.S_ISDIR(os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode)
                if fresh:
                    self._make_way(parent, name)
                    parent_fd = self.tree.fd(parent)
                    os.mkdir(name, mode & 0o777, dir_fd=parent_fd)
                    replaced = self._whiteouts is not None
            directory = parent.children[name] = Directory(parent, name, -1, fresh)
            plain = fresh and not (replaced or parent.inherits or entry.xattrs)
            if plain:  # the usual case needs no descriptor
                if entry.uid != self._uid or entry.gid != self._gid:
                    os.chown(name, entry.uid, entry.gid, dir_fd=parent_fd, follow_symlinks=False)
                if mode & self._unsure:
                    os.chmod(name, mode, dir_fd=parent_fd)
                directory.note_inheritance(mode, entry.gid)
        if plain:
            directory.times = (entry.mtime, entry.mtime)
        else:
            self._dress_directory(directory, entry)
        directory.kept = directory.entry = True
        if replaced and self._whiteouts is not None:
            # What a lower layer has under this name was hidden by the file that stood here.
            self._whiteouts.make_opaque(self.tree.fd(directory))

    def _dress_directory(self, directory: Directory, entry: Entry) -> None:
        """Give a directory all that its entry says, whatever it had before."""
        fd = self.tree.fd(directory)
        os.fchown(fd, entry.uid, entry.gid)
        os.fchmod(fd, entry.mode)
        wanted = dict(entry.xattrs)
        directory.default_acl = wanted.pop(DEFAULT_ACL, None)
        self.tree.set_attributes(fd, directory.path(), wanted)
        directory.times = (entry.mtime, entry.mtime)
        directory.entry = directory.kept = True
        directory.note_inheritance(entry.mode, entry.gid)

    def _dress_itself(self, base: bytes, directory: Directory, entry: Entry) -> None:
        """An entry whose name ends in a dot, such as the root's."""
        if base == b"..":
            raise Refused("has '..' in its name")
        if not entry.name or entry.kind != header.DIRECTORY:
            raise Refused("has a name that only a directory can have")
        self._dress_directory(directory, entry)

    def _make_way(self, parent: Directory, name: bytes) -> None:
        """Take away what stands where an entry goes."""
        if self._record is not None and parent.has(name):
            self._save(parent, name, self.tree.fd(parent))
        self.tree.remove(parent, name)

    def _save(self, parent: Directory, name: bytes, parent_fd: int) -> None:
        """Put the files that are about to go into the record, because their payloads will not be in the tree."""
        assert self._record is not None
        status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        if stat.S_ISREG(status.st_mode):
            with opened(name, os.O_RDONLY, parent_fd) as fd:
                self._record.saved(parent.path(name), fd)
        elif stat.S_ISDIR(status.st_mode):
            for path, _, files, fd in os.fwalk(name, dir_fd=parent_fd):
                for file in files:
                    if stat.S_ISREG(os.stat(file, dir_fd=fd, follow_symlinks=False).st_mode):
                        with opened(file, os.O_RDONLY, fd) as file_fd:
                            self._record.saved(parent.path(os.path.join(path, file)), file_fd)


def _umask() -> int:
    """The file creation mask, read without changing it for other threads (proc(5))."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o777


def _check_room(entry: Entry, fd: int) -> None:
    """Refuse a large file before its first byte where it cannot fit."""
    space = os.fstatvfs(fd)
    if entry.stored > space.f_blocks * space.f_frsize > 0:
        raise Refused(f"has {entry.stored} bytes, more than the whole file system")
    if entry.stored > space.f_bavail * space.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_mapped(number: int, kind: str) -> bool:
    """Whether an owner exists in this user namespace (user_namespaces(7))."""
    with open(f"/proc/self/{kind}_map") as table:
        return any(first <= number < first + count for first, _, count in (map(int, line.split()) for line in table))


_BAD_NAME_OR_VALUE: Final = frozenset(
    [
        errno.E2BIG, errno.EEXIST, errno.EFBIG, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.EMLINK,
        errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EOVERFLOW, errno.ERANGE, errno.EXDEV,
    ]
)  # fmt: skip


def _refusal(entry: Entry, error: OSError) -> LayerfsError:
    """What the kernel's refusal of an entry means."""
    name = label(entry.name)
    text = error.strerror or str(error)
    if error.errno in (errno.EINVAL, errno.EPERM, errno.EOVERFLOW) and not (
        _is_mapped(entry.uid, "uid") and _is_mapped(entry.gid, "gid")
    ):
        return EnvironmentUnfit(
            f"{name} belongs to {entry.uid}:{entry.gid}, which this user namespace has no ids for; give your user a "
            "range in /etc/subuid and /etc/subgid (package uidmap)"
        )
    if error.errno in _BAD_NAME_OR_VALUE:
        return BadLayer(f"{name} cannot be made: {text}")
    return refused(f"making {name}", error)
