"""The file systems that a backing can be made of: how each is made, recognised, mounted and grown."""

from __future__ import annotations

import errno
import subprocess
from dataclasses import dataclass
from pathlib import Path

from layerfs import mounts
from layerfs.driver import Mount
from layerfs.errors import KernelRefused
from layerfs.programs import tool

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Kind:
    """How one file system is made, mounted and grown.

    Attributes:
        type: its name for mount(2).
        mkfs: the command without the device; ``{uuid}`` stands for the new file system's UUID.
        features: further arguments of it, the first that this kernel can mount wins.
        options: mount options, the first that the kernel takes win.
        grow: the command that grows it while mounted; ``{device}`` and ``{path}`` are filled in.
        grow_down: those that grow it while it is not mounted, where there are such.
    """

    type: str
    package: str
    smallest: int
    mkfs: tuple[str, ...]
    options: tuple[tuple[str, ...], ...]
    features: tuple[tuple[str, ...], ...] = ((),)
    grow: tuple[str, ...] = ()
    grow_down: tuple[tuple[str, ...], ...] = ()


def _xfs(sharing: str) -> Kind:
    return Kind(
        type="xfs",
        package="xfsprogs",
        smallest=320 * _MIB,
        mkfs=("mkfs.xfs", "-q", "-f", "-L", "layerfs", "-s", "size=4096", "-m", f"{sharing},uuid={{uuid}}"),
        options=(("discard", "prjquota"), ("discard",)),
        grow=("xfs_growfs", "{path}"),
    )


KINDS = {
    "btrfs": Kind(
        type="btrfs",
        package="btrfs-progs",
        smallest=128 * _MIB,
        mkfs=("mkfs.btrfs", "-q", "-f", "-L", "layerfs", "-U", "{uuid}"),
        options=(("discard=async",), ()),
    ),
    "ext4": Kind(
        type="ext4",
        package="e2fsprogs",
        smallest=16 * _MIB,
        mkfs=("mkfs.ext4", "-q", "-F", "-L", "layerfs", "-U", "{uuid}"),
        features=(
            ("-E", "lazy_itable_init=0,lazy_journal_init=0,quotatype=prjquota", "-O", "quota,project"),
            ("-E", "lazy_itable_init=0,lazy_journal_init=0"),  # for kernels without CONFIG_QFMT_V2
        ),
        options=(("discard", "prjquota"), ("discard",)),
        grow=("resize2fs", "{device}"),  # the kernel wants CAP_SYS_RESOURCE for this one
        grow_down=(("e2fsck", "-f", "-p", "{device}"), ("resize2fs", "{device}")),
    ),
    "xfs": _xfs("reflink=1"),
    "xfs-noreflink": _xfs("reflink=0"),
}


def mount(filesystem: str, device: str, path: Path) -> None:
    """Mount a device with the best options that the kernel takes. Raises what `mounts.attach` raises."""
    kind = KINDS[filesystem]
    for options in kind.options:
        try:
            mounts.attach([Mount(kind.type, device, ("rw", *options))], path)
        except KernelRefused as error:
            if error.errno != errno.EINVAL or options == kind.options[-1]:
                raise
        else:
            return


def signature(device: str) -> dict[str, str]:
    """What blkid(8) finds on a device: TYPE, UUID, PTTYPE …; empty where it finds nothing."""
    command = [tool("blkid", "util-linux"), "--probe", "--output", "export", device]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if result.returncode == 8:  # signatures of several kinds at once
        return {"TYPE": "several signatures"}
    lines = result.stdout.decode(errors="replace").splitlines()
    pairs = (line.partition("=") for line in lines)
    return {key: value for key, _, value in pairs if key != "DEVNAME" and value}
