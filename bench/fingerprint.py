"""What a run was measured on: host, kernel, memory, storage, versions."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

import layerfs
import layerfs.guest
from layerfs import mount_table
from layerfs.bench import fio, memory

_DEPENDENCIES = ("layerfs", "zstandard", "isal")
_WRITE_BACK = (
    "dirty_background_bytes",
    "dirty_background_ratio",
    "dirty_bytes",
    "dirty_expire_centisecs",
    "dirty_ratio",
    "dirty_writeback_centisecs",
    "swappiness",
    "vfs_cache_pressure",
)


def take(place: Path, targets: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """Facts of this host that a figure depends on.

    Args:
        place: where the scratch stores lie.
        targets: each target's own facts, by its name.
    """
    return {
        "machine": machine(place),
        "kernel": f"{platform.system()} {platform.release()} {platform.version()}",
        "guest": _guest(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": {"total": _memory("MemTotal"), "available": _memory("MemAvailable"), "limit": memory.limit_now()},
        "vm": {name: _read(Path("/proc/sys/vm", name)) for name in _WRITE_BACK},
        "transparent_hugepage": _chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "load": os.getloadavg()[0],
        "user": _user(),
        "storage": storage(place),
        "versions": {**{name: _version(name) for name in _DEPENDENCIES}, "fio": fio.version()},
        "targets": dict(targets),
    }


def _guest() -> dict[str, str] | None:
    """The kind of guest whose kernel this is, and its host; None on a host."""
    guest = layerfs.guest.here()
    return {"kind": guest.kind, "host": guest.host} if guest else None


def machine(place: Path) -> dict[str, object]:
    """What two runs must have in common if their figures are to be compared."""
    disk = storage(place)
    return {
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": f"{_memory('MemTotal') / (1 << 30):.0f} GiB",
        "memory limit": memory.limit_now(),
        "kernel": platform.release(),
        "file system": disk.get("filesystem"),
        "disk": disk.get("model") or disk.get("disk"),
    }


def circumstances(place: Path) -> dict[str, object]:
    """What one run must have in common with itself when it was stopped and goes on."""
    commit = commit_info()
    version = f"{commit['id']}{' with changes' if commit['dirty'] else ''}"
    return {**machine(place), "user": _user(), "version of layerfs": version}


def storage(place: Path) -> dict[str, object]:
    """The file system that ``place`` lies on and, as far as sysfs knows it, the disk below that."""
    place = place.resolve()
    over = [mount for mount in mount_table.read() if place.is_relative_to(mount.target)]
    if not over:
        return {}
    deepest = max(len(mount.target.parts) for mount in over)
    mount = [m for m in over if len(m.target.parts) == deepest][-1]
    use = shutil.disk_usage(place)
    return {
        "filesystem": mount.type,
        "options": ",".join((*mount.options, *mount.super_options)),
        "size": use.total,
        "free": use.free,
        **_journal(_device(mount)),
        **_disk(_device(mount)),
    }


def machine_info() -> dict[str, object]:
    """The machine in the form of pytest-benchmark's ``machine_info``."""
    return {
        "node": platform.node(),
        "processor": platform.processor(),
        "machine": platform.machine(),
        "python_compiler": platform.python_compiler(),
        "python_implementation": platform.python_implementation(),
        "python_implementation_version": platform.python_version(),
        "python_version": platform.python_version(),
        "python_build": list(platform.python_build()),
        "release": platform.release(),
        "system": platform.system(),
        "cpu": {"arch": platform.machine(), "count": os.cpu_count(), "brand_raw": _processor()},
    }


def commit_info() -> dict[str, object]:
    """The version of layerfs's own source in the form of pytest-benchmark's ``commit_info``.

    An installed package has no history: its version number stands for it.
    """
    info: dict[str, object] = {
        "id": f"unversioned-{_version('layerfs')}",
        "time": None,
        "author_time": None,
        "dirty": False,
        "project": "layerfs",
        "branch": "(unknown)",
    }
    here = Path(layerfs.__file__).resolve().parent
    top = _git(here, "rev-parse", "--show-toplevel")
    # A virtual environment may lie in someone else's repository.
    if top and (Path(top) / "core" / Path(layerfs.__file__).name).exists():
        info["id"], info["time"], info["author_time"] = _git(here, "show", "-s", "--format=%H %cI %aI").split()
        info["dirty"] = bool(_git(here, "status", "--porcelain", "--untracked-files=no"))
        info["branch"] = _git(here, "rev-parse", "--abbrev-ref", "HEAD")
    return info


def _device(mount: mount_table.MountPoint) -> str:
    """``major:minor`` of the disk; btrfs has a number of its own in the mount table."""
    try:
        info = os.stat(mount.source)
    except OSError:
        return mount.device
    return f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}" if stat.S_ISBLK(info.st_mode) else mount.device


def _journal(device: str) -> dict[str, object]:
    """Of an ext4, whether it has one (Linux, Documentation/ABI/testing/sysfs-fs-ext4)."""
    task = _read(Path("/sys/fs/ext4", Path("/sys/dev/block", device).resolve().name, "journal_task"))
    return {"journal": task != "<none>"} if task else {}


def _disk(device: str) -> dict[str, object]:
    """Of a partition, its whole disk has the queue."""
    block = Path("/sys/dev/block", device)
    queue = next((q for q in (block / "queue", block.resolve().parent / "queue") if q.is_dir()), None)
    if queue is None:
        return {}
    return {
        "disk": queue.parent.resolve().name,
        "model": _read(queue.parent / "device" / "model"),
        "rotational": _read(queue / "rotational") == "1",
        "scheduler": _chosen(queue / "scheduler"),
        "read_ahead_kb": _read(queue / "read_ahead_kb"),
        "write_cache": _read(queue / "write_cache"),
    }


def _memory(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _user() -> str:
    return "root" if _is_host_root() else "not root of the host"


def _is_host_root() -> bool:
    """Root of a user namespace is not; see user_namespaces(7) for the map's form."""
    return os.geteuid() == 0 and _read(Path("/proc/self/uid_map")).split() == ["0", "0", "4294967295"]


@functools.cache
def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1] if found else platform.processor()


def _chosen(file: Path) -> str:
    """The value in brackets of a sysfs file that lists its choices."""
    text = _read(file)
    found = re.search(r"\[(.+?)\]", text)
    return found[1] if found else text


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _git(directory: Path, *arguments: str) -> str:
    if not shutil.which("git"):
        return ""
    done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
