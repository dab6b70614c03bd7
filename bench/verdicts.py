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

from layerfs.bench.compare import Clock, Comparison, Counter, Verdict
from layerfs.sizes import format_size

MARKDOWN_LIMIT = 900_000
"""Bytes: a GitHub step summary may have 1024 KiB, and others write to it, too."""

_COLOURS = {Verdict.WORSE: "bold red", Verdict.BETTER: "green", Verdict.SAME: "dim", Verdict.UNCLEAR: "yellow"}
_MARKS = {Verdict.WORSE: "❌ worse", Verdict.BETTER: "✅ better", Verdict.SAME: "same", Verdict.UNCLEAR: "cannot tell"}
_HEADER = ("", "base", "head", "difference", "verdict")


def summary(comparison: Comparison) -> str:
    """The whole verdict in a sentence."""
    worse, unclear = len(comparison.regressions), len(comparison.unclear)
    total = len(comparison.counters) + len(comparison.clocks)
    if worse:
        return f"{worse} of {total} figures are worse than in the base"
    if comparison.missing:
        return f"the head lacks {len(comparison.missing)} of the base's figures; nothing else is worse"
    if unclear:
        return f"nothing is worse as far as can be told; {unclear} of {total} figures are too noisy to tell"
    return f"nothing is worse: {total} figures"


def table(comparison: Comparison) -> Group:
    """For a terminal, the worst first."""
    shown = Table(box=SIMPLE_HEAD)
    for title in _HEADER:
        shown.add_column(title, justify="left" if title in ("", "verdict") else "right")
    for change in _ordered(comparison):
        cells = _cells(change)
        shown.add_row(*map(Text, cells[:-1]), Text(cells[-1], _COLOURS[change.verdict]))
    return Group(shown, Text(_explanation(comparison), "dim"), Text(_capital(summary(comparison)) + "."))


def markdown(comparison: Comparison) -> str:
    """For a step summary, the worst first and no longer than `MARKDOWN_LIMIT`."""
    top = [
        f"## layerfs gate: {summary(comparison)}",
        "",
        "| figure | base | head | difference | verdict |",
        "|---|--:|--:|--:|---|",
    ]
    foot = ["", _explanation(comparison), *(f"- {plain(warning)}" for warning in comparison.warnings)]
    size = sum(len(line.encode()) + 1 for line in (*top, *foot))
    rows: list[str] = []
    changes = _ordered(comparison)
    for change in changes:
        cells = [*_cells(change)[:-1], _MARKS[change.verdict]]
        row = "| " + " | ".join(map(plain, cells)) + " |"
        size += len(row.encode()) + 1
        if size > MARKDOWN_LIMIT:
            rows.append(f"| … {len(changes) - len(rows)} more, none of them worse than these | | | | |")
            break
        rows.append(row)
    return "\n".join((*top, *rows, *foot))[:MARKDOWN_LIMIT] + "\n"


def junit(comparison: Comparison) -> str:
    """A test case for each figure: failed where it is worse, skipped where nobody can tell."""
    suite = ElementTree.Element("testsuite", name="layerfs gate")
    failures = skipped = 0
    for change in _ordered(comparison):
        case = ElementTree.SubElement(suite, "testcase", classname=change.key.workload, name=_clean(str(change.key)))
        base, head, difference, verdict = _cells(change)[1:]
        if change.verdict is Verdict.WORSE:
            failures += 1
            ElementTree.SubElement(case, "failure", message=_clean(f"{base} in the base, {head} now: {difference}"))
        elif change.verdict is Verdict.UNCLEAR:
            skipped += 1
            ElementTree.SubElement(case, "skipped", message=_clean(f"{verdict}: {difference}"))
    for key in comparison.missing:
        skipped += 1
        case = ElementTree.SubElement(suite, "testcase", classname=key.workload, name=_clean(str(key)))
        ElementTree.SubElement(case, "skipped", message="the head has no such figure")
    suite.attrib |= {"tests": str(len(suite)), "failures": str(failures), "skipped": str(skipped), "errors": "0"}
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def as_json(comparison: Comparison) -> dict[str, object]:
    """Everything, for programs."""
    return {
        "format": 1,
        "verdict": comparison.verdict.value,
        "summary": summary(comparison),
        "base": comparison.base,
        "head": comparison.head,
        "calibrated": comparison.calibrated,
        "counters": [{**asdict(c), "key": c.key._asdict()} for c in comparison.counters],
        "clocks": [{**asdict(c), "key": c.key._asdict()} for c in comparison.clocks],
        "missing": [key._asdict() for key in comparison.missing],
        "warnings": list(comparison.warnings),
    }


def _ordered(comparison: Comparison) -> list[Counter | Clock]:
    order = [Verdict.WORSE, Verdict.UNCLEAR, Verdict.BETTER, Verdict.SAME]
    return sorted((*comparison.counters, *comparison.clocks), key=lambda change: order.index(change.verdict))


def _cells(change: Counter | Clock) -> tuple[str, str, str, str, str]:
    """As `_HEADER` has them."""
    if isinstance(change, Counter):
        figures = [
            format_size(round(value)) if "bytes" in change.key.counter else f"{value:,.0f}"
            for value in (change.base, change.head)
        ]
        difference = f"{change.head / change.base - 1:+.1%}" if change.base else f"{change.head - change.base:+,.0f}"
        return str(change.key), figures[0], figures[1], difference, change.verdict.value
    times = [humanize.metric(value, "s", precision=3) for value in (change.base, change.head)]
    low, middle, high = (f"{part - 1:+.1%}" for part in (change.ratio.low, change.ratio.middle, change.ratio.high))
    difference = f"{middle} ({low} to {high}; more than {change.threshold:.0%} counts)"
    return str(change.key), times[0], times[1], difference, change.verdict.value


def _explanation(comparison: Comparison) -> str:
    source = (
        "a calibration on this machine" if comparison.calibrated else "no calibration, and so from a cautious default"
    )
    return (
        "Counters are compared sample by sample. A time is worse when the 95 % interval of the ratio of medians lies "
        f"beyond its threshold and a permutation test agrees (p < 0.01); thresholds come from {source}."
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def plain(text: str) -> str:
    """Nothing in it can act as Markdown or HTML in a table's cell."""
    return "".join(f"\\{c}" if c in "\\|`*_<>[]" else c for c in " ".join(text.split()))


def _clean(text: str) -> str:
    """XML has no form for control characters and lone surrogates."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
