"""How often the gate finds a slowdown that is known, and how often it cries wolf.

``python -m layerfs.bench.gate_trial``: a trial measures one driver several times in the same blocks: as the base, once
more for the calibration, and changed by each fault. The gate judges every changed one; whether the fault is among its
findings is counted. A trial without a fault (A/A) has the base three times, and any finding is a false alarm. Trials
that are done are kept in a file, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import layerfs
from layerfs.bench import recorded, runner, statistics, workload
from layerfs.bench.cli import PIPE_WIDTH, bar, default_backing
from layerfs.bench.compare import compare, fewest
from layerfs.bench.content import Base
from layerfs.bench.figures import PROCESSOR, SLOWEST
from layerfs.bench.interrupts import Interrupts
from layerfs.bench.profiles import PROFILES
from layerfs.bench.scratch import StoreTarget
from layerfs.bench.target_name import AGAIN
from layerfs.bench.workload import Workload
from layerfs.cli import app
from layerfs.errors import InvalidArgument
from layerfs.kernel import userns
from layerfs.sizes import parse_size

_MATRIX = ("copyup-first-write", "diff-apply", "layer-lifecycle")
_SMALL: Mapping[str, object] = {"files": 100, "parent_size": 1 << 20}
"""Parameters of those workloads, which make a trial short; a fault adds a part of what there is all the same."""


class MoreWork(StoreTarget):
    """Applying a diff and making a layer do so much more work, as a part of what they did."""

    part = 0.0

    def create(self, key: str, base: Base | None) -> None:
        with self._more():
            super().create(key, base)

    def apply(self, key: str, diff: BinaryIO) -> int:
        with self._more():
            return super().apply(key, diff)

    def _more(self) -> _Repeated:
        return _Repeated(self.part)


class _Repeated:
    """Goes on computing for a part of the processor time, and waiting for a part of the rest, that its body took."""

    def __init__(self, part: float) -> None:
        self._part = part

    def __enter__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        wall, processor = time.perf_counter() - self._wall, time.process_time() - self._processor
        until = time.process_time() + processor * self._part
        while time.process_time() < until:
            pass
        time.sleep(max(0.0, wall - processor) * self._part)


class ExtraSync(StoreTarget):
    """Making a layer has everything on the disk."""

    def create(self, key: str, base: Base | None) -> None:
        super().create(key, base)
        self.write_back()


class LostSharing(StoreTarget):
    """A fresh layer's files have blocks of their own, as after a lost reflink or a copy-up that comes too early."""

    def mount(self, key: str) -> Path:
        tree = super().mount(key)
        for file in tree.rglob("*.dat"):
            file.write_bytes(file.read_bytes())
        return tree


def _more(part: float) -> type[StoreTarget]:
    return type(f"More{part:.0%}", (MoreWork,), {"part": part})


class SlowNowAndThen(StoreTarget):
    """One mount in ten takes five times as long."""

    _mounts = 0

    def mount(self, key: str) -> Path:
        self._mounts += 1
        with _Repeated(4.0 if self._mounts % 10 == 0 else 0.0):
            return super().mount(key)


class FileLeft(StoreTarget):
    """Removing a layer leaves a file of so many bytes behind."""

    size = 0

    def remove(self, key: str) -> None:
        super().remove(key)
        with tempfile.NamedTemporaryFile(dir=self._store.driver.root, delete=False) as left:
            left.write(bytes(self.size))


class SpaceLeft(FileLeft):
    size = 4096


@dataclass(frozen=True)
class Fault:
    """A known slowdown, and by which findings it counts as found.

    Attributes:
        target: what the changed driver is measured as.
        finds: whether a finding of this workload and step or counter is the fault's.
    """

    target: type[StoreTarget]
    finds: Callable[[str, str], bool]


_UNCHANGED = "unchanged"


def _slower_path(label: str, step: str) -> bool:
    return (label.split(maxsplit=1)[0], step.removesuffix(PROCESSOR).removesuffix(SLOWEST)) in (
        ("layer-lifecycle", "create"),
        ("diff-apply", "apply"),
        ("copyup-first-write", "make the layer"),
    )


