"""zfs: every layer is a dataset, a child a clone of the snapshot ``@layer`` that its parent got when it was sealed.

Works with OpenZFS, whose datasets are mounted by whoever wants to see them (type ``zfs``), and with zfs-fuse, which
lacks that: there the driver has a dataset mounted in its own directory, from which it is bound. What differs between
the two in other ways is found out by asking the programs.

The volumes are the datasets below one, ``BASE/layers…``, that stands for the driver's directory; BASE is the dataset
that the directory lies on. A size limit is the property ``refquota``, which counts what a dataset refers to: what it
has from its parent, which ``layerfs:base`` says in bytes, and the volume's own.

What a volume changed is known from change times, which nobody can set: an inode with the parent's number and change
time, and that from long enough before the parent was sealed, has not been written to.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from layerfs import mount_table, mounts
from layerfs.backing import Backing
from layerfs.backings import zfs_tools
from layerfs.backings.zfs_fuse import Daemon, unmount
from layerfs.backings.zfs_tools import Tools, ZfsRefused
from layerfs.backings.zpool import LOCK
from layerfs.changes import compare, compare_paths
from layerfs.driver import BackingNeed, Capability, Change, Mount, Probe, Problem, Usage
from layerfs.errors import Damaged, EnvironmentUnfit, FailedPrecondition, InvalidArgument, LayerfsError, refused
from layerfs.kernel.libc import check as checked
from layerfs.kernel.libc import libc
from layerfs.probing import nearest
from layerfs.snapshot import SnapshotDriver
from layerfs.volume_dirs import opened

_SEALED: Final = "layer"
_FORK: Final = "fork-"
_BASE: Final = "layerfs:base"
_TICK: Final = "layerfs:tick"

_OPTIONS = ("checksum", "compression", "copies", "dedup", "logbias", "primarycache", "recordsize", "sync")
"""Properties of datasets that can be set as options of the driver."""

_MOST_MOUNTED = 256  # zfs-fuse has a thread for each
_MOST_IN_USE = 980  # it takes 1000, and one that is refused stays busy as long as it lives; others mount meanwhile, too
_CLOCK_SLACK_NS: Final = 10 * 10**9  # how far the clock may have been set back between a parent and its child


class ZfsDriver(SnapshotDriver):
    """Datasets and clones of one pool."""

    name = "zfs"
    needs = BackingNeed(("zfs",), "layers are datasets")
    summary = "a layer is a dataset, a child a clone of its snapshot"

    def __init__(self, root: Path, options: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(root, options)
        if unknown := sorted(set(options) - set(_OPTIONS)):
            raise InvalidArgument(f"zfs has no option {', '.join(map(repr, unknown))}; there are {', '.join(_OPTIONS)}")
        point = _dataset_at(root)
        if point is None:
            raise EnvironmentUnfit(f"{str(root)!r} is on no ZFS dataset; make the store with a backing of kind zfs")
        self._in_user_space = point.type != "zfs"
        backing = Backing.around(root)
        home = backing.facts.get("zfs-fuse") if backing else None
        lock = backing.root / LOCK if backing and "pool" in backing.facts else root / ".zfs-commands"
        self._tools = Tools(Daemon(Path(home)) if home else None, lock)
        self._inside = Path(os.path.realpath(root)).relative_to(point.target)
        self._home = f"{point.source}/{_encoded(self._inside)}"
        self._tools.settled()

    @classmethod
    def probe(cls, root: Path) -> Probe:
        if os.geteuid() != 0:
            return Probe(False, "making and mounting datasets takes root", "run it as root")
        if (point := _dataset_at(nearest(root))) is not None:
            return Probe(True, f"datasets below {point.source!r}, {_implementation(point.type != 'zfs')}")
        try:
            zfs_tools.check_usable()
        except EnvironmentUnfit as error:
            reason, _, remedy = str(error).partition("; ")
            return Probe(False, reason, remedy)
        how = _implementation(zfs_tools.in_user_space())
        return Probe(True, f"a pool in a sparse file, which layerfs makes, {how}")

    @property
    def capabilities(self) -> Capability:
        common = Capability.SIZE_LIMIT | Capability.NATIVE_USAGE | Capability.BLOCK_COW
        return common if self._in_user_space else common | Capability.NATIVE_CHANGES

    @property
    def time_granularity(self) -> int:
        """See `Driver.time_granularity`: zfs-fuse passes on seconds alone."""
        return 10**9 if self._in_user_space else 1

    @property
    def most_mounted(self) -> int | None:
        return _MOST_IN_USE if self._in_user_space else None

    def create(self, volume: str, parents: Sequence[str], *, size: int | None = None) -> None:
        """See `Driver.create`. A size limit counts what the dataset refers to beyond what it began with."""
        base = 0
        if parents and size is not None:
            origin = self._snapshot(parents[0])
            found = self._tools.properties([origin], ("referenced",))
            if origin not in found:
                raise Damaged(f"making the volume {volume!r}: its parent has no snapshot {origin!r}")
            base = int(found[origin]["referenced"])
        settings = {"canmount": "noauto", _BASE: str(base)}
        if size is not None:
            settings["refquota"] = str(base + size)
        arguments = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
        place = self._dataset(volume)
        if parents:
            self._make(volume, "clone", *arguments, self._snapshot(parents[0]), place)
        else:
            self._make(volume, "create", *arguments, place)

    def fork(self, volume: str, source: str, parents: Sequence[str]) -> None:  # noqa: ARG002
        """See `Driver.fork`: a clone of a passing snapshot, which goes over to the clone when the source goes."""
        here, there = self._dataset(volume), self._dataset(source)
        snapshot = f"{there}@{_FORK}{volume}"
        try:
            if here not in self._tools.properties([here], ("type",)):
                self._write_out(source)
                try:
                    self._tried("snapshot", snapshot)
                except _Exists:  # from a call that was cut short, and older than the source
                    self._tools.patient("destroy", snapshot)
                    self._tools.zfs("snapshot", snapshot)
                settings = self._tools.properties([there], ("refquota", _BASE))[there]
                arguments = ["-o", "canmount=noauto"]
                for key, value in settings.items():
                    if value not in ("0", "none", "-"):
                        arguments += ["-o", f"{key}={value}"]
                self._make(volume, "clone", *arguments, snapshot, here)
            self._let_go(snapshot)
        except ZfsRefused as error:
            raise self._failed(f"copying the volume {source!r}", error) from error

    def seal(self, volume: str, parents: Sequence[str]) -> None:  # noqa: ARG002
        place = self._dataset(volume)
        try:
            self._write_out(volume)
            if not self._in_user_space:  # which lists no extended attributes of a dataset that is read-only
                self._tools.zfs("set", "readonly=on", place)
            with contextlib.suppress(_Exists):
                self._tried("snapshot", self._snapshot(volume))
        except ZfsRefused as error:
            raise self._failed(f"sealing the volume {volume!r}", error) from error

    def remove(self, volume: str) -> None:
        place = self._dataset(volume)
        self._tools.settled()
        self._hide(volume)
        try:
            origin, forks = self._relations(place)
            for clone in forks:
                self._tools.patient("promote", clone)
            self._tools.patient("destroy", "-r", place)
            if f"@{_FORK}" in origin:
                self._let_go(origin)
        except ZfsRefused as error:
            if not error.missing:
                raise self._failed(f"removing the volume {volume!r}", error) from error
        if self._in_user_space:
            with contextlib.suppress(OSError):  # zfs(8) has done it, or it is covered by something
                self.tree_path(volume).rmdir()

    def mounts(self, volume: str, parents: Sequence[str], *, read_only: bool = False) -> list[Mount]:
        """See `Driver.mounts`. With zfs-fuse the dataset is brought into sight in the driver's directory, if it is not.

        That happens when the volume is made, and once more after the backing was down.
        """
        if self._in_user_space:
            self._show(volume)
            return super().mounts(volume, parents, read_only=read_only)
        return [Mount("zfs", self._dataset(volume), ("ro" if read_only else "rw",))]

    def volumes(self) -> Iterator[str]:
        for name in self._names():
            yield name.rpartition("/")[2]

    def usage(self, volume: str, parents: Sequence[str]) -> Usage:  # noqa: ARG002
        """What the pool has for this dataset and no other; ZFS does not count inodes."""
        place = self._dataset(volume)
        wanted = ("used", "readonly")
        try:
            found = self._tools.properties([place], wanted)
            if place in found and found[place]["readonly"] == "off":
                self._write_out(volume)
                self._tools.zfs("set", f"{_TICK}={time.time_ns()}", self._home)  # waits for the transaction group
                found = self._tools.properties([place], wanted)
        except ZfsRefused as error:
            raise self._failed(f"measuring the volume {volume!r}", error) from error
        if place not in found:
            raise Damaged(f"measuring the volume {volume!r}: the dataset {place!r} is missing")
        return Usage(int(found[place]["used"]), -1)

    def resize(self, volume: str, size: int) -> None:
        place = self._dataset(volume)
        try:
            base = self._tools.properties([place], (_BASE,))[place][_BASE]
            self._tools.zfs("set", f"refquota={int(base if base.isdigit() else 0) + size}", place)
        except ZfsRefused as error:
            raise self._failed(f"limiting the size of the volume {volume!r}", error) from error

    def changes(self, volume: str, parents: Sequence[str], old: int | None, new: int) -> Iterator[Change]:
        known = None if old is None else self.unchanged(volume, parents)
        if old is not None and not self._in_user_space and (paths := self._written_to(volume, parents[0])) is not None:
            yield from compare_paths(old, new, paths, unchanged=known)
        else:
            yield from compare(old, new, unchanged=known, unchanged_attributes=not self._in_user_space)

    def unchanged(
        self,
        volume: str,  # noqa: ARG002
        parents: Sequence[str],
    ) -> Callable[[os.stat_result, os.stat_result], bool] | None:
        """See `SnapshotDriver.unchanged`. With zfs-fuse the times tell nothing of extended attributes."""
        origin = self._snapshot(parents[0])
        found = self._tools.properties([origin], ("creation",))
        if origin not in found:
            return None
        before = int(found[origin]["creation"]) * 10**9 - _CLOCK_SLACK_NS
        return lambda old, new: old.st_ino == new.st_ino and old.st_ctime_ns == new.st_ctime_ns < before

    def check(self, volume: str, parents: Sequence[str]) -> Iterator[Problem]:
        names = [self._dataset(volume)]
        if parents:
            names += [self._dataset(parents[0]), self._snapshot(parents[0])]
        found = self._tools.properties(names, ("type", "readonly"))
        for name in names:
            if name not in found:
                yield Problem(volume, f"the dataset {name!r} is missing")
        if parents and not self._in_user_space and found.get(names[1], {}).get("readonly") == "off":
            yield Problem(volume, f"its parent {parents[0]!r} is not read-only", repairable=True)

    def repair(self, volume: str, parents: Sequence[str]) -> None:  # noqa: ARG002
        for parent in parents[:1]:
            self._tools.zfs("set", "readonly=on", self._dataset(parent))

    def status(self) -> dict[str, str]:
        pool = self._home.partition("/")[0]
        size, free, health = self._tools.zpool("list", "-H", "-o", "size,free,health", pool).split()
        return {
            "file system": f"zfs ({_implementation(self._in_user_space)})",
            "pool": f"{pool}, {health.lower()}, {free} of {size} free",
            "times of files": "whole seconds" if self._in_user_space else "nanoseconds",
        }

    def tree_path(self, volume: str) -> Path:
        """Where zfs-fuse mounts the volume."""
        return self.root / volume

    # Datasets

    def _dataset(self, volume: str) -> str:
        return f"{self._home}/{volume}"

    def _snapshot(self, volume: str) -> str:
        return f"{self._dataset(volume)}@{_SEALED}"

    def _make(self, volume: str, *command: str) -> None:
        """Run a command that makes the volume's dataset, and first the one for all of them where that is missing."""
        if self._in_user_space:
            self._make_room(volume)
        try:
            try:
                self._tried(*command)
            except ZfsRefused as error:
                if not error.missing:
                    raise
                with contextlib.suppress(_Exists):
                    self._tried("create", *self._settings(), self._home)
                self._tried(*command)
        except _Exists:
            pass
        except ZfsRefused as error:
            raise self._failed(f"making the volume {volume!r}", error) from error
        if self._in_user_space:
            self._show(volume)
            os.listdir(self.tree_path(volume))  # its zfs(8) mounts clones whatever canmount says

    def _settings(self) -> Iterator[str]:
        """The properties that all volumes inherit."""
        place = f"/{self._inside}" if self._inside.parts else "/"
        settings = {"canmount": "off", "mountpoint": place if self._in_user_space else "legacy", "atime": "off"}
        if not self._in_user_space:
            settings |= {"xattr": "sa", "acltype": "posixacl", "dnodesize": "auto"}
        for key, value in (settings | self.options).items():
            yield from ("-o", f"{key}={value}")

    def _names(self) -> list[str]:
        try:
            text = self._tools.zfs("list", "-H", "-r", "-t", "filesystem", "-o", "name", self._home)
        except ZfsRefused as error:
            if error.missing:
                return []
            raise
        return [name for name in text.splitlines() if name != self._home]

    def _tried(self, *command: str) -> None:
        """Run zfs(8). Raises `_Exists` where what it is to make is there, `ZfsRefused` otherwise."""
        try:
            self._tools.zfs(*command)
        except ZfsRefused as error:
            if error.exists:
                raise _Exists from error
            if "successfully created" not in error.words:  # "…, but not mounted"
                raise

    def _relations(self, place: str) -> tuple[str, list[str]]:
        """The snapshot that a dataset is a clone of, and the clones of its own passing snapshots."""
        text = self._tools.zfs("list", "-H", "-r", "-t", "filesystem,snapshot", "-o", "name,origin", place)
        own = dict(line.split("\t") for line in text.splitlines())
        passing = {name for name in own if name.startswith(f"{place}@{_FORK}")}
        if not passing:
            return own[place], []
        text = self._tools.zfs("list", "-H", "-r", "-t", "filesystem", "-o", "name,origin", self._home)
        return own[place], [
            name for name, origin in (line.split("\t") for line in text.splitlines()) if origin in passing
        ]

    def _let_go(self, snapshot: str) -> None:
        """Have a passing snapshot deleted, as soon as no clone needs it any more."""
        try:
            self._tools.zfs("destroy", "-d", snapshot)
        except ZfsRefused as error:
            if not error.missing:
                raise

    def _failed(self, step: str, error: ZfsRefused) -> LayerfsError:
        """What to tell the user of a command's refusal."""
        if error.busy:
            return FailedPrecondition(f"{step}: it is in use ({error.words}); unmount it, and end what works in it")
        if error.missing:
            return Damaged(f"{step}: {error.words}; run `layerfs check`")
        return LayerfsError(f"{step}: {error.words}")

    def _written_to(self, volume: str, parent: str) -> set[bytes] | None:
        """Paths of all that zfs-diff(8) finds to differ from the parent; None where it cannot tell."""
        place = self._dataset(volume)
        with _mounted(self._dataset(parent)), _mounted(place) as top:  # it wants to see both
            try:
                text = self._tools.patient("diff", "-H", self._snapshot(parent), place)
            except ZfsRefused:
                return None
            prefix = os.fsencode(top)
        found = set()
        for line in text.encode(errors="surrogateescape").splitlines():
            for path in line.split(b"\t")[1:]:
                plain = re.sub(rb"\\0([0-7]{3})", lambda match: bytes([int(match[1], 8)]), path)
                if not plain.startswith(prefix):
                    return None
                found.add(plain[len(prefix) :].strip(b"/"))
        return found

    # Mounts of zfs-fuse

    def _show(self, volume: str) -> None:
        """Have the dataset mounted at `tree_path`."""
        place = self.tree_path(volume)
        if self._tools.daemon is not None:
            self._tools.daemon.inside()  # the kernel remembers much of what a dead daemon said
        if self._is_shown(volume):
            return
        self._make_room(volume)
        try:
            self._tools.patient("mount", self._dataset(volume))
        except ZfsRefused as error:
            if not self._is_shown(volume):  # as another process may have done
                raise self._failed(f"mounting the volume {volume!r}", error) from error
        os.listdir(place)  # zfs-fuse never gets over a mount that goes before anybody used it

    def _is_shown(self, volume: str) -> bool:
        try:
            return os.stat(self.tree_path(volume)).st_dev != os.stat(self.root).st_dev
        except FileNotFoundError:
            return False
        except OSError as error:
            raise refused(f"looking for the volume {volume!r}", error, "open the store again") from error

    def _hide(self, volume: str) -> None:
        """Unmount the dataset, or refuse with `FailedPrecondition`."""
        if not self._in_user_space:
            self._check_unmounted(volume)
            return
        if self._is_shown(volume):
            try:
                self._write_out(volume)
                for point in mount_table.at(self.root / volume)[-1:]:
                    unmount(point)
            except LayerfsError:
                if self._is_shown(volume):  # else another thread or process has done it
                    raise

    def _make_room(self, volume: str) -> None:
        """Before the volume is mounted, unmount what has been for longest, where there are many; what is in use stays.

        Raises `FailedPrecondition` where that leaves zfs-fuse near its end.
        """
        table = mount_table.read()
        top = Path(os.path.realpath(self.root))
        ours = [point for point in table if point.type == "fuse.zfs" and point.target.parent == top]
        if len(ours) <= _MOST_MOUNTED:
            return
        left, users = len(ours), Counter(point.device for point in table)
        for point in ours[: len(ours) - _MOST_MOUNTED * 3 // 4]:
            if users[point.device] == 1:
                with contextlib.suppress(LayerfsError):
                    self._hide(point.target.name)
                    left -= 1
        if left >= _MOST_IN_USE:
            raise FailedPrecondition(
                f"mounting the volume {volume!r}: {left} are mounted, and zfs-fuse takes few more; unmount some of them"
            )

    def _check_unmounted(self, volume: str) -> None:
        """zfs(8) would unmount it wherever it is, without a question."""
        place = self._dataset(volume)
        targets = [
            repr(str(point.target)) for point in mount_table.read() if point.source in (place, self._snapshot(volume))
        ]
        if targets:
            text = f"removing the volume {volume!r}: it is mounted at {', '.join(targets)}; unmount it first"
            raise FailedPrecondition(text)

    def _write_out(self, volume: str) -> None:
        """Bring what the kernel has of the volume to zfs-fuse."""
        if self._in_user_space and self._is_shown(volume):
            try:
                with opened(self.tree_path(volume)) as fd:
                    checked(libc.syncfs(fd))
            except OSError as error:
                raise refused(f"writing out the volume {volume!r}", error) from error


class _Exists(Exception):
    """What is to be made is there already."""


def _dataset_at(path: Path) -> mount_table.MountPoint | None:
    """The mount of a dataset that the existing ``path`` lies on; None where it lies on something else."""
    real = Path(os.path.realpath(path))
    found = max(
        (point for point in enumerate(mount_table.read()) if real.is_relative_to(point[1].target)),
        key=lambda point: (len(point[1].target.parts), point[0]),
    )[1]
    return found if found.type in zfs_tools.TYPES else None


@contextlib.contextmanager
def _mounted(dataset: str) -> Iterator[Path]:
    """Where a dataset is mounted; if nowhere, at a private place for as long as the context lasts."""
    for point in mount_table.read():
        if (point.type, point.source, point.root) == ("zfs", dataset, "/"):
            yield point.target
            return
    with tempfile.TemporaryDirectory(prefix="layerfs-") as place:
        target = Path(os.path.realpath(place))
        mounts.attach([Mount("zfs", dataset, ("ro",))], target)
        try:
            yield target
        finally:
            mounts.unmount(target, lazy=True)


def _encoded(inside: Path) -> str:
    """The name of the dataset that holds the volumes of the directory ``inside`` another's."""
    text = "".join(f"-{part}" for part in inside.parts)
    return "layers" + re.sub(rb"[^A-Za-z0-9.-]", lambda match: b":%02x" % match[0][0], os.fsencode(text)).decode()


def _implementation(in_user_space: bool) -> str:
    return "with zfs-fuse, in user space; times of files in whole seconds" if in_user_space else "with OpenZFS"
