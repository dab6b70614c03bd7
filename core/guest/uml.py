"""User-Mode Linux: a kernel that is an ordinary program. Boots in seconds, anywhere; one processor, slow system calls.

The host's file tree is its root through hostfs, disks are ubd devices, and the wires are its serial lines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from layerfs.errors import InvalidArgument
from layerfs.guest import xstate
from layerfs.guest.kind import Devices, Kind, Wires, boot_parameters, find_program
from layerfs.guest.request import Request
from layerfs.guest.sandbox import PRIVATE

_MODULES = Path("/usr/lib/uml/modules")
_MOST_DISKS = 16


class Uml(Kind):
    """A guest of Debian's package user-mode-linux, or of another such kernel."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        if request.cpus != 1:
            raise InvalidArgument("User-Mode Linux has one processor; take --cpus 1, or --kind qemu")
        if len(request.disks) >= _MOST_DISKS:
            raise InvalidArgument(f"User-Mode Linux has at most {_MOST_DISKS - 1} disks beside its own")
        if request.kernel and not os.access(request.kernel, os.X_OK):
            raise InvalidArgument(f"there is no program {request.kernel!r}; a kernel of User-Mode Linux is one")
        self._kernel = os.path.abspath(request.kernel or find_program("linux.uml", "user-mode-linux"))
        find_program("modprobe", "kmod")
        self._preloaded = xstate.library()

    @property
    def modules(self) -> Path | None:
        return _MODULES if _MODULES.is_dir() else None

    @property
    def devices(self) -> Devices:
        names = [f"/dev/ubd{letter}" for letter in "abcdefghijklmnop"]
        return Devices(
            "/dev/ttyS0", "/dev/ttyS1", "/dev/ttyS2", names[0], tuple(names[1 : 1 + len(self.request.disks)])
        )

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "TMPDIR": str(PRIVATE),  # its memory is a file there
            **({"LD_PRELOAD": str(self._preloaded)} if self._preloaded else {}),
        }

    def command(self, wires: Wires, disks: Sequence[int], private: Path) -> Sequence[str]:
        return [
            self._kernel,
            f"mem={self.request.memory >> 10}K",
            f"uml_dir={private}/",
            *(f"ubd{number}=/proc/self/fd/{disk}" for number, disk in enumerate(disks)),
            "con=null",
            "con0=null,fd:1",
            "ssl=null",
            f"ssl0=null,fd:{wires.output}",
            f"ssl1=null,fd:{wires.errors}",
            f"ssl2=fd:{wires.control}",
            "rootfstype=hostfs",
            "rootflags=/",
            "rw",
            *boot_parameters(),
        ]