FAULTS: Mapping[str, Fault] = {
    "5 % more work": Fault(_more(0.05), _slower_path),
    "10 % more work": Fault(_more(0.10), _slower_path),
    "20 % more work": Fault(_more(0.20), _slower_path),
    "50 % more work": Fault(_more(0.50), _slower_path),
    "extra sync": Fault(ExtraSync, _slower_path),
    "lost sharing": Fault(LostSharing, lambda _label, counter: "copied" in counter or "fresh" in counter),
    "now and then slow": Fault(SlowNowAndThen, lambda _label, step: step == "mount" + SLOWEST),
    "space left": Fault(SpaceLeft, lambda _label, counter: "bytes left" in counter),
    "an inode left": Fault(FileLeft, lambda _label, counter: "inodes left" in counter),
}
_NO_FAULT: Mapping[str, Fault] = {_UNCHANGED: Fault(StoreTarget, lambda _label, _step: True)}


@dataclass(frozen=True)
class Settings:
    """Of all trials; those of other settings are not counted with them."""

    driver: str
    size: int
    rounds: int
    backing: str
    whole_matrix: bool

    def workloads(self, seed: int, *, faulty: bool) -> list[Workload]:
        """The few that the faults concern, or for A/A trials the default profile's whole matrix."""
        if self.whole_matrix and not faulty:
            return workload.chosen(PROFILES["default"].workloads, [self.size], seed)
        return [_smaller(work) for work in workload.chosen(_MATRIX, [self.size], seed)]


@dataclass(frozen=True)
class Outcome:
    """One trial: what the gate found wrong, by fault.

    Attributes:
        figures: how many it judged for each.
        code: the `_code` that was tried; trials of another one are neither counted nor gone on with.
    """

    faulty: bool
    number: int
    figures: int
    seconds: float
    found: Mapping[str, Sequence[str]]
    code: str = ""


@click.command()
@click.option("--driver", default="overlay2", show_default=True)
@click.option("--size", default="4M", show_default=True, help="Of the large file.")
@click.option(
    "--rounds", type=click.IntRange(5), default=10, show_default=True, help="Samples of each side in a trial."
)
@click.option("--backing", metavar="FS", help="As for layerfs bench [default: ext4 as root, else dir].")
@click.option("--quiet-trials", default=50, show_default=True, help="Trials with nothing changed.")
@click.option("--fault-trials", default=10, show_default=True, help="Trials of every fault.")
@click.option("--whole-matrix", is_flag=True, help="Nothing changed: the default profile's whole matrix (hours).")
@click.option("--scratch", type=click.Path(path_type=Path), default=Path("/var/tmp"), show_default=True)  # noqa: S108
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("gate-trial.jsonl"),
    show_default=True,
    help="Every trial's findings; trials in it of this very code are not repeated.",
)
def main(
    driver: str,
    size: str,
    rounds: int,
    backing: str | None,
    quiet_trials: int,
    fault_trials: int,
    whole_matrix: bool,
    scratch: Path,
    output: Path,
) -> None:
    """Count how often the gate finds known slowdowns, and how often it cries wolf."""
    backing = backing or default_backing()
    userns.enter()
    settings = Settings(driver, parse_size(size), rounds, backing, whole_matrix)
    code = _code()
    done = [outcome for outcome in _earlier(output, settings) if outcome.code == code]
    wanted = [(False, number) for number in range(quiet_trials)] + [(True, number) for number in range(fault_trials)]
    random.Random(1).shuffle(wanted)  # noqa: S311 - so that a slow hour meets both kinds
    known = {(outcome.faulty, outcome.number) for outcome in done}
    missing = [trial for trial in wanted if trial not in known]
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    with (
        Interrupts() as interrupts,
        tempfile.TemporaryDirectory(prefix="layerfs-trial-", dir=scratch) as place,
        bar(errors) as progress,
    ):
        for position, (faulty, number) in enumerate(missing):
            begin = time.monotonic()

            def told(text: str, part: float, position: int = position) -> None:
                progress(f"trial {position + 1} of {len(missing)}: {text}", (position + part) / len(missing))

            figures, found = _trial(settings, Path(place), faulty, number, interrupts, told)
            done.append(Outcome(faulty, number, figures, time.monotonic() - begin, found, code))
            with open(output, "a") as kept:
                kept.write(json.dumps(asdict(done[-1])) + "\n")
            words = "; ".join(f"{name}: {', '.join(keys) or 'nothing'}" for name, keys in found.items())
            click.echo(f"{position + 1} of {len(missing)}, {done[-1].seconds:.0f} s: {words}", err=True)
    chosen = [outcome for outcome in done if (outcome.faulty, outcome.number) in wanted]
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table(chosen))


