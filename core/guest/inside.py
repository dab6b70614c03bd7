"""The guest's init: makes the host's file tree a place to work in, runs the command and tells how it ended.

What the command sees at ``/`` is the host's tree with a disk of the guest's own over it: all can be written, and only
what goes to the directories that the job names as writable reaches the host.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback
import tty
from pathlib import Path
from typing import Any

from layerfs.guest.sandbox import JOB
from layerfs.kernel.libc import check, libc
from layerfs.kernel.mountapi import MNT_DETACH, MS_BIND, MS_RDONLY, mount, umount

_POWER_OFF = 0x4321FEDC
_OLD = Path("/mnt")  # where the tree without the disk over it is, while the new one is furnished
_OWN = ("/var/tmp", "/var/lib/layerfs")  # noqa: S108 - plain directories of the scratch disk
_GATHER = 0.01  # seconds between two passings on; a switch of threads costs much in User-Mode Linux
_PIPE = 1 << 20
_CANNOT_RUN, _NO_SUCH = 126, 127  # as shells say it


def main() -> None:
    """Run the job as process 1, and switch the guest off."""
    try:
        job = json.loads(JOB.read_text())
        _furnish(job)
        _run(job)
    except BaseException:  # the launcher shows what the console said last
        traceback.print_exc()
    sys.stderr.flush()
    os.sync()
    libc.reboot(_POWER_OFF)


def _furnish(job: dict[str, Any]) -> None:
    """Make the new root, put the scratch disk over it, and mount what a running system has."""
    # Opened before anything covers them.
    shown = sorted(job["writable"] + [p for p in job["kept"] if _is_covered(p)])
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in shown}
    mount("tmpfs", "/tmp", "tmpfs")  # noqa: S108 - we are alone
    with contextlib.suppress(OSError):  # the kernel may have mounted it by itself
        mount("devtmpfs", "/dev", "devtmpfs")
    os.makedirs("/tmp/m/lib")  # noqa: S108
    if job["modules"]:
        os.symlink(job["modules"], "/tmp/m/lib/modules")  # noqa: S108
        command = ["modprobe", "--dirname", "/tmp/m", "--all", "overlay", "ext4", *job["drivers"]]  # noqa: S108
        subprocess.run(command, env={"PATH": f"{os.defpath}:/usr/sbin:/sbin"}, check=False)
    os.makedirs("/tmp/scratch")  # noqa: S108
    os.makedirs("/tmp/root")  # noqa: S108
    mount(job["devices"]["scratch"], "/tmp/scratch", "ext4")  # noqa: S108
    for name in ("upper", "work", *(own.strip("/").replace("/", "-") for own in _OWN)):
        os.mkdir(f"/tmp/scratch/{name}")  # noqa: S108
    lowers = []
    for number, root in enumerate(job["roots"]):
        os.mkdir(place := f"/tmp/lower{number}")  # noqa: S108
        mount(root["source"], place, root["type"], MS_RDONLY, ",".join(root["options"]).encode())
        lowers.append(place)
    options = f"lowerdir={':'.join(lowers) or '/'},upperdir=/tmp/scratch/upper,workdir=/tmp/scratch/work"
    mount("overlay", "/tmp/root", "overlay", 0, options.encode())  # noqa: S108
    os.chdir("/tmp/root")  # noqa: S108
    os.makedirs(f"/tmp/root{_OLD}", exist_ok=True)  # noqa: S108
    check(libc.pivot_root(b".", os.fsencode(str(_OLD)[1:])))
    os.chdir("/")
    _mount_system(job)
    for own in _OWN:
        os.makedirs(own, exist_ok=True)
        mount(f"{_OLD}/tmp/scratch/{own.strip('/').replace('/', '-')}", own, "", MS_BIND)
        os.chmod(own, 0o1777 if own.endswith("tmp") else 0o700)
    for path, source in sources.items():
        os.makedirs(path, exist_ok=True)
        mount(f"/proc/self/fd/{source}", path, "", MS_BIND)
        os.close(source)
    umount(str(_OLD), MNT_DETACH)


def _is_covered(path: str) -> bool:
    return any(Path(path).is_relative_to(place) for place in (*_OWN, "/run", "/dev"))


def _mount_system(job: dict[str, Any]) -> None:
    for kind, place in (
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("devpts", "/dev/pts"),
        ("tmpfs", "/dev/shm"),
        ("mqueue", "/dev/mqueue"),
        ("cgroup2", "/sys/fs/cgroup"),
    ):
        with contextlib.suppress(OSError):
            os.makedirs(place, exist_ok=True)
            mount(kind, place, kind, 0, b"mode=755" if place == "/run" else b"")
    for place, mode in (("/run/lock", 0o1777), ("/dev/shm", 0o1777)):  # noqa: S108
        os.makedirs(place, exist_ok=True)
        os.chmod(place, mode)
    for link, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        with contextlib.suppress(FileExistsError):
            os.symlink(f"/proc/self/{target}", f"/dev/{link}")
    with contextlib.suppress(FileExistsError):
        os.symlink("pts/ptmx", "/dev/ptmx")
    if job["modules"]:
        os.makedirs("/lib/modules", exist_ok=True)
        mount(f"{_OLD}{job['modules']}", "/lib/modules", "", MS_BIND)
        _make_nodes(Path("/lib/modules", os.uname().release, "modules.devname"))
    socket.sethostname(job["name"])
    _raise_loopback()


def _make_nodes(table: Path) -> None:
    """The device nodes that load their modules when they are opened, which udev or kmod makes elsewhere."""
    lines = table.read_text().splitlines() if table.exists() else []
    for line in lines:
        if line.startswith("#"):
            continue
        _, name, (kind, *numbers) = line.split()
        major, minor = "".join(numbers).split(":")
        node = Path("/dev", name)
        node.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mknod(node, 0o600 | (0o020000 if kind == "c" else 0o060000), os.makedev(int(major), int(minor)))
            os.chmod(node, 0o666 if name == "fuse" else 0o600)


def _raise_loopback() -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS: up, running


def _run(job: dict[str, Any]) -> None:
    """Run the command, with its output on the wires, and report the exit code."""
    control = _wire(job["devices"]["control"])
    pumps = []
    ends = []
    for name in ("output", "errors"):
        wire = _wire(job["devices"][name])
        ours, theirs = pty.openpty() if job["terminal"][name] else _wide_pipe()
        if job["terminal"][name]:
            columns, lines = job["window"]
            termios.tcsetwinsize(theirs, (lines, columns))
        ends.append(theirs)
        pumps.append(threading.Thread(target=_pump, args=(ours, wire)))
        pumps[-1].start()
    code = _status(job, ends, control)
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # whatever the command left running holds the pipes open
    for pump in pumps:
        pump.join()
    os.sync()
    _write(control, f"exit {code}\n".encode())
    if os.isatty(control):
        termios.tcdrain(control)


def _status(job: dict[str, Any], ends: list[int], control: int) -> int:
    """Start the command, and wait for it and for every orphan."""
    environment = job["environment"]
    program = shutil.which(job["command"][0], path=environment.get("PATH", os.defpath))
    try:
        if program is None:
            raise FileNotFoundError(2, os.strerror(2))
        child = subprocess.Popen(
            job["command"],
            executable=program,
            cwd=job["directory"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=ends[0],
            stderr=ends[1],
            start_new_session=True,
        )
    except OSError as error:
        os.write(ends[1], f"layerfs: running {job['command'][0]!r}: {error.strerror}\n".encode())
        return _NO_SUCH if isinstance(error, FileNotFoundError) else _CANNOT_RUN
    finally:
        for end in ends:
            os.close(end)
    threading.Thread(target=_obey, args=(control, child.pid), daemon=True).start()
    while True:
        process, status = os.wait()
        if process == child.pid:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code


def _obey(control: int, child: int) -> None:
    """Pass on the signals that the launcher sends, one number a line."""
    with open(control, closefd=False) as orders:
        for line in orders:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.killpg(child, int(line))


def _wire(device: str) -> int:
    """Open the end of a wire. A serial line is made to carry bytes as they are."""
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == device:
            device = f"/dev/{name.parent.name}"
    descriptor = os.open(device, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    if os.isatty(descriptor):
        tty.setraw(descriptor)
    return descriptor


def _wide_pipe() -> tuple[int, int]:
    ends = os.pipe()
    fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, _PIPE)
    return ends


def _pump(source: int, wire: int) -> None:
    with contextlib.suppress(OSError):  # EIO: the last user of a terminal has gone
        while data := os.read(source, _PIPE):
            _write(wire, data)
            time.sleep(_GATHER)
    if os.isatty(wire):
        termios.tcdrain(wire)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    main()
