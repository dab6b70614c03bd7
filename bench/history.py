"""The course of a workload over many runs, and the command ``layerfs history``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layerfs.bench import recorded
from layerfs.bench.changepoints import change_points
from layerfs.bench.report import claims, data
from layerfs.bench.report.axes import seconds, size
from layerfs.bench.report.data import Figure, Machine, RunFile
from layerfs.cli.common import commas_option, json_option
from layerfs.cli.output import one_line, print_json
from layerfs.errors import InvalidArgument, LayerfsError

FEWEST = 3
"""Runs that make a course."""
_BARS = "▁▂▃▄▅▆▇█"
_PIPE_WIDTH = 200


@dataclass(frozen=True)
class Course:
    """One step of one workload on one target in several runs of one machine, the oldest first."""

    name: str
    target: str
    runs: Sequence[RunFile]
    figures: Sequence[Figure]

    @cached_property
    def changes(self) -> list[int]:
        """The places of runs that begin a new level. Times are compared by their ratios."""
        times = [figure.middle for figure in self.figures]
        return change_points([math.log(time) for time in times]) if all(times) else []

    def step(self, place: int) -> float:
        """By how much a change changed the time: 1.5 for half as much again."""
        borders = [0, *self.changes, len(self.figures)]
        number = borders.index(place)
        before, after = (
            sorted(figure.middle for figure in self.figures[begin:end])
            for begin, end in ((borders[number - 1], place), (place, borders[number + 1]))
        )
        return after[len(after) // 2] / before[len(before) // 2]


def courses(machine: Machine) -> list[Course]:
    """Everything that two runs or more of a machine measured."""
    sizes: dict[tuple[str, str], set[int]] = {}
    for workload, step, size_, *_ in machine.courses:
        sizes.setdefault((str(workload), str(step)), set()).add(int(str(size_)))
    found = []
    for pairs in machine.courses.values():
        figure = pairs[0][1]
        words = machine.words(figure)
        if len(sizes[figure.workload, figure.step]) > 1:
            words.append(size(figure.size))
        name = f"{' '.join([figure.workload, *words])}: {figure.step}"
        found.append(Course(name, figure.target, [run for run, _ in pairs], [one for _, one in pairs]))
    return found


@click.command("history")
@click.argument("workload", required=False)
@commas_option("--driver", "drivers", help="Only these, with commas between.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Directory with run files.",
)
@json_option
def history_command(workload: str | None, drivers: str | None, results: Path, as_json: bool) -> None:
    """Show how a workload's times went over the run files of a directory, and where they changed.

    Only runs of one machine are set beside each other. A change is said where e-divisive means find one (p < 0.01),
    which takes nine runs or more.
    """
    machines = data.grouped(_runs(results))
    wanted = drivers.split(",") if drivers else None
    found = []
    for machine in machines:
        some = [
            course
            for course in courses(machine)
            if len(course.figures) >= FEWEST
            and workload in (None, course.figures[0].workload)
            and (wanted is None or course.target in wanted)
        ]
        if some:
            found.append((machine, some))
    if as_json:
        print_json([{"machine": dict(m.newest.machine), "courses": [_as_json(c) for c in some]} for m, some in found])
        return
    if not found:
        raise InvalidArgument(
            f"{str(results)!r} has no {FEWEST} runs of one machine with the same figures"
            f"{f' of {workload!r}' if workload else ''}; measure more with layerfs bench"
        )
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    for machine, some in found:
        console.print(_table(machine, some))


def _runs(results: Path) -> list[RunFile]:
    if not results.is_dir():
        raise InvalidArgument(f"{str(results)!r} is no directory; --results names the one with the run files")
    runs = []
    for file in sorted(results.rglob("*.json")):
        try:
            document = recorded.document(file)
            if not claims.is_one(document):
                runs.append(data.parse(document, file.name))
        except LayerfsError as error:
            click.echo(f"Note: passed over: {one_line(str(error))}", err=True)
    return runs


def _table(machine: Machine, some: Sequence[Course]) -> Table:
    about = machine.newest.machine
    heading = ", ".join(str(about[name]) for name in ("processor", "cpus", "memory", "kernel") if name in about)
    table = Table(box=SIMPLE_HEAD, title=Text(one_line(heading)), title_justify="left")
    for name in ("workload", "driver", "runs", "course", "first", "last", "changes"):
        table.add_column(name, justify="right" if name in ("runs", "first", "last") else "left")
    for course in some:
        first, last = course.figures[0].middle, course.figures[-1].middle
        changes = [
            f"{course.step(place) - 1:+.0%} since {course.runs[place].started:%Y-%m-%d %H:%M}"
            f" ({course.runs[place].commit[:9] or course.runs[place].name})"
            for place in course.changes
        ]
        cells = [course.name, course.target, str(len(course.runs)), sparkline([f.middle for f in course.figures])]
        cells += [seconds(first), seconds(last), "\n".join(changes) or "none found"]
        table.add_row(*(Text(one_line(c) if "\n" not in c else c, "" if changes else "dim") for c in cells))
    return table


def sparkline(values: Sequence[float]) -> str:
    """The newest values as a line of bars."""
    values = values[-40:]
    low, high = min(values), max(values)
    if high == low:
        return _BARS[0] * len(values)
    return "".join(_BARS[round((value - low) / (high - low) * (len(_BARS) - 1))] for value in values)


def _as_json(course: Course) -> dict[str, object]:
    points = [
        {
            "run": run.name,
            "started": run.started.isoformat(),
            "commit": run.commit,
            "seconds": {"low": figure.time.low, "median": figure.time.middle, "high": figure.time.high},
            "samples": len(figure.seconds),
        }
        for run, figure in zip(course.runs, course.figures, strict=True)
    ]
    changes = [{"run": course.runs[place].name, "ratio": course.step(place)} for place in course.changes]
    return {"name": course.name, "target": course.target, "points": points, "changes": changes}
