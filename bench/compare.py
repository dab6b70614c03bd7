"""Whether one run is slower than another, or does more: counters first, then the clock, and "cannot tell" as an answer.

A counter (bytes copied up, blocks allocated) does not depend on the machine's mood: it is a regression when every
sample of head lies above every sample of base. A time is one only when the ratio lies beyond what identical code shows
on this machine (the calibration's threshold), its whole confidence interval beyond 5 %, and a permutation test agrees
that the samples differ, the more strictly the more figures are compared (Bonferroni).
"""

from __future__ import annotations

import enum
import re
import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerfs.bench import recorded, statistics
from layerfs.bench.recorded import CounterKey, Key, Recorded
from layerfs.bench.statistics import Interval
from layerfs.errors import EnvironmentUnfit, InvalidArgument

SMALLEST_THRESHOLD = 0.05
"""Where a calibration says less, this is taken: slower by less than 5 % is no regression."""
UNCALIBRATED = 0.15
"""Where there is no calibration."""
_SIGNIFICANT = 0.01
_BLIND = 0.5
"""With a larger threshold than that, nothing can be called the same."""
_COUNTER_SLACK, _COUNTER_PART = 4096, 0.01  # a block, and what file systems' own structures vary by


class Verdict(enum.StrEnum):
    WORSE = "worse"
    BETTER = "better"
    SAME = "same"
    UNCLEAR = "cannot tell"


@dataclass(frozen=True)
class Clock:
    """One step's times compared.

    Attributes:
        base, head: medians in seconds; ``ratio``: head over base, with its interval.
        chance: the probability that both are samples of one source.
        threshold: the slowdown, as a part, that is tolerated.
    """

    key: Key
    base: float
    head: float
    ratio: Interval
    chance: float
    threshold: float
    verdict: Verdict


@dataclass(frozen=True)
class Counter:
    """One counter compared: medians, and the verdict over all samples."""

    key: CounterKey
    base: float
    head: float
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Everything that two runs have in common, and what only one of them has.

    Attributes:
        calibrated: whether thresholds come from a calibration.
        missing: what the base has and the head has not.
    """

    base: str
    head: str
    counters: Sequence[Counter]
    clocks: Sequence[Clock]
    calibrated: bool
    missing: Sequence[Key]
    warnings: Sequence[str]

    @property
    def regressions(self) -> list[Counter | Clock]:
        """Counters first."""
        changes: list[Counter | Clock] = [*self.counters, *self.clocks]
        return [change for change in changes if change.verdict is Verdict.WORSE]

    @property
    def unclear(self) -> list[Clock]:
        return [clock for clock in self.clocks if clock.verdict is Verdict.UNCLEAR]

    @property
    def settled(self) -> bool:
        """Whether more samples would hardly say more: no time is unclear, or a counter, which is sure, is worse."""
        return not self.unclear or any(counter.verdict is Verdict.WORSE for counter in self.counters)

    @property
    def verdict(self) -> Verdict:
        """Of the whole."""
        if self.regressions:
            return Verdict.WORSE
        return Verdict.UNCLEAR if self.unclear or self.missing else Verdict.SAME


def compare(
    base: Recorded,
    head: Recorded,
    thresholds: Mapping[Key, float],
    *,
    smallest: float = SMALLEST_THRESHOLD,
    force: bool = False,
) -> Comparison:
    """Compare what both have.

    Args:
        thresholds: of a calibration, as parts; ``smallest``: the least that is taken.
        force: compare runs of different machines, too.

    Raises `EnvironmentUnfit` for those without ``force``, `InvalidArgument` where the runs have nothing in common.
    """
    differences = recorded.differences(base.machine, head.machine)
    if differences and not force:
        raise EnvironmentUnfit(
            f"{base.name!r} and {head.name!r} are of different machines ({'; '.join(differences)}), and figures of "
            "two machines do not compare; measure both on one, or give --force"
        )
    common = [key for key in base.seconds if key in head.seconds]
    if not common:
        raise InvalidArgument(f"{base.name!r} and {head.name!r} have no workload and driver in common")
    warnings = [f"compared in spite of different machines: {difference}" for difference in differences]
    for run in (base, head):
        kinds = {re.sub(r"[\d.]+", "#", warning): warning for warning in run.warnings}  # not once for each round
        warnings += [f"{run.name}: {warning}" for warning in kinds.values()]
    return Comparison(
        base.name,
        head.name,
        [_counter(key, base.counters[key], head.counters[key]) for key in base.counters if key in head.counters],
        [
            clock(
                key,
                base.seconds[key],
                head.seconds[key],
                max(thresholds.get(key, UNCALIBRATED), smallest),
                smallest=smallest,
                figures=len(common),
            )
            for key in common
        ],
        any(key in thresholds for key in common),
        [key for key in base.seconds if key not in head.seconds],
        warnings,
    )


def clock(
    key: Key,
    base: Sequence[float],
    head: Sequence[float],
    threshold: float,
    *,
    smallest: float = SMALLEST_THRESHOLD,
    figures: int = 1,
) -> Clock:
    """Judge one step's times.

    Args:
        threshold: what the ratio has to exceed as a part, ``smallest``: what its whole interval has to.
        figures: how many are compared; one of so many comes out as different by chance more easily than one alone.
    """
    ratio = statistics.ratio(head, base)
    chance = statistics.difference(head, base)
    differ = chance < max(_SIGNIFICANT / figures, 2 * statistics.SMALLEST_CHANCE)
    verdict = Verdict.UNCLEAR
    if differ and ratio.middle > 1 + threshold and ratio.low > 1 + smallest:
        verdict = Verdict.WORSE
    elif differ and ratio.middle < 1 / (1 + threshold) and ratio.high < 1 / (1 + smallest):
        verdict = Verdict.BETTER
    elif threshold <= _BLIND and 1 / (1 + threshold) <= ratio.low and ratio.high <= 1 + threshold:
        verdict = Verdict.SAME
    return Clock(key, plain.median(base), plain.median(head), ratio, chance, threshold, verdict)


def _counter(key: CounterKey, base: Sequence[int], head: Sequence[int]) -> Counter:
    verdict = Verdict.SAME
    if _above(head, base):
        verdict = Verdict.WORSE
    elif _above(base, head):
        verdict = Verdict.BETTER
    return Counter(key, plain.median(base), plain.median(head), verdict)


def _above(high: Sequence[int], low: Sequence[int]) -> bool:
    most = max(low)
    slack = (_COUNTER_SLACK if most > _COUNTER_SLACK else 0) + most * _COUNTER_PART
    return min(high) > most + slack
