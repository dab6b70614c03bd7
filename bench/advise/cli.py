"""The command ``layerfs advise``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import humanize
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from layerfs import registry
from layerfs.bench.advise import needs as catalogue
from layerfs.bench.advise.needs import Figure, Need
from layerfs.bench.advise.ranking import Measured, Ranking, rank
from layerfs.bench.claims import evidence
from layerfs.bench.claims.evidence import Evidence
from layerfs.bench.claims.judge import figure as shown
from layerfs.bench.cli import PIPE_WIDTH, default_scratch
from layerfs.bench.statistics import Interval
from layerfs.cli.common import json_option
from layerfs.cli.output import print_json
from layerfs.driver import Capability
from layerfs.errors import EnvironmentUnfit, InvalidArgument, LayerfsError
from layerfs.kernel import userns
from layerfs.sizes import format_size

_CAPABILITIES = {str(flag.name).lower().replace("_", "-"): str(flag.name) for flag in Capability if flag.name}
_ASKED = {
    "rootless": "Does it have to work without root?",
    "size-limit": "Does each container's layer need a size limit?",
}


def _flags(command: Any) -> Any:
    """One for each need."""
    for need in reversed(catalogue.load()):
        command = click.option(f"--{need.id}", is_flag=True, help=need.question)(command)
    return command


@click.command()
@click.argument("run", metavar="[RUN]", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_flags
@click.option(
    "--require",
    "required",
    multiple=True,
    type=click.Choice(list(_CAPABILITIES)),
    help="Only drivers that can do that; may be repeated.",
)
@click.option("--elsewhere", is_flag=True, help="For another machine: do not ask what works on this one.")
@json_option
def advise(run: Path | None, required: tuple[str, ...], elsewhere: bool, as_json: bool, **wanted: bool) -> None:
    """Say which driver suits a work, by what was measured.

    Takes the figures of RUN, a file of `layerfs bench` or `layerfs claims` [default: the newest in ./results that
    answers the question]. Says which figures the advice rests on, and what another choice costs. On a terminal and
    without flags it asks what the work is.

    \b
    Examples:
      layerfs advise --large-files --builds
      layerfs advise --many-containers --little-memory --require rootless run.json
    """
    known = catalogue.load()
    chosen = [need for need in known if wanted[need.id.replace("-", "_")]]
    if not chosen:
        if not sys.stdin.isatty():
            flags = ", ".join(f"--{need.id}" for need in known)
            raise InvalidArgument(f"say what the work is: {flags}; on a terminal, layerfs advise asks for it")
        chosen, required = _asked(known, required)
    runs = [_read(run)] if run else list(_kept())
    left_out = {} if elsewhere else _unusable(runs)
    advice = _best(chosen, runs, left_out, [_CAPABILITIES[name] for name in required])
    if as_json:
        print_json(advice.document())
    else:
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(advice.text())


class Advice:
    """A ranking with what it was made of.

    Args:
        left_out: drivers of the run that cannot be chosen, with the reason.
    """

    def __init__(self, chosen: Sequence[Need], run: Evidence, ranking: Ranking, left_out: Mapping[str, str]) -> None:
        self.chosen = chosen
        self.run = run
        self.ranking = ranking
        self.refused = left_out
        self.left_out = {**left_out, **dict.fromkeys(ranking.incomplete, "it lacks figures that the others have")}

    def document(self) -> dict[str, object]:
        """For programs."""
        ranking = self.ranking
        best = ranking.drivers[0]
        return {
            "driver": best,
            "equally_good": ranking.equals,
            "needs": [need.id for need in self.chosen],
            "run": self.run.name,
            "measured": self.run.started,
            "ranking": [{"driver": driver, **_entry(ranking.overall[driver])} for driver in ranking.drivers],
            "figures": [
                {
                    "need": one.need,
                    **asdict(one.figure),
                    "drivers": {driver: _entry(one.over(driver, best)) for driver in ranking.drivers},
                    "samples": {driver: one.samples[driver] for driver in ranking.drivers},
                }
                for one in ranking.measured
            ],
            "capabilities": self._capabilities(),
            "left_out": self.left_out,
            "not_measured": [asdict(figure) for figure in ranking.missing],
            "measure": command(ranking.missing) if ranking.missing else "",
        }

    def text(self) -> Group:
        """For people."""
        lines = [self._headline(), *self._costs()]
        for driver, reason in self.left_out.items():
            lines.append(Text(f"Left out: {driver}: {reason}", "dim"))
        if self.ranking.by_chance:
            lines.append(
                Text(f"Some figures have {self.ranking.fewest} samples, so the order may be chance.", "yellow")
            )
        if self.ranking.missing:
            what = ", ".join(figure.shows for figure in self.ranking.missing)
            lines.append(
                Text(
                    f"Not measured of all these drivers: {what}; to measure: {command(self.ranking.missing)}", "yellow"
                )
            )
        source = f"By {self.run.name}, measured {self.run.started[:16].replace('T', ' ')}."
        return Group(*lines[:1], self._table(), *lines[1:], Text(source, "dim"))

    def _headline(self) -> Text:
        best, equals = self.ranking.drivers[0], self.ranking.equals
        text = Text.assemble("Use ", (best, "bold green"))
        if equals:
            text.append(f"; the samples cannot tell it from {', '.join(equals)}")
        if len(self.ranking.drivers) == 1:
            text.append(", the only one left to choose")
        can = self._capabilities()[best]
        text.append(f". It can do here: {', '.join(can)}." if can else ".")
        return text

    def _capabilities(self) -> dict[str, list[str]]:
        """By driver, as each said of the very backing that it was measured on."""
        names = {name: flag for flag, name in _CAPABILITIES.items()}
        targets = self.run.fingerprint["targets"]
        return {d: [names[c] for c in targets[d].get("capabilities", ()) if c in names] for d in self.ranking.drivers}

    def _costs(self) -> list[Text]:
        """What it would be to choose another one, and where another one is better all the same."""
        ranking = self.ranking
        best, others = ranking.drivers[0], ranking.drivers[1:]
        named = {others[-1]: "Worst", others[0]: "Next best"} if others else {}
        lines = [
            Text(f"{named[driver]}: {driver}, {_times(ranking.overall[driver])} as much on the whole.")
            for driver in reversed(named)
        ]
        for one in ranking.measured:
            faster = min(others, key=lambda driver: one.over(driver, best).middle, default=None)
            if faster and one.over(faster, best).high < 1:
                times = _times(one.over(best, faster))
                lines.append(Text(f"But {one.figure.shows}: {best} takes {times} as much as {faster}.", "yellow"))
        return lines

    def _table(self) -> Table:
        table = Table(box=SIMPLE_HEAD)
        table.add_column("the lower, the better")
        for driver in self.ranking.drivers:
            table.add_column(driver, justify="right")
        best = self.ranking.drivers[0]
        for one in self.ranking.measured:
            cells = [_cell(one, driver, best) for driver in self.ranking.drivers]
            table.add_row(f"{one.figure.shows} ({one.figure.workload})", *cells)
        table.add_section()
        table.add_row("on the whole", *(_times(self.ranking.overall[driver]) for driver in self.ranking.drivers))
        return table


def command(figures: Iterable[Figure]) -> str:
    """The `layerfs bench` that measures these."""
    works = dict.fromkeys(figure.workload for figure in figures)
    return f"layerfs bench --driver all --workload {','.join(works)} --output results/advise.json"


def _best(
    chosen: Sequence[Need], runs: Sequence[Evidence], left_out: Mapping[str, str], required: Sequence[str]
) -> Advice:
    """By the newest run that has most of the figures, and enough samples of them."""
    advices = []
    for run in runs:
        reasons = _refused(run, left_out, required)
        allowed = {target for target in run.fingerprint["targets"] if target in registry.names()} - set(reasons)
        advices.append(Advice(chosen, run, rank(chosen, run, allowed), reasons))
    usable = [a for a in advices if len(a.ranking.drivers) > 1 or (a.ranking.drivers and a.refused)]
    if not usable:
        wanted = command(figure for need in chosen for figure in need.figures)
        reasons = {driver: reason for advice in advices for driver, reason in advice.left_out.items()}
        why = "".join(f"; {driver}: {reason}" for driver, reason in reasons.items())
        raise EnvironmentUnfit(
            f"no run file has figures of drivers to choose from for that{why}; measure first: {wanted}, and then "
            "layerfs advise again, with that file"
        )
    return min(usable, key=lambda a: (len(a.ranking.missing), -len(a.ranking.drivers), a.ranking.by_chance))


def _refused(run: Evidence, left_out: Mapping[str, str], required: Sequence[str]) -> dict[str, str]:
    """Drivers of the run that cannot be had, or lack a capability there."""
    reasons = {}
    for target, facts in run.fingerprint["targets"].items():
        lacking = [name for name in required if name not in facts.get("capabilities", ())]
        if target in registry.names() and (target in left_out or lacking):
            words = ", ".join(name for name, flag in _CAPABILITIES.items() if flag in lacking)
            reasons[target] = left_out.get(target) or f"it cannot do {words} where it was measured"
    return reasons


def _unusable(runs: Iterable[Evidence]) -> dict[str, str]:
    """Of the drivers in the runs, those that do not work on this machine for this user, as the other commands run."""
    place = default_scratch()
    userns.enter()
    reasons = {}
    for driver in sorted({target for run in runs for target in run.fingerprint["targets"]} & set(registry.names())):
        probe = registry.load(driver).probe(place)
        if not probe.usable:
            reasons[driver] = f"it does not work here: {probe.reason} (--elsewhere passes over that)"
    return reasons


def _asked(known: Sequence[Need], required: Sequence[str]) -> tuple[list[Need], tuple[str, ...]]:
    chosen = [need for need in known if click.confirm(need.question, default=False)]
    if not chosen:
        raise InvalidArgument("nothing of that is asked of the driver, so every one will do")
    more = [name for name, text in _ASKED.items() if name not in required and click.confirm(text, default=False)]
    return chosen, (*required, *more)


def _read(file: Path) -> Evidence:
    return evidence.read(file, {})


def _kept() -> Iterable[Evidence]:
    """The run files in ``results``, the newest first; other files there are passed over."""
    found = []
    for file in Path("results").glob("*.json"):
        try:
            found.append(_read(file))
        except LayerfsError:
            continue
    return sorted(found, key=lambda run: run.started, reverse=True)


def _cell(one: Measured, driver: str, best: str) -> Text:
    value = sorted(one.samples[driver])[len(one.samples[driver]) // 2]
    figure = format_size(round(value)) if one.figure.counter else humanize.metric(value, "s", precision=3)
    if driver == best:
        return Text(figure, "bold")
    ratio = one.over(driver, best)
    colour = "dim" if ratio.low <= 1 <= ratio.high else "red" if ratio.middle > 1 else "green"
    return Text.assemble(figure, (f"  {_times(ratio)}", colour))


def _times(ratio: Interval) -> str:
    """``2.3 x [2.1 to 2.4]``; 1 needs no interval where there is none."""
    if ratio.low == ratio.high:
        return f"{shown(ratio.middle)} x"
    return f"{shown(ratio.middle)} x [{shown(ratio.low)} to {shown(ratio.high)}]"


def _entry(ratio: Interval) -> dict[str, float]:
    return {"ratio": ratio.middle, "low": ratio.low, "high": ratio.high}
