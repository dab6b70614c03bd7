"""A comparison for people and for machines: a table, Markdown, JUnit XML, JSON."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict

import humanize
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from layerfs.bench.compare import SIGNIFICANT, UNCALIBRATED, Clock, Comparison, Counter, Uncompared, Verdict
from layerfs.cli.output import one_line
from layerfs.sizes import format_size

MARKDOWN_LIMIT = 900_000
"""Bytes: a GitHub step summary may have 1024 KiB, and others write to it, too."""

_COLOURS = {
    Verdict.WORSE: "bold red",
    Verdict.FAILED: "bold red",
    Verdict.BETTER: "green",
    Verdict.SAME: "dim",
}
_UNTOLD_COLOUR = "yellow"
_MARKS = {Verdict.WORSE: "❌ worse", Verdict.FAILED: "❌ failed in the head", Verdict.BETTER: "✅ better"}
_ORDER = (
    *(Verdict.FAILED, Verdict.WORSE, Verdict.MISSING, Verdict.UNLIKE, Verdict.TOO_FEW, Verdict.UNCLEAR),
    *(Verdict.BETTER, Verdict.SAME),
)
_HEADER = ("", "base", "head", "difference", "verdict")


def summary(comparison: Comparison) -> str:
    """The whole verdict in a sentence."""
    total = len(comparison.all)
    worse, failed, few, noisy, unlike, missing = (
        len(comparison.having(verdict))
        for verdict in (
            *(Verdict.WORSE, Verdict.FAILED, Verdict.TOO_FEW, Verdict.UNCLEAR, Verdict.UNLIKE, Verdict.MISSING),
        )
    )
    parts = []
    if comparison.verdict is Verdict.SAME:
        parts.append(f"nothing is worse: {total} figures, each the same or better")
    elif comparison.verdict is Verdict.UNCLEAR:
        parts.append(f"nothing is worse as far as can be told of {total} figures")
    parts += [f"{worse} of {total} figures {_are(worse)} worse than in the base"] if worse else []
    parts += [f"{failed} of {total} figures could not be measured in the head"] if failed else []
    parts += [f"{missing} {_are(missing)} missing in the head"] if missing else []
    parts += [f"{unlike} {_are(unlike)} not compared, for the head measured differently"] if unlike else []
    if few:
        least = comparison.fewest
        have = "has" if few == 1 else "have"
        parts.append(f"{few} {have} too few samples to tell: measure at least {least} a side (--rounds {least})")
    parts += [f"{noisy} {_are(noisy)} too noisy to tell"] if noisy else []
    return "; ".join(parts)


def reasons(comparison: Comparison) -> list[str]:
    """Why figures are not compared, each reason once."""
    together: dict[tuple[Verdict, str], int] = {}
    for one in sorted(comparison.uncompared, key=lambda one: _ORDER.index(one.verdict)):
        together[one.verdict, one.why] = together.get((one.verdict, one.why), 0) + 1
    return [
        f"{_capital(verdict)} ({number} figure{'s' if number != 1 else ''}): {why}"
        for (verdict, why), number in together.items()
    ]


def table(comparison: Comparison) -> Group:
    """For a terminal, the worst first."""
    shown = Table(box=SIMPLE_HEAD)
    for title in _HEADER:
        shown.add_column(title, justify="left" if title in ("", "verdict") else "right")
    for change in _ordered(comparison):
        cells = _cells(change)
        shown.add_row(*map(Text, cells[:-1]), Text(cells[-1], _COLOURS.get(change.verdict, _UNTOLD_COLOUR)))
    return Group(
        shown,
        Text(_explanation(comparison), "dim"),
        *(Text(f"{one_line(reason)}.") for reason in reasons(comparison)),
        Text(_capital(summary(comparison)) + "."),
    )


def markdown(comparison: Comparison) -> str:
    """For a step summary, the worst first and no longer than `MARKDOWN_LIMIT`."""
    top = [
        f"## layerfs gate: {summary(comparison)}",
        "",
        "| figure | base | head | difference | verdict |",
        "|---|--:|--:|--:|---|",
    ]
    notes = (*reasons(comparison), *comparison.warnings)
    foot = ["", _explanation(comparison), *(f"- {plain(note)}" for note in notes)]
    size = sum(len(line.encode()) + 1 for line in (*top, *foot))
    rows: list[str] = []
    changes = _ordered(comparison)
    for change in changes:
        cells = [*_cells(change)[:-1], _MARKS.get(change.verdict, change.verdict.value)]
        row = "| " + " | ".join(map(plain, cells)) + " |"
        size += len(row.encode()) + 1
        if size > MARKDOWN_LIMIT:
            rows.append(f"| … {len(changes) - len(rows)} more, none of them worse than these | | | | |")
            break
        rows.append(row)
    return "\n".join((*top, *rows, *foot))[:MARKDOWN_LIMIT] + "\n"


def junit(comparison: Comparison) -> str:
    """A test case for each figure: failed where it is worse, skipped where it was not compared or nobody can tell."""
    suite = ElementTree.Element("testsuite", name="layerfs gate")
    failures = skipped = 0
    for change in _ordered(comparison):
        case = ElementTree.SubElement(suite, "testcase", classname=change.key.workload, name=_clean(str(change.key)))
        base, head, difference, verdict = _cells(change)[1:]
        if isinstance(change, Uncompared):
            said = f"{verdict}: {change.why}"
        elif change.verdict is Verdict.WORSE:
            said = f"{base} in the base, {head} in the head: {difference}"
        else:
            said = f"{verdict}: {difference}"
        if change.verdict in (Verdict.WORSE, Verdict.FAILED):
            failures += 1
            ElementTree.SubElement(case, "failure", message=_clean(said))
        elif change.verdict not in (Verdict.BETTER, Verdict.SAME):
            skipped += 1
            ElementTree.SubElement(case, "skipped", message=_clean(said))
    suite.attrib |= {"tests": str(len(suite)), "failures": str(failures), "skipped": str(skipped), "errors": "0"}
    ElementTree.indent(suite)
    document: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return document.decode() + "\n"


def as_json(comparison: Comparison) -> dict[str, object]:
    """Everything, for programs."""
    return {
        "format": 2,
        "verdict": comparison.verdict.value,
        "summary": summary(comparison),
        "base": comparison.base,
        "head": comparison.head,
        "calibrated": comparison.calibrated > 0,
        "counters": [{**asdict(c), "key": c.key._asdict()} for c in comparison.counters],
        "clocks": [{**asdict(c), "key": c.key._asdict()} for c in comparison.clocks],
        "uncompared": [{**asdict(c), "key": c.key._asdict()} for c in comparison.uncompared],
        "fewest_samples": comparison.fewest,
        "warnings": list(comparison.warnings),
    }


def _ordered(comparison: Comparison) -> list[Counter | Clock | Uncompared]:
    """The worst first, of one verdict the larger change."""

    def key(change: Counter | Clock | Uncompared) -> tuple[int, float]:
        if isinstance(change, Uncompared):
            return _ORDER.index(change.verdict), 0.0
        return _ORDER.index(change.verdict), -(change.head / change.base if change.base else change.head)

    return sorted(comparison.all, key=key)


def _cells(change: Counter | Clock | Uncompared) -> tuple[str, str, str, str, str]:
    """As `_HEADER` has them."""
    if isinstance(change, Uncompared):
        return str(change.key), "", "", "", change.verdict.value
    if isinstance(change, Counter):
        base, head = (_counted(change.key.counter, value) for value in (change.base, change.head))
        more = (
            f"{change.head / change.base - 1:+.1%}" if change.base else f"from none to {head}" if change.head else "0"
        )
        return str(change.key), base, head, more, change.verdict.value
    times = [humanize.metric(value, "s", precision=3) for value in (change.base, change.head)]
    low, middle, high = (f"{part - 1:+.1%}" for part in (change.ratio.low, change.ratio.middle, change.ratio.high))
    difference = f"{middle} ({low} to {high}; more than {change.threshold:.0%} counts)"
    if change.verdict is Verdict.TOO_FEW:
        difference = f"{middle} ({change.samples[0]} samples and {change.samples[1]})"
    return str(change.key), times[0], times[1], difference, change.verdict.value


def _counted(counter: str, value: float) -> str:
    return format_size(round(value)) if "bytes" in counter else f"{value:,.0f}"


def _explanation(comparison: Comparison) -> str:
    times, known = len(comparison.clocks), comparison.calibrated
    default = f"a cautious {UNCALIBRATED:.0%}"
    if known == 0:
        source = f"there is no calibration for these times, so each threshold is {default}"
    elif known == times:
        source = "thresholds are the noise that a calibration on this machine showed"
    else:
        source = f"thresholds are the noise that a calibration showed for {known} of {times} times, else {default}"
    return (
        "A counter is worse when every sample of the head lies above every sample of the base. A time is worse when "
        "the ratio of medians exceeds its threshold, the ratio's whole 95 % interval lies above the slowdown that is "
        f"always tolerated, and a permutation test agrees (p < {SIGNIFICANT} / {times} times); {source}."
    )


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def plain(text: str) -> str:
    """Nothing in it can act as Markdown or HTML in a table's cell."""
    return "".join(f"\\{c}" if c in "\\|`*_<>[]" else c for c in " ".join(text.split()))


def _clean(text: str) -> str:
    """XML has no form for control characters and lone surrogates."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
