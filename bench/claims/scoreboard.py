"""Judgements for people, as a table, and for programs, as the verdict file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from layerfs.bench.claims.catalogue import Claim
from layerfs.bench.claims.evidence import Evidence
from layerfs.bench.claims.judge import Finding, Judgement, Outcome, Verdict, figure
from layerfs.bench.statistics import Interval

FORMAT = 1
"""Of the verdict file."""

_COLOURS = {
    Verdict.REPRODUCED: "green",
    Verdict.PARTLY: "yellow",
    Verdict.REFUTED: "red",
    Verdict.UNCLEAR: "magenta",
    Verdict.UNTESTABLE: "dim",
}
_MARKS = {Outcome.HOLDS: "✓", Outcome.FAILS: "✗", Outcome.UNCLEAR: "?", Outcome.UNTESTABLE: "–"}
_OUTCOMES = {Outcome.HOLDS: "green", Outcome.FAILS: "red", Outcome.UNCLEAR: "magenta", Outcome.UNTESTABLE: "dim"}


def render(judgements: Sequence[Judgement]) -> Group:
    """The scoreboard."""
    table = Table(box=SIMPLE_HEAD, expand=True, show_lines=True)
    for title, ratio in (("claim", 5), ("their figure", 3), ("ours", 2), ("verdict", 6)):
        table.add_column(title, ratio=ratio)
    for judgement in judgements:
        claim = judgement.claim
        table.add_row(
            Text.assemble((claim.id, "bold"), f"\n{claim.says} ", (f"({claim.source})", "dim")),
            Text(claim.theirs),
            Text(_interval(judgement.ours)),
            Text.assemble((judgement.verdict.value, f"bold {_COLOURS[judgement.verdict]}"), *_lines(judgement)),
        )
    explained = "ours: ratio of medians with its 95 % interval, of the first thing that the claim says"
    notes = dict.fromkeys(note for judgement in judgements if judgement.findings for note in judgement.claim.notes)
    return Group(table, *(Text(f"{note}.", "dim") for note in (explained, *notes)), Text(summary(judgements)))


def summary(judgements: Sequence[Judgement]) -> str:
    """How many of each, in a sentence."""
    counts = Counter(judgement.verdict for judgement in judgements)
    parts = [f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]]
    return f"{len(judgements)} claims: {', '.join(parts)}."


def document(judgements: Sequence[Judgement], runs: Sequence[Evidence]) -> dict[str, object]:
    """The verdict file: everything that a report needs."""
    return {
        "layerfs_claims": FORMAT,
        "fingerprint": runs[0].fingerprint if runs else {},
        "runs": [{"name": r.name, "started": r.started, "fingerprint": r.fingerprint} for r in runs],
        "summary": summary(judgements),
        "claims": [_entry(judgement) for judgement in judgements],
    }


def listed(claims: Sequence[Claim]) -> list[dict[str, object]]:
    """The claims as they were written before any run."""
    return [
        {
            "id": claim.id,
            "claim": claim.says,
            "source": claim.source,
            "theirs": claim.theirs,
            "refuted_by": claim.refuted,
            "tests": [{"shows": test.shows, "rule": test.rule} for test in claim.tests],
            "cannot": claim.cannot,
        }
        for claim in claims
    ]


def _lines(judgement: Judgement) -> list[str | tuple[str, str]]:
    """What became of each part; those that could not be tested for one reason are told once."""
    if not judgement.findings:
        return [f"\n{judgement.reason}"]
    lines: dict[str, str] = {}
    for finding in judgement.findings:
        tested = finding.outcome is not Outcome.UNTESTABLE
        text = f"{finding.test.shows}: {finding.reason}" if tested else finding.reason
        lines[f"\n{_MARKS[finding.outcome]} {text}"] = _OUTCOMES[finding.outcome]
    return list(lines.items())


def _entry(judgement: Judgement) -> dict[str, object]:
    claim = judgement.claim
    return {
        "id": claim.id,
        "claim": claim.says,
        "source": claim.source,
        "theirs": claim.theirs,
        "ours": _ratio(judgement.ours),
        "verdict": judgement.verdict.value,
        "reason": judgement.reason,
        "note": "; ".join(claim.notes) if judgement.findings else "",
        "refuted_by": claim.refuted,
        "tests": [_tested(finding) for finding in judgement.findings],
    }


def _tested(finding: Finding) -> dict[str, object]:
    test = finding.test
    return {
        "shows": test.shows,
        "rule": test.rule,
        "least": test.least,
        "most": test.most,
        "outcome": finding.outcome.value,
        "ratio": _ratio(finding.ratio),
        "reason": finding.reason,
        "run": finding.run,
    }


def _ratio(interval: Interval | None) -> Mapping[str, float] | None:
    return {"ratio": interval.middle, "low": interval.low, "high": interval.high} if interval else None


def _interval(interval: Interval | None) -> str:
    return f"{figure(interval.middle)}\n[{figure(interval.low)} to {figure(interval.high)}]" if interval else "-"
