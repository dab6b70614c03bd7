"""Whether this host, as it is now, is a place to measure on; said in the run file, a sentence for each doubt."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import layerfs.guest
from layerfs.bench import fingerprint

_FULL = 0.9
_WAITING = 10.0  # per cent of the last ten seconds
_STOLEN = 0.02


class Watch:
    """Looks at the host before the first sample and after the last one.

    Args:
        place: where the scratch stores lie.
        direct: whether they lie on its file system, not on one of their own.
    """

    def __init__(self, place: Path, *, direct: bool) -> None:
        self._place = place
        self._before = _Counts()
        self._notes = [*_elsewhere(), *_busy(), *_storage(place), *_slowed(), *(_unjournalled(place) if direct else ())]

    def notes(self) -> list[str]:
        """Everything doubtful, from the beginning to now."""
        return [*self._notes, *self._before.changed(_Counts()), *self._filled()]

    def _filled(self) -> list[str]:
        already = any("nearly full" in note for note in self._notes)
        return [] if already else [note for note in _storage(self._place) if "nearly full" in note]


class _Counts:
    """What the kernel counts up: throttling by heat or quota, and time taken by the hypervisor."""

    def __init__(self) -> None:
        thermal = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
        self.heat = sum(int(file.read_text()) for file in thermal)
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        self.stolen, self.ticks = ticks[7] if len(ticks) > 7 else 0, sum(ticks)
        self.quota = _throttled()
        self.swapped = _field("/proc/vmstat", "pswpout")

    def changed(self, later: _Counts) -> list[str]:
        notes = []
        if later.heat > self.heat:
            notes.append("the processor was slowed down because it was too hot")
        if later.quota > self.quota:
            notes.append("this process's control group used up its share of processor time and was held back")
        if later.swapped > self.swapped:
            notes.append("memory was written to swap meanwhile")
        part = (later.stolen - self.stolen) / max(1, later.ticks - self.ticks)
        if part > _STOLEN:
            notes.append(f"the hypervisor gave {part:.0%} of the processors' time to other guests")
        return notes


def _elsewhere() -> list[str]:
    guest = layerfs.guest.here()
    return [f"measured in a guest ({guest.kind}): compare only with figures of such a guest"] if guest else []


def _busy() -> list[str]:
    load, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cpus / 2:
        return [f"other work was running (a load of {load:.1f} on {cpus} processors), which blurs every figure"]
    found = re.search(r"some avg10=([\d.]+)", _text("/proc/pressure/io"))
    if found and float(found[1]) > _WAITING:
        return [f"other work was waiting for the disk {float(found[1]):.0f} % of the time, which blurs every figure"]
    return []


def _storage(place: Path) -> list[str]:
    notes = []
    if fingerprint.storage(place).get("filesystem") in ("tmpfs", "ramfs"):
        notes.append(
            f"{str(place)!r} lies in memory: no figure here says anything of a disk; --scratch chooses another"
        )
    use = shutil.disk_usage(place)
    if use.free < use.total * (1 - _FULL):
        notes.append(f"the disk of {str(place)!r} is nearly full, which makes file systems slow")
    return notes


def _unjournalled(place: Path) -> list[str]:
    # find_inode_bit() in the kernel's fs/ext4/ialloc.c passes over inodes that were freed in the last minutes.
    if fingerprint.storage(place).get("journal") is not False:
        return []
    slow = "makes files many times slower for some minutes after others were removed, as happens between samples"
    return [f"{str(place)!r} lies on an ext4 without a journal, which {slow}; --backing ext4 (or xfs) avoids that"]


def _slowed() -> list[str]:
    governor = _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    if governor and governor != "performance":
        return [f"the processors' frequency governor is {governor!r}; with 'performance' figures vary less"]
    return []


def _throttled() -> int:
    found = re.search(r"^0::(/.*)$", _text("/proc/self/cgroup"), re.MULTILINE)
    group = found[1] if found else "/"
    return max(
        _field(f"/sys/fs/cgroup{group}/cpu.stat", "nr_throttled"), _field("/sys/fs/cgroup/cpu/cpu.stat", "nr_throttled")
    )


def _field(file: str, name: str) -> int:
    found = re.search(rf"^{name} (\d+)", _text(file), re.MULTILINE)
    return int(found[1]) if found else 0


def _text(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""
