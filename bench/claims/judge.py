"""Whether claims are true, as far as measurements tell.

A part of a claim holds where the whole 95 % interval of its ratio lies within the rule's bounds, and fails where the
whole interval lies beyond one of them. Times have to pass a permutation test at that bound besides, which takes five
samples of each side. A step over the whole that it belongs to is a share of each sample, with no noise between the
two. Everything else cannot be told.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from layerfs.bench import statistics
from layerfs.bench.claims.catalogue import SECONDS, SPEED, Claim, Test, number
from layerfs.bench.claims.evidence import Evidence
from layerfs.bench.claims.plan import hindrance
from layerfs.bench.statistics import Interval

_SIGNIFICANT = 0.01
_FEWEST = 5  # samples of a time that is held against a constant


class Outcome(enum.StrEnum):
    """Of one test."""

    HOLDS = "holds"
    FAILS = "fails"
    UNCLEAR = "cannot tell"
    UNTESTABLE = "cannot be tested"


class Verdict(enum.StrEnum):
    """Of a claim."""

    REPRODUCED = "reproduced"
    PARTLY = "partly"
    REFUTED = "refuted"
    UNCLEAR = "cannot tell"
    UNTESTABLE = "cannot be tested"


@dataclass(frozen=True)
class Finding:
    """What came of a test: ``ratio`` is None where nothing was measured, ``run`` the file that decided."""

    test: Test
    outcome: Outcome
    reason: str
    ratio: Interval | None = None
    run: str = ""


@dataclass(frozen=True)
class Judgement:
    """What came of a claim."""

    claim: Claim
    verdict: Verdict
    reason: str
    findings: Sequence[Finding]

    @property
    def ours(self) -> Interval | None:
        """The ratio to set beside the source's own figure: of the first part that was measured."""
        return next((finding.ratio for finding in self.findings if finding.ratio), None)


def judge(claim: Claim, runs: Sequence[Evidence]) -> Judgement:
    """Judge one claim; every part by the first run that has its figures, so that both sides are of one run."""
    if claim.cannot:
        return Judgement(claim, Verdict.UNTESTABLE, claim.cannot, [])
    findings = [_of_runs(test, runs) for test in claim.tests]
    return Judgement(claim, _verdict([finding.outcome for finding in findings]), _reason(findings), findings)


def _verdict(outcomes: Sequence[Outcome]) -> Verdict:
    """All parts hold: reproduced. Some: partly, whatever became of the others. None: refuted, if all that could be
    tested were decided and the first one, which the claim is mainly about, is among them."""
    tested = [outcome for outcome in outcomes if outcome is not Outcome.UNTESTABLE]
    if not tested:
        return Verdict.UNTESTABLE
    if all(outcome is Outcome.HOLDS for outcome in outcomes):
        return Verdict.REPRODUCED
    if Outcome.HOLDS in tested:
        return Verdict.PARTLY
    refuted = outcomes[0] is Outcome.FAILS and all(outcome is Outcome.FAILS for outcome in tested)
    return Verdict.REFUTED if refuted else Verdict.UNCLEAR


def _reason(findings: Sequence[Finding]) -> str:
    """Every part with what became of it; parts that share a reason for not being tested are told once."""
    lines = []
    for outcome in Outcome:
        found = [finding for finding in findings if finding.outcome is outcome]
        if outcome is Outcome.UNTESTABLE:
            lines += [f"{outcome}: {reason}" for reason in dict.fromkeys(finding.reason for finding in found)]
        else:
            lines += [f"{outcome}: {finding.test.shows} ({finding.reason})" for finding in found]
    return "; ".join(lines)


def _of_runs(test: Test, runs: Sequence[Evidence]) -> Finding:
    reasons = []
    for run in runs:
        finding = _of_run(test, run)
        if finding.outcome is not Outcome.UNTESTABLE:
            return finding
        reasons.append(finding.reason)
    return Finding(
        test, Outcome.UNTESTABLE, reasons[0] if len(set(reasons)) == 1 else "; ".join(dict.fromkeys(reasons))
    )


def _of_run(test: Test, run: Evidence) -> Finding:
    figures = [samples for samples in map(run.samples, test.cells) if samples]
    if len(figures) < len(test.cells):
        return Finding(test, Outcome.UNTESTABLE, _missing(test, run))
    reference = figures[1] if len(figures) == 2 else [float(number(_constant(test), run.scale))]
    if test.is_share:
        figures, reference = [[part / whole for part, whole in zip(*figures, strict=True)]], [1.0]
    if min(map(min, (figures[0], reference))) <= 0:
        return Finding(test, Outcome.UNCLEAR, f"{test.of.figure} was 0 on one side, which has no ratio", None, run.name)
    ratio = statistics.ratio(figures[0], reference)
    for target, real in test.takes.items():
        if (found := run.fact(target, real.fact)) != real.value:
            why = f"it takes {real.value}, and {target} was {found or 'something unknown'} in {run.name}"
            return Finding(test, Outcome.UNTESTABLE, f"{why}, which gives {_number(ratio)}, {_asked(test)}")
    outcome = decide(figures[0], reference, test, ratio)
    return Finding(test, outcome, f"{_number(ratio)}, {_asked(test)}", ratio, run.name)


def _missing(test: Test, run: Evidence) -> str:
    """Why one side or both were not measured: what hindered either is told before what is only not there."""
    reasons = [hindrance(cell, run.scale, run.left_out) or run.failure(cell) for cell in test.cells]
    absent = [f"{run.name} has no {cell}" for cell in test.cells if not run.samples(cell)]
    return next((reason for reason in reasons if reason), "") or "; ".join(absent)


def decide(samples: Sequence[float], reference: Sequence[float], test: Test, ratio: Interval) -> Outcome:
    """What ``ratio``, that of the two, says of the test."""
    clock = test.of.figure in (SECONDS, SPEED)

    def sure(bound: float | None) -> bool:
        if not clock or bound is None:
            return True
        if len(reference) == 1:
            return len(samples) >= _FEWEST
        return statistics.difference([sample / bound for sample in samples], reference) < _SIGNIFICANT

    least, most = test.least, test.most
    if least is not None and ratio.high < least:
        return Outcome.FAILS if sure(least) else Outcome.UNCLEAR
    if most is not None and ratio.low > most:
        return Outcome.FAILS if sure(most) else Outcome.UNCLEAR
    within = (least is None or ratio.low >= least) and (most is None or ratio.high <= most)
    return Outcome.HOLDS if within and sure(least) and sure(most) else Outcome.UNCLEAR


def _constant(test: Test) -> int | str:
    assert isinstance(test.over, int | str)
    return test.over


def _number(ratio: Interval) -> str:
    return f"{figure(ratio.middle)} [{figure(ratio.low)} to {figure(ratio.high)}]"


def _asked(test: Test) -> str:
    bounds = [f"at least {test.least:g}"] if test.least is not None else []
    bounds += [f"at most {test.most:g}"] if test.most is not None else []
    return f"asked {' and '.join(bounds)}"


def figure(value: float) -> str:
    """A ratio for people: two digits that count, and never as a power of ten."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}" if value >= 0.001 else f"{value:.5f}"
