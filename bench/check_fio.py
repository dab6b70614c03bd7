"""Whether this harness itself adds or hides anything: our plain I/O figures beside fio as people run it by hand.

``python -m layerfs.bench.check_fio``: both on a bare directory, on files of their own, in turns in random order. The
command lines of fio are written out here and share nothing with `layerfs.bench.fio`.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from layerfs.bench import fio, plain, runner, statistics, workload
from layerfs.bench.caches import SETTLING
from layerfs.bench.cli import PIPE_WIDTH, bar
from layerfs.bench.interrupts import Interrupts
from layerfs.bench.native import NATIVE
from layerfs.bench.scratch import Scratch
from layerfs.bench.statistics import Interval
from layerfs.bench.workload import Workload
from layerfs.cli import app
from layerfs.cli.common import json_option
from layerfs.cli.output import print_json
from layerfs.errors import EnvironmentUnfit, InvalidArgument, LayerfsError
from layerfs.sizes import format_size, parse_size

TOLERATED = 0.05
"""As a part: so far may the medians be apart."""
_EXIT_APART = 1
_BY_HAND: Mapping[str, Sequence[str]] = {
    "seqwrite-new": ("--rw=write", "--bs=1M", "--end_fsync=1"),
    "seqread-lower cold": ("--rw=read", "--bs=1M"),
    "randread": ("--rw=randread", "--bs=4k", "--io_size={part}"),
    "randwrite": ("--rw=randwrite", "--bs=4k", "--io_size={part}", "--end_fsync=1", "--overwrite=1"),
}


@dataclass(frozen=True)
class Pair:
    """Seconds of both, sample by sample."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> Interval:
        return statistics.ratio(self.ours, self.theirs)

    @property
    def verdict(self) -> str:
        """Over the interval of the ratio of medians."""
        low, high, allowed = self.ratio.low, self.ratio.high, 1 + TOLERATED
        if 1 / allowed <= low and high <= allowed:
            return "the same"
        return "apart" if low > allowed or high < 1 / allowed else "cannot tell"


@click.command()
@click.option("--size", default="256M", show_default=True, help="Of the file.")
@click.option("--rounds", type=click.IntRange(3), default=15, show_default=True, help="Samples of each side.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 2), help="Of the order and of all data [default: a new one].")
@click.option("--scratch", type=click.Path(path_type=Path), default=Path("/var/tmp"), show_default=True)  # noqa: S108
@json_option
def main(size: str, rounds: int, seed: int | None, scratch: Path, as_json: bool) -> int:
    """Measure plain I/O on a bare directory, with layerfs and with fio by hand, in turns.

    Ends with 1 where the two are clearly more than 5 % apart.
    """
    if os.geteuid() != 0:
        raise EnvironmentUnfit("making files cold by hand takes root; run it as root")
    if parse_size(size) < plain.FIO_FROM:
        raise InvalidArgument(f"layerfs runs fio on files from {format_size(plain.FIO_FROM)} on; give a larger --size")
    if not fio.version():
        raise EnvironmentUnfit("fio was not found; install the package fio")
    errors = Console(stderr=True, highlight=False)
    with Interrupts() as interrupts, bar(errors) as progress:
        number = secrets.randbelow(2**31 - 1) if seed is None else seed
        pairs = _measure(parse_size(size), rounds, number, scratch.absolute(), interrupts, progress)
    if as_json:
        print_json(
            {
                name: {"ours": p.ours, "fio": p.theirs, "ratio": _as_json(p.ratio), "verdict": p.verdict}
                for name, p in pairs.items()
            }
        )
    else:
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(_table(pairs, parse_size(size), rounds))
    return _EXIT_APART if any(pair.verdict == "apart" for pair in pairs.values()) else 0


def _as_json(interval: Interval) -> dict[str, float]:
    """For JSON."""
    return {"low": interval.low, "median": interval.middle, "high": interval.high}


def _measure(
    size: int, rounds: int, seed: int, place: Path, interrupts: Interrupts, progress: runner.Progress
) -> dict[str, Pair]:
    order = random.Random(seed)  # noqa: S311
    names = list(dict.fromkeys(name.split()[0] for name in _BY_HAND))
    works = {work.label: work for work in workload.chosen(names, [size], seed) if work.label in _BY_HAND}
    pairs = {label: Pair([], []) for label in works}
    with Scratch(place, interrupts) as scratch:
        target = scratch.target(NATIVE, None, 0)
        for base in {work.base.key: work.base for work in works.values()}.values():
            target.build(base)
        hand = scratch.root / "by-hand"
        hand.mkdir()
        blocks = [(label, ours) for label in works for ours in (True, False)]
        for done in range(rounds):
            for position, (label, ours) in enumerate(order.sample(blocks, len(blocks))):
                progress(f"round {done + 1}: {label}", (done + position / len(blocks)) / rounds)
                if ours:
                    one = runner.take_sample(works[label], target, done, scratch.shared, interrupts)
                    pairs[label].ours.append(one.timings[0].seconds)
                else:
                    with interrupts.allowed():
                        pairs[label].theirs.append(_by_hand(works[label], hand / "file", seed + done))
    return pairs


def _by_hand(work: Workload, file: Path, seed: int) -> float:
    """As the manual has it: lay a file out, drop the caches, run, and look at its runtime."""
    file.unlink(missing_ok=True)
    try:
        common = ["--name=hand", f"--filename={file}", f"--size={work.size}", "--ioengine=psync", "--fallocate=none"]
        os.sync()
        if work.label != "seqwrite-new":
            _fio([*common, "--rw=write", "--bs=1M", "--end_fsync=1"])
            Path("/proc/sys/vm/drop_caches").write_text("3\n")
            time.sleep(SETTLING)  # as layerfs waits: machines that rest longer may answer slower
        part = max(work.size // 32, 4096)
        chosen = [option.format(part=part) for option in _BY_HAND[work.label]]
        answer = _fio([*common, "--invalidate=0", f"--randseed={seed + 1}", *chosen, "--output-format=json"])
        job = json.loads(answer[answer.index("{") :])["jobs"][0]
        return float(max(job["read"]["runtime"], job["write"]["runtime"], 1)) / 1e3
    finally:
        file.unlink(missing_ok=True)


def _fio(arguments: Sequence[str]) -> str:
    done = subprocess.run(["fio", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LayerfsError(f"running fio by hand: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout


def _table(pairs: Mapping[str, Pair], size: int, rounds: int) -> Table:
    title = f"On a bare directory, {format_size(size)}, {rounds} samples of each side in turns"
    shown = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for name in ("", "layerfs", "fio by hand", "ratio of times", "95 % interval", f"within {TOLERATED:.0%}"):
        shown.add_column(name, justify="right" if name else "left")
    for label, pair in pairs.items():
        medians = [f"{statistics.median(side).middle * 1e3:,.0f} ms" for side in (pair.ours, pair.theirs)]
        ratio = pair.ratio
        cells = (*medians, f"{ratio.middle:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}", pair.verdict)
        shown.add_row(label, *cells)
    return shown


if __name__ == "__main__":
    sys.exit(app.main(main))
