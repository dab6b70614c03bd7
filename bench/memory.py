"""A cap on this process's memory, page cache included, by a control group of its own (cgroups(7))."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from layerfs.errors import EnvironmentUnfit
from layerfs.sizes import format_size

SMALLEST = 128 << 20
"""Bytes: below that the interpreter itself would have to be swapped out."""
_ATTEMPTS = 20


@contextmanager
def capped(limit: int | None) -> Iterator[None]:
    """Hold this process, and those that it starts, to ``limit`` bytes; None sets no cap.

    What was started and still runs (the daemon of a file system in user space) is free of the cap afterwards. Swap is
    not given in exchange. What the process had before is not counted. Raises `EnvironmentUnfit` where no group can be
    made (that takes root, and a control group file system that may be written to).
    """
    if limit is None:
        yield
        return
    home, settings = _home()
    with _handed_down(home):
        yield from _in_group(home / f"layerfs-bench-{os.getpid()}", settings(limit), limit)


@contextmanager
def _handed_down(home: Path) -> Iterator[None]:
    """Have the memory controller in groups below ``home``, where version 2 has it but does not hand it down yet."""
    control = home / "cgroup.subtree_control"
    missing = control.exists() and "memory" not in control.read_text().split()
    if missing:
        with contextlib.suppress(OSError):  # then the group says what fails
            control.write_text("+memory")
    try:
        yield
    finally:
        if missing:
            with contextlib.suppress(OSError):
                control.write_text("-memory")


def _in_group(group: Path, settings: list[tuple[str, str]], limit: int) -> Iterator[None]:
    try:
        group.mkdir()
        try:
            for name, value in settings:
                _set(group / name, value)
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            group.rmdir()
            raise
    except OSError as error:
        raise EnvironmentUnfit(
            f"capping the memory at {format_size(limit)}: {str(group)!r}: {error.strerror}; run it as root, where "
            "control groups may be made"
        ) from error
    try:
        yield
    finally:
        _dissolve(group)


def _dissolve(group: Path) -> None:
    """Have everything that is in a group in the one above, with its page cache, and take it away.

    Whatever is measured is more than an empty group that stays behind: no error comes of it.
    """
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(OSError):
            for process in (group / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                    (group.parent / "cgroup.procs").write_text(process)
            group.rmdir()
            return
        time.sleep(0.1)  # a process that was started meanwhile, or one that is just ending


def limit_now() -> int | None:
    """The lowest limit of this process's memory control group and those above it; None for no limit."""
    try:
        home, _ = _home()
    except EnvironmentUnfit:
        return None
    limits = []
    for place in (home, *home.parents):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # "max", or the top, which has none
                limits.append(int((place / name).read_text()))
    return min((limit for limit in limits if limit < 1 << 60), default=None)


def _home() -> tuple[Path, Callable[[int], list[tuple[str, str]]]]:
    """This process's memory control group, and what caps one: of version 1 where the host still has that."""
    groups: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, options = line.split()[:4]
        target = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), target)
        if kind == "cgroup" and "memory" in options.split(",") and "memory" in groups:
            return _below(Path(target), groups["memory"]), _version1
        if kind == "cgroup2" and "memory" not in groups and "" in groups:
            return _below(Path(target), groups[""]), _version2
    raise EnvironmentUnfit("this host has no memory control group; mount cgroup2 at /sys/fs/cgroup")


def _below(mount: Path, path: str) -> Path:
    """In a container the path is often the host's, and the mount shows only the part that is ours."""
    place = mount / path.lstrip("/")
    return place if place.is_dir() else mount


def _version1(limit: int) -> list[tuple[str, str]]:
    return [("memory.limit_in_bytes", str(limit)), ("memory.memsw.limit_in_bytes", str(limit))]


def _version2(limit: int) -> list[tuple[str, str]]:
    return [("memory.max", str(limit)), ("memory.swap.max", "0")]


def _set(file: Path, value: str) -> None:
    try:
        file.write_text(value)
    except FileNotFoundError:
        if "sw" not in file.name:  # a kernel without swap accounting has no such file
            raise
