"""The driver aufs: union mounts of many branches in aufs' on-disk format.

Where the kernel itself has aufs (an out-of-tree patch), it mounts; everywhere else the program ``layerfs-aufs`` serves
the same format over FUSE. Deletions are marked as in OCI layers: ``.wh.NAME`` and ``.wh..wh..opq``.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from layerfs import mounts
from layerfs.driver import Capability, Mount, Probe, Whiteouts
from layerfs.drivers.aufs import dialect
from layerfs.drivers.aufs.options import escaped
from layerfs.errors import InvalidArgument, LayerfsError
from layerfs.probing import nearest
from layerfs.union import UnionDriver

PROGRAM = "layerfs-aufs"
_TYPE = f"fuse3.{PROGRAM}"
_PAGE = 4096


class AufsDriver(UnionDriver):
    """Unions served over FUSE, or by a kernel that has aufs; on any file system, with and without root."""

    name = "aufs"
    summary = "a layer is a directory with .wh. whiteouts, a child a union mount of many branches (FUSE)"
    limits_size = False

    def __init__(self, root: Path, options: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(root, options)
        if options:
            raise InvalidArgument(f"aufs has no options, and so no {', '.join(map(repr, sorted(options)))}")
        self._in_kernel = kernel_has_aufs()

    @classmethod
    def probe(cls, root: Path) -> Probe:
        if kernel_has_aufs():
            return Probe(True, "the kernel's own aufs")
        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            if os.path.exists("/dev/fuse"):
                return Probe(False, "/dev/fuse may not be used", "chmod a+rw /dev/fuse")
            return Probe(False, "there is no /dev/fuse", "load the module: modprobe fuse")
        if _program() is None:
            return Probe(
                False, f"the program {PROGRAM} is not in PATH", "install layerfs with pip, or add its bin to PATH"
            )
        if os.geteuid() != 0 and shutil.which("fusermount3") is None:
            return Probe(
                False, "fusermount3 is not installed, and without it only root mounts", "apt-get install fuse3"
            )
        place = nearest(root)
        try:
            with tempfile.TemporaryDirectory(prefix=".layerfs-probe-", dir=place) as scratch:
                return _tried(Path(scratch))
        except OSError as error:
            return Probe(False, f"{str(place)!r} cannot be written to: {error.strerror}", "choose another --root")

    @property
    def capabilities(self) -> Capability:
        return super().capabilities | Capability.ROOTLESS

    @property
    def whiteouts(self) -> Whiteouts:
        return dialect.AufsWhiteouts()

    def hidden_by(self, dir_fd: int, name: bytes, info: os.stat_result) -> bytes | None:  # noqa: ARG002
        hidden = dialect.hidden_by(name)
        return hidden if hidden is None or stat.S_ISREG(info.st_mode) else b""

    def is_opaque(self, dir_fd: int) -> bool:
        try:
            os.stat(dialect.OPAQUE, dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def union(self, volume: str, lowers: Sequence[Path], *, read_only: bool) -> list[Mount]:
        upper, access = self.upper_path(volume), "ro" if read_only else "rw"
        if self._in_kernel:
            branches = [f"{upper}={'ro+wh' if read_only else 'rw'}", *(f"{lower}=ro+wh" for lower in lowers)]
            options = (access, f"br={':'.join(branches)}", "udba=none")
            if sum(map(len, options)) < _PAGE:  # which is all that mount(2) takes
                return [Mount("aufs", "none", options)]
        if read_only:
            layers = ["lowerdir=" + _joined((upper, *lowers))]
        else:
            layers = [
                f"lowerdir={_joined(lowers)}",
                f"upperdir={escaped(str(upper))}",
                f"workdir={escaped(str(self.work_path(volume)))}",
            ]
        return [Mount(_TYPE, PROGRAM, (access, *layers))]

    def status(self) -> dict[str, str]:
        return {"mechanism": "the kernel's aufs" if self._in_kernel else f"FUSE, by {_program() or PROGRAM}"}


def kernel_has_aufs() -> bool:
    """Whether this kernel mounts aufs by itself."""
    lines = Path("/proc/filesystems").read_text().splitlines()
    return any(line.split("\t")[-1] == "aufs" for line in lines)


def _program() -> str | None:
    """Where the program is: in PATH, or beside this interpreter."""
    return shutil.which(PROGRAM, path=os.pathsep.join([os.path.dirname(sys.executable), *os.get_exec_path()]))


def _joined(paths: Sequence[Path]) -> str:
    return ":".join(escaped(str(path)) for path in paths)


def _tried(scratch: Path) -> Probe:
    """Mount a small union in the empty directory ``scratch`` and delete in it."""
    driver = AufsDriver(scratch)
    driver.create("lower", ())
    (driver.upper_path("lower") / "file").touch()
    driver.create("upper", ["lower"])
    try:
        with mounts.opened(driver.mounts("upper", ["lower"])) as tree:
            os.unlink("file", dir_fd=tree)
    except (OSError, LayerfsError) as error:
        return Probe(
            False, f"a union mounted over FUSE fails: {error}", "allow FUSE mounts here, or use another driver"
        )
    return Probe(True, f"FUSE, by {_program()}; this kernel has no aufs of its own")
