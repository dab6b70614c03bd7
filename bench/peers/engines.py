"""What the comparisons of engines share: a Debian image, engines that run, samples in turn, and a table of them."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import track
from rich.table import Table

from layerfs.bench.statistics import median, ratio
from layerfs.errors import EnvironmentUnfit
from layerfs.testing.engines import Served

OURS, THEIRS = "layerfs", "own"
IMAGE: Final = "docker.io/library/debian:peers"

_REQUEST: Final = re.compile(r"(?:^|\s)([A-Z]\w+) .* ([0-9.]+) ms(?:$| \w+: )")


@dataclass(frozen=True)
class Step:
    """One thing that is timed.

    Attributes:
        name: for the table.
        prepare, run, clean: each is given the side, `OURS` or `THEIRS`; only ``run`` is timed.
    """

    name: str
    run: Callable[[str], object]
    prepare: Callable[[str], object] = lambda _side: None
    clean: Callable[[str], object] = lambda _side: None


@dataclass
class Samples:
    """Seconds by step and side, and of ours the part that the server was at work."""

    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    served: dict[str, list[float]] = field(default_factory=dict)


def need(*programs: str) -> None:
    """Raise `EnvironmentUnfit` where one is missing."""
    for program in programs:
        if shutil.which(program) is None:
            raise EnvironmentUnfit(f"{program} is not installed; `.ci/setup nox -s peers` installs what is needed")
    if os.geteuid() != 0:
        raise EnvironmentUnfit("container engines need root; run it as root")


def debian() -> Path:
    """An OCI archive of a small Debian, made the first time and kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "layerfs"
    made = cache / "debian-bookworm.oci.tar"
    if made.exists():
        return made
    need("debootstrap", "umoci", "tar")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="debian-") as work:
        place = Path(work)
        tree, layout = place / "tree", place / "layout"
        _quietly("debootstrap", "--variant=minbase", "bookworm", tree)
        _quietly("umoci", "init", "--layout", layout)
        _quietly("umoci", "new", "--image", f"{layout}:peers")
        _quietly("umoci", "insert", "--image", f"{layout}:peers", tree, "/")
        _quietly("umoci", "config", "--image", f"{layout}:peers", "--config.cmd", "/bin/true")
        _quietly("tar", "-C", layout, "-cf", place / "archive", ".")
        (place / "archive").rename(made)
    return made


def _quietly(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentUnfit(f"{' '.join(map(str, command[:2]))} ended with {done.returncode}: {done.stderr[-500:]}")


def measure(steps: Sequence[Step], rounds: int, served: Served) -> Samples:
    """Time every step on both sides, in random order within a round."""
    found = Samples()
    cells = [(step, side) for step in steps for side in (OURS, THEIRS)]
    for _ in track(range(rounds), "Rounds", console=Console(stderr=True), transient=True):
        for step, side in random.sample(cells, len(cells)):
            step.prepare(side)
            os.sync()
            logged = served.log.stat().st_size
            start = time.perf_counter()
            step.run(side)
            found.seconds.setdefault((step.name, side), []).append(time.perf_counter() - start)
            if side == OURS:
                requests = _requests(served, logged)
                found.served.setdefault(step.name, []).append(sum(map(sum, requests.values())) / 1000)
            step.clean(side)
    return found


def _requests(served: Served, since: int) -> dict[str, list[float]]:
    """Milliseconds of each request that the server has logged since a place in its log, by method."""
    found: dict[str, list[float]] = {}
    with open(served.log, "rb") as log:
        log.seek(since)
        for line in log.read().decode(errors="replace").splitlines():
            if match := _REQUEST.search(line):
                found.setdefault(match[1], []).append(float(match[2]))
    return found


def table(title: str, theirs: str, samples: Samples) -> Table:
    """Medians with 95 % intervals; the ratio is ours to theirs."""
    made = Table("", OURS, theirs, "ratio", "the server's part", title=title)
    for name in dict.fromkeys(name for name, _ in samples.seconds):
        ours, own = samples.seconds[name, OURS], samples.seconds[name, THEIRS]
        both = [f"{i.middle:.3f} s [{i.low:.3f}, {i.high:.3f}]" for i in map(median, (ours, own))]
        compared = ratio(ours, own)
        part = median(samples.served[name]).middle
        made.add_row(
            name, *both, f"{compared.middle:.2f} [{compared.low:.2f}, {compared.high:.2f}]", f"{part * 1000:.1f} ms"
        )
    return made


def calls_table(title: str, sides: Mapping[str, Mapping[str, Sequence[float]]]) -> Table:
    """Medians of calls in milliseconds; ``sides`` is seconds by side and method."""
    methods: Iterable[str] = next(iter(sides.values()))
    made = Table("", *sides, title=title)
    for method in methods:
        cells = [median(calls[method]) for calls in sides.values()]
        made.add_row(method, *(f"{c.middle * 1000:.2f} ms [{c.low * 1000:.2f}, {c.high * 1000:.2f}]" for c in cells))
    return made