def table(outcomes: Sequence[Outcome]) -> Table:
    """Rates with Clopper and Pearson's 95 % intervals."""
    shown = Table(box=SIMPLE_HEAD)
    for name in ("changed", "the gate fails in", "of trials", "rate", "95 % interval"):
        shown.add_column(name, justify="left" if name == "changed" else "right")
    for name in (_UNCHANGED, *FAULTS):
        of = [outcome for outcome in outcomes if name in outcome.found]
        failed = sum(bool(outcome.found[name]) for outcome in of)
        _add_row(
            shown, f"nothing ({of[0].figures} figures each)" if of and name == _UNCHANGED else name, failed, len(of)
        )
    quiet = [outcome for outcome in outcomes if not outcome.faulty]
    false = sum(len(outcome.found[_UNCHANGED]) for outcome in quiet)
    _add_row(shown, "nothing, by single figures", false, sum(outcome.figures for outcome in quiet))
    return shown


def _add_row(shown: Table, name: str, failed: int, total: int) -> None:
    rate = statistics.proportion(failed, total)
    cells = (
        (str(failed), str(total), f"{rate.middle:.1%}", f"{rate.low:.1%} to {rate.high:.1%}") if total else ("",) * 4
    )
    shown.add_row(name, *cells)


def _trial(
    settings: Settings,
    place: Path,
    faulty: bool,
    number: int,
    interrupts: Interrupts,
    progress: runner.Progress,
) -> tuple[int, dict[str, list[str]]]:
    """How many figures were judged, and the findings by fault."""
    driver = settings.driver
    faults = FAULTS if faulty else _NO_FAULT
    changed = {name: f"{driver} {name.replace(' ', '-')}" for name in faults}
    seed = 2 * number + faulty
    plan = runner.Plan(
        targets=[driver, driver + AGAIN, *changed.values()],
        workloads=settings.workloads(seed, faulty=faulty),
        size=settings.size,
        rounds=settings.rounds,
        seed=seed,
        place=place,
        filesystem=settings.backing,
    )
    kinds = {changed[name]: fault.target for name, fault in faults.items()}
    whole = recorded.taken(runner.run(plan, interrupts, progress, kinds=kinds), "trial")
    base, found, figures = whole.joined().only(driver, driver), {}, 0
    for name, fault in faults.items():
        comparison = compare(base, whole.only(changed[name], driver), base.thresholds)
        if comparison.blind:
            raise InvalidArgument(
                f"so few samples find no slower time; give --rounds {fewest(len(comparison.clocks), 2)}"
            )
        figures = len(comparison.clocks) + len(comparison.counters)
        found[name] = [str(c.key) for c in comparison.regressions if fault.finds(c.key[0], c.key[1])]
    return figures, found


def _smaller(work: Workload) -> Workload:
    fitting = {name: value for name, value in _SMALL.items() if name in work.parameters}
    return replace(work, **fitting)  # type: ignore[arg-type]


def _code() -> str:
    """Tells one state of layerfs's sources from every other."""
    top, digest = Path(layerfs.__file__).parent, hashlib.sha256()
    for file in sorted(top.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(top)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _earlier(file: Path, settings: Settings) -> list[Outcome]:
    """The trials that were done already. Raises `InvalidArgument` where they had other settings."""
    first = json.dumps(asdict(settings))
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        file.write_text(first + "\n")
        return []
    if not lines or lines[0] != first:
        raise InvalidArgument(f"{str(file)!r} holds trials with other settings; give another --output, or remove it")
    outcomes = []
    for line in lines[1:]:
        try:
            outcomes.append(Outcome(**json.loads(line)))
        except (ValueError, TypeError):  # the machine went down while it was written
            break
    if len(outcomes) + 1 < len(lines):
        file.write_text("".join(line + "\n" for line in lines[: len(outcomes) + 1]))
    return outcomes


if __name__ == "__main__":
    sys.exit(app.main(main))
