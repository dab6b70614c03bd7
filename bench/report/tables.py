"""The same figures as a table: for a page, as Markdown, as CSV and for a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from layerfs.bench import statistics
from layerfs.bench.native import NATIVE
from layerfs.bench.report import axes, page
from layerfs.bench.report.claims import SIGNS, Claim, counted
from layerfs.bench.report.data import Figure, Machine
from layerfs.bench.report.panels import Panel
from layerfs.bench.report.svg import clean, element
from layerfs.bench.statistics import Interval
from layerfs.bench.verdicts import plain as unmarked
from layerfs.cli.output import one_line

_COLUMNS = (
    "machine workload step parameters size target samples seconds_median seconds_low seconds_high unit rate_median "
    "rate_low rate_high to_native_median to_native_low to_native_high counters"
)


class Line(NamedTuple):
    """One step of one workload, by target, with the times' ratio to native's where that has any."""

    name: str
    cells: dict[str, tuple[Figure, Interval | None]]


def lines(machine: Machine) -> list[Line]:
    """Everything that was measured, each variant a line."""
    found: dict[tuple[object, ...], dict[str, Figure]] = {}
    for figure in machine.figures:
        if figure.target in machine.targets:
            found.setdefault(figure.what, {})[figure.target] = figure
    sizes: dict[str, set[int]] = {}
    for figure in machine.figures:
        sizes.setdefault(figure.workload, set()).add(figure.size)
    made = []
    for by_target in found.values():
        first = next(iter(by_target.values()))
        words = machine.words(first)
        words += [axes.size(first.size)] if len(sizes[first.workload]) > 1 else []
        native = by_target.get(NATIVE)
        cells = {t: (f, _against(f, native)) for t, f in by_target.items()}
        made.append(Line(f"{' '.join([first.workload, *words])}: {first.step}", cells))
    return made


def html(machine: Machine) -> Element:
    head = element("tr", element("th", ""), *(element("th", clean(target, 40)) for target in machine.targets))
    rows = [
        element(
            "tr",
            element("td", clean(line.name, 120)),
            *(element("td", _cell(line, target)) for target in machine.targets),
        )
        for line in lines(machine)
    ]
    return element("table", head, *rows)


def markdown(sections: Sequence[tuple[Machine, Sequence[Panel]]], claims: Sequence[Claim]) -> str:
    """Claims, machines and figures."""
    out = ["# Container layers: what each storage driver costs", ""]
    if claims:
        out += ["| | claim | theirs | ours | why |", "|---|---|---|---|---|"]
        for claim in claims:
            cells = [f"{SIGNS[claim.verdict]} {claim.verdict}", claim.claim, claim.theirs, page.ours_words(claim)]
            out.append(f"| {' | '.join(map(plain, [*cells, claim.reason]))} |")
        out.append("")
    for machine, panels in sections:
        out += [f"- {plain(name)}: {plain(value)}" for name, value in page.facts(machine)]
        out += [f"- {plain(warning)}" for run in machine.runs for warning in run.warnings]
        targets = machine.targets
        out += ["", f"| | {' | '.join(map(plain, targets))} |", "|---|" + "--:|" * len(targets)]
        for line in lines(machine):
            out.append(f"| {plain(line.name)} | {' | '.join(plain(_cell(line, target)) for target in targets)} |")
        out += ["", "Medians ± half of the 95 % interval; × is the time as a multiple of the bare directory's.", ""]
        out += [f"Not measured: {panel.title}; `{panel.wanted}`" for panel in panels if panel.wanted]
    return "\n".join(out) + "\n"


def plain(words: str) -> str:
    """A cell of Markdown."""
    return unmarked(clean(words, 1000))


def as_csv(machines: Sequence[Machine]) -> str:
    """A row for each figure; seconds and bytes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS.split())
    for number, machine in enumerate(machines, 1):
        writer.writerows(_csv_rows(number, machine))
    return out.getvalue()


def _csv_rows(number: int, machine: Machine) -> Iterator[list[object]]:
    for line in lines(machine):
        for target, (figure, ratio) in line.cells.items():
            parameters = " ".join(f"{name}={value}" for name, value in figure.parameters.items())
            counters = "; ".join(
                f"{name}={count.middle:.0f}" for name in figure.counters if (count := figure.counter(name))
            )
            row: list[object] = [number, *map(_literal, (figure.workload, figure.step, parameters))]
            row += [figure.size, _literal(target), len(figure.seconds), *_parts(figure.time), figure.unit]
            yield [*row, *_parts(figure.rate), *(_parts(ratio) if ratio else ("", "", "")), _literal(counters)]


def terminal(sections: Sequence[tuple[Machine, Sequence[Panel]]], claims: Sequence[Claim]) -> Group:
    """Claims, figures, and what is not there."""
    parts: list[Table | Text] = []
    if claims:
        table = Table(box=SIMPLE_HEAD, show_lines=False)
        for name in ("verdict", "claim", "theirs", "ours"):
            table.add_column(name)
        for claim in claims:
            words = (f"{SIGNS[claim.verdict]} {claim.verdict}", claim.claim, claim.theirs, page.ours_words(claim))
            table.add_row(*(Text(one_line(cell)) for cell in words))
        parts += [Text(", ".join(f"{count} {verdict}" for verdict, count in counted(claims)), "bold"), table]
    for machine, panels in sections:
        parts += [Text(one_line(f"{name}: {value}"), "dim") for name, value in page.facts(machine)[:4]]
        table = Table(box=SIMPLE_HEAD)
        table.add_column("workload: step")
        for target in machine.targets:
            table.add_column(Text(one_line(target)), justify="right")
        for line in lines(machine):
            table.add_row(Text(one_line(line.name)), *(_coloured(line, target) for target in machine.targets))
        parts += [table, Text("×: the time as a multiple of the bare directory's; ~: cannot be told from it", "dim")]
        parts += [Text(one_line(f"Not measured: {p.title}; {p.wanted}"), "dim") for p in panels if p.wanted]
    return Group(*parts)


def _coloured(line: Line, target: str) -> Text:
    found = line.cells.get(target)
    if not found:
        return Text("–", "dim")
    ratio = found[1]
    colour = "" if ratio is None or not ratio.tells else "blue" if ratio.middle < 1 else "yellow"
    return Text(_cell(line, target), colour)


def _cell(line: Line, target: str) -> str:
    found = line.cells.get(target)
    if not found:
        return "–"
    figure, ratio = found
    words = f"{_rate_words(figure)} {figure.rate.words}"
    if ratio is None:
        return words
    return f"{words} {'' if ratio.tells else '~'}{axes.times(ratio.middle)}"


def _rate_words(figure: Figure) -> str:
    if figure.unit == "B/s":
        return axes.speed(figure.rate.middle)
    return f"{axes.number(figure.rate.middle)} op/s" if figure.unit == "op/s" else axes.seconds(figure.middle)


def _against(figure: Figure, native: Figure | None) -> Interval | None:
    if native is None or native is figure or min(native.seconds) <= 0:
        return None
    return statistics.ratio(figure.seconds, native.seconds)


def _parts(interval: Interval) -> list[float]:
    return [interval.middle, interval.low, interval.high]


def _literal(words: str) -> str:
    """A spreadsheet would run a cell that begins like a formula."""
    words = clean(words, 1000)
    return f"'{words}" if words[:1] in ("=", "+", "-", "@", "\t", "\r") else words
