"""What a kind of guest is to the rest: programs that must be there, and a command line that boots its kernel."""

from __future__ import annotations

import os
import re
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerfs.driver import Mount
from layerfs.errors import EnvironmentUnfit
from layerfs.guest.request import Request


@dataclass(frozen=True)
class Wires:
    """The launcher's pipes to a guest, as descriptors of the process that runs its kernel.

    Attributes:
        output, errors: where the command's standard output and standard error go.
        control: a socket: the guest says how the command ended, and is told of signals for it.
    """

    output: int
    errors: int
    control: int


@dataclass(frozen=True)
class Devices:
    """How the guest names what it was given.

    Attributes:
        output, errors, control: the other ends of the wires: device nodes, or names of virtio ports.
        scratch: the disk with the file system for what it writes.
        disks: the further disks.
    """

    output: str
    errors: str
    control: str
    scratch: str
    disks: tuple[str, ...]


class Kind(ABC):
    """One kind of guest, for one request.

    Making one checks the host and prepares what is missing. Raises `EnvironmentUnfit` and `InvalidArgument`.
    """

    def __init__(self, request: Request) -> None:
        self.request = request

    @property
    @abstractmethod
    def modules(self) -> Path | None:
        """The directory that holds the kernel's modules by release, as ``/lib/modules`` does; None for none."""

    @property
    @abstractmethod
    def devices(self) -> Devices:
        """The names inside."""

    @abstractmethod
    def command(self, wires: Wires, disks: Sequence[int], private: Path) -> Sequence[str]:
        """The program that is the guest's kernel, to be run in the sandbox.

        Args:
            wires: descriptors that it inherits, as it does those of the ``disks``: the scratch disk, then the others.
            private: an empty directory in memory that only it sees.
        """

    @property
    def environment(self) -> Mapping[str, str]:
        """What the program needs in its environment, over the host's."""
        return {}

    @property
    def drivers(self) -> Sequence[str]:
        """Kernel modules for the devices, which nobody loads where there is no udev."""
        return ()

    @property
    def roots(self) -> Sequence[Mount]:
        """What the guest's root shows, the first on top; none for the tree that its kernel starts with."""
        return ()


def boot_parameters() -> list[str]:
    """The end of the kernel's command line: this interpreter with `layerfs.guest.inside` as init."""
    path = os.environ.get("PYTHONPATH")
    return [
        *([f"PYTHONPATH={path}"] if path else []),
        f"init={sys.executable}",
        "--",
        "-P",
        "-m",
        "layerfs.guest.inside",
    ]


def processor_flags() -> frozenset[str]:
    """What the first processor can do, by the kernel's names for it (/proc/cpuinfo)."""
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return frozenset(found[1].split() if found else ())


def find_program(name: str, package: str) -> str:
    """The path of a program. Raises `EnvironmentUnfit` naming the package that has it."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        raise EnvironmentUnfit(f"a guest needs the program {name}, which was not found; install the package {package}")
    return found
