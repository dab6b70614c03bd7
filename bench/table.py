"""A run for people: one table, a column for each target, every figure with its unit and spread."""

from __future__ import annotations

from collections.abc import Sequence

import humanize
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from layerfs.bench import statistics
from layerfs.bench.report import axes
from layerfs.bench.results import Run, Series
from layerfs.bench.statistics import Interval
from layerfs.sizes import format_size


def render(run: Run) -> Group:
    """The table with what explains it; every target after the first is also compared with it."""
    rounds = len({sample.round for sample in run.samples})
    sizes = ", ".join(format_size(size) for size in sorted({sample.workload.size for sample in run.samples}))
    heading = f"Files of {sizes}, up to {rounds} rounds: medians ± half of the 95 % confidence interval"
    return Group(Text(heading), _table(run), *_legend(run.targets))


def _table(run: Run) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("workload", no_wrap=True)
    table.add_column("step", no_wrap=True)
    for target in run.targets:
        table.add_column(target, justify="right")
    for steps in _grouped(run):
        for number, rows in enumerate(steps):
            table.add_row(rows[0].workload.label if number == 0 else "", rows[0].step, *_cells(run.targets, rows))
        for counter in dict.fromkeys(name for series in steps[0] for name in series.counters):
            values = {
                series.target: round(statistics.median(series.counters[counter]).middle)
                for series in steps[0]
                if counter in series.counters  # not every file system tells
            }
            shown = {
                target: format_size(value) if "bytes" in counter else f"{value:,}" for target, value in values.items()
            }
            table.add_row("", counter, *(Text(shown.get(target, ""), "cyan") for target in run.targets))
        table.add_section()
    return table


def _legend(targets: Sequence[str]) -> list[Text]:
    if len(targets) == 1:
        return []
    return [
        Text(
            f"x: so many times the speed of {targets[0]} (where that has no figure, of the first that has); "
            "~: the samples cannot tell them apart",
            "dim",
        )
    ]


def _grouped(run: Run) -> list[list[list[Series]]]:
    """By workload, then by step, one series for each target."""
    groups: dict[str, dict[str, list[Series]]] = {}
    for series in run.series():
        groups.setdefault(series.workload.label, {}).setdefault(series.step, []).append(series)
    return [list(steps.values()) for steps in groups.values()]


def _cells(targets: Sequence[str], rows: Sequence[Series]) -> list[Text]:
    by_target = {series.target: series for series in rows}
    first = rows[0]  # native has no layers to make
    return [_cell(by_target[target], first) if target in by_target else Text("-", "dim") for target in targets]


def _cell(series: Series, first: Series) -> Text:
    speed = statistics.median(series.speeds)
    text = Text.assemble(_figure(speed.middle, series.unit), (f" {speed.words}", "dim"))
    if series is not first:
        text.append_text(_against(statistics.ratio(series.seconds, first.seconds)))
    if series.unit == "op/s" and series.latencies:
        slow = statistics.percentile(series.latencies, 0.99)
        text.append(f"\np99 {_figure(slow, 's')}", "dim")
    return text


def _against(times: Interval) -> Text:
    """How many times as fast, from the ratio of times; green is faster."""
    if not times.tells:
        return Text("  ~", "dim")
    speed = 1 / times.middle
    return Text(f"  {speed:,.0f} x" if speed >= 10 else f"  {speed:.2g} x", "green" if speed > 1 else "red")


def _figure(value: float, unit: str) -> str:
    if unit == "B/s":
        return f"{humanize.naturalsize(value, format='%.3g')}/s"
    if unit == "op/s":
        return f"{axes.number(value)} op/s"
    return humanize.metric(value, "s", precision=3)
