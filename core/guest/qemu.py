"""QEMU through virtme-ng: a distribution's kernel on emulated hardware, at full speed where there is KVM.

virtme-ng makes the initial file system that brings up the host's file tree over 9p, and the command line of the
machine; disks are virtio block devices, and the wires are virtio serial ports.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from layerfs.driver import Mount
from layerfs.errors import EnvironmentUnfit, InvalidArgument
from layerfs.guest import system
from layerfs.guest.kind import Devices, Kind, Wires, boot_parameters, find_program, processor_flags
from layerfs.guest.request import Request
from layerfs.guest.sandbox import PRIVATE

_LARGEST_MESSAGE = 512000  # bytes; what the kernel's transport can carry
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Qemu(Kind):
    """A guest of Debian's kernel with OpenZFS, or of a kernel image that the request names."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        if len(request.disks) >= len(_LETTERS):
            raise InvalidArgument(f"a QEMU guest has at most {len(_LETTERS) - 1} disks beside its own")
        find_program("qemu-system-x86_64", "qemu-system-x86")
        find_program("modprobe", "kmod")
        find_program("file", "file")  # virtme-ng reads the kernel's version with it
        if importlib.util.find_spec("virtme") is None:
            raise EnvironmentUnfit("a QEMU guest needs virtme-ng; install it with: pip install 'layerfs[guest]'")
        self._system = system.chosen(request.kernel) if request.kernel else system.prepared(request.progress)

    @property
    def modules(self) -> Path | None:
        return self._system.modules

    @property
    def devices(self) -> Devices:
        names = [f"/dev/vd{letter}" for letter in _LETTERS[: 1 + len(self.request.disks)]]
        return Devices("layerfs.output", "layerfs.errors", "layerfs.control", names[0], tuple(names[1:]))

    @property
    def drivers(self) -> Sequence[str]:
        return ("virtio_blk", "virtio_console")

    @property
    def roots(self) -> Sequence[Mount]:
        # Nobody changes what is read through these, so the guest may keep all of it in its cache. That they are other
        # mounts than the first root's is also what lets one of them lie within the other.
        options = ("trans=virtio", "version=9p2000.L", "access=any", f"msize={_LARGEST_MESSAGE}", "cache=loose")
        return [Mount("9p", tag, options) for tag, _ in self._exports]

    @property
    def _exports(self) -> Sequence[tuple[str, Path]]:
        tree = [("layerfs.tree", self._system.tree)] if self._system.tree else []
        return [*tree, ("layerfs.host", Path("/"))]

    @property
    def environment(self) -> Mapping[str, str]:
        return {"TMPDIR": str(PRIVATE)}

    def command(self, wires: Wires, disks: Sequence[int], private: Path) -> Sequence[str]:  # noqa: ARG002
        machine = ["-no-reboot", "-device", "virtio-serial-pci,id=wires"]
        for name, channel in (
            ("output", f"file,path=/proc/self/fd/{wires.output}"),
            ("errors", f"file,path=/proc/self/fd/{wires.errors}"),
            ("control", f"socket,fd={wires.control}"),
        ):
            machine += ["-chardev", f"{channel},id={name}"]
            machine += ["-device", f"virtserialport,bus=wires.0,chardev={name},name=layerfs.{name}"]
        for number, (tag, path) in enumerate(self._exports):
            options = "security_model=none,readonly=on,multidevs=remap"
            machine += ["-fsdev", f"local,id=root{number},path={str(path).replace(',', ',,')},{options}"]
            machine += ["-device", f"virtio-9p-pci,fsdev=root{number},mount_tag={tag}"]
        for number, disk in enumerate(disks):
            machine += ["-drive", f"if=none,id=disk{number},file=/proc/self/fd/{disk},format=raw,discard=unmap"]
            machine += ["-device", f"virtio-blk-pci,drive=disk{number}"]
        # virtme-ng's own init is passed over: the last -append is the one that counts.
        boot = ["console=ttyS0", "panic=-1", "loglevel=4", "mitigations=off", *boot_parameters()]
        return [
            sys.executable,
            "-m",
            "virtme.commands.run",
            f"--kimg={self._system.kernel}",
            "--mods=auto",
            "--force-9p",
            "--rw",  # what of it can be written the sandbox says
            *([] if _has_kvm() else ["--disable-kvm"]),
            "--disable-monitor",
            f"--busybox={self._system.busybox}",
            f"--memory={self.request.memory >> 20}M",
            f"--cpus={self.request.cpus}",
            "--qemu-opts",
            *machine,
            "-append",
            " ".join(boot),
        ]


def _has_kvm() -> bool:
    """Whether KVM runs any kernel here; there is a kind of it that has the device, but needs kernels made for it."""
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and bool({"vmx", "svm"} & processor_flags())
