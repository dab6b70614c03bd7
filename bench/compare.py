"""Whether one run is slower than another, or does more: counters first, then the clock, and "cannot tell" as an answer.

A counter (bytes copied up, blocks allocated) does not depend on the machine's mood: it is a regression when every
sample of head lies above every sample of base. A time is one only when the ratio lies beyond what identical code shows
on this machine (the calibration's threshold), its whole confidence interval beyond 5 %, and a permutation test agrees
that the samples differ, the more strictly the more figures are compared (Bonferroni). With few samples no test can say
so of anything, which is a verdict of its own; and figures that were measured differently are not compared.
"""

from __future__ import annotations

import enum
import itertools
import re
import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerfs.bench import recorded, statistics
from layerfs.bench.figures import is_extra
from layerfs.bench.recorded import CounterKey, Key, Recorded, Subject
from layerfs.bench.statistics import Interval
from layerfs.errors import EnvironmentUnfit, InvalidArgument

SMALLEST_THRESHOLD = 0.05
"""Where a calibration says less, this is taken: slower by less than 5 % is no regression."""
UNCALIBRATED = 0.15
"""Where there is no calibration."""
SIGNIFICANT = 0.01
"""The probability of chance below which one figure alone is told from it."""
_BLIND = 0.5
"""With a larger threshold than that, nothing can be called the same."""
_COUNTER_SLACK, _COUNTER_PART = 4096, 0.01  # a block, and what file systems' own structures vary by


class Verdict(enum.StrEnum):
    WORSE = "worse"
    BETTER = "better"
    SAME = "same"
    UNCLEAR = "cannot tell"
    TOO_FEW = "too few samples"
    """However they came out, no test could tell them from chance."""
    UNLIKE = "measured differently"
    """With other parameters, in another cache state, on another backing, by another user."""
    MISSING = "missing in the head"
    FAILED = "failed in the head"
    """What the base could measure; as bad as worse."""


_UNTOLD = (Verdict.UNCLEAR, Verdict.TOO_FEW)


@dataclass(frozen=True)
class Clock:
    """One step's times compared.

    Attributes:
        base, head: medians in seconds; ``ratio``: head over base, with its interval.
        chance: the probability that both are samples of one source.
        threshold: the slowdown, as a part, that is tolerated.
        samples: of base and head.
    """

    key: Key
    base: float
    head: float
    ratio: Interval
    chance: float
    threshold: float
    verdict: Verdict
    samples: tuple[int, int]


@dataclass(frozen=True)
class Counter:
    """One counter compared: medians, and the verdict over all samples."""

    key: CounterKey
    base: float
    head: float
    verdict: Verdict


@dataclass(frozen=True)
class Uncompared:
    """A figure of the base that nothing in the head can be held against, and why."""

    key: Key | CounterKey
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Comparison:
    """Everything that two runs have in common, and what only the base has.

    Attributes:
        calibrated: of how many times the threshold comes from a calibration.
    """

    base: str
    head: str
    counters: Sequence[Counter]
    clocks: Sequence[Clock]
    uncompared: Sequence[Uncompared]
    calibrated: int
    warnings: Sequence[str]

    @property
    def all(self) -> list[Counter | Clock | Uncompared]:
        """Counters first; of the slowest operations only what can be told."""
        clocks = [clock for clock in self.clocks if clock.verdict not in _UNTOLD or not is_extra(clock.key.step)]
        return [*self.counters, *clocks, *self.uncompared]

    def having(self, *verdicts: Verdict) -> list[Counter | Clock | Uncompared]:
        """The figures with one of these verdicts."""
        return [change for change in self.all if change.verdict in verdicts]

    @property
    def regressions(self) -> list[Counter | Clock | Uncompared]:
        return self.having(Verdict.WORSE, Verdict.FAILED)

    @property
    def untold(self) -> set[str]:
        """Names of the workloads with times that more samples might tell; none where something is surely worse."""
        if any(not isinstance(change, Clock) for change in self.regressions):
            return set()
        return {change.key.workload.split()[0] for change in self.having(*_UNTOLD)}

    @property
    def blind(self) -> bool:
        """Whether no time could have come out as worse, whatever it was."""
        return all(clock.verdict is Verdict.TOO_FEW for clock in self.clocks)

    @property
    def fewest(self) -> int:
        """Samples of each side that comparing so many times takes."""
        return fewest(len(self.clocks))

    @property
    def verdict(self) -> Verdict:
        """Of the whole."""
        if self.regressions:
            return Verdict.WORSE
        told = len(self.having(Verdict.SAME, Verdict.BETTER))
        return Verdict.SAME if told == len(self.all) else Verdict.UNCLEAR


def compare(
    base: Recorded,
    head: Recorded,
    thresholds: Mapping[Key, float],
    *,
    smallest: float = SMALLEST_THRESHOLD,
    force: bool = False,
) -> Comparison:
    """Compare what both have measured alike.

    Args:
        thresholds: of a calibration, as parts; ``smallest``: the least that is taken.
        force: compare runs of different machines, too.

    Raises `EnvironmentUnfit` for those without ``force``, `InvalidArgument` where the runs have nothing in common that
    was measured alike.
    """
    differences = recorded.differences(base.machine, head.machine)
    if differences and not force:
        raise EnvironmentUnfit(
            f"{base.name!r} and {head.name!r} are of different machines ({'; '.join(differences)}), and figures of "
            "two machines do not compare; measure both on one, or give --force"
        )
    unlike = recorded.unlike(base, head)
    common = [key for key in base.seconds if key in head.seconds and Subject.of(key) not in unlike]
    counted = [key for key in base.counters if key in head.counters and Subject.of(key) not in unlike]
    left = (set(base.seconds) - set(common), set(base.counters) - set(counted))
    uncompared = [_uncompared(key, unlike, head) for key in base.counters if key in left[1]]
    uncompared += [_uncompared(key, unlike, head) for key in base.seconds if key in left[0] and not is_extra(key.step)]
    if not common and not any(one.verdict is Verdict.FAILED for one in uncompared):
        what = "; ".join(dict.fromkeys(one.why for one in uncompared if one.verdict is Verdict.UNLIKE))
        raise InvalidArgument(
            f"{base.name!r} and {head.name!r} have no workload and driver in common"
            + (f" that was measured alike: {what}; measure both with the same options" if what else "")
        )
    warnings = [f"compared in spite of different machines: {difference}" for difference in differences]
    for run in (base, head):
        kinds = {re.sub(r"[\d.]+", "#", warning): warning for warning in run.warnings}  # not once for each round
        warnings += [f"{run.name}: {warning}" for warning in kinds.values()]
    return Comparison(
        base.name,
        head.name,
        [_counter(key, base.counters[key], head.counters[key]) for key in counted],
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
        uncompared,
        sum(key in thresholds for key in common),
        warnings,
    )


def _uncompared(key: Key | CounterKey, unlike: Mapping[Subject, Sequence[str]], head: Recorded) -> Uncompared:
    if found := unlike.get(Subject.of(key)):
        return Uncompared(key, Verdict.UNLIKE, "; ".join(found))
    if reason := head.failure(key):
        return Uncompared(key, Verdict.FAILED, f"{key.target}: {reason}")
    return Uncompared(key, Verdict.MISSING, "its run has no such figure and names no failure")


def fewest(figures: int, bases: int = 1) -> int:
    """Samples of the head that can tell one of so many figures, and of the base ``bases`` times as many."""
    return next(n for n in itertools.count(1) if statistics.smallest_chance(n, n * bases) < _needed_chance(figures))


def _needed_chance(figures: int) -> float:
    return SIGNIFICANT / max(1, figures)


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
    chance, needed = statistics.difference(head, base), _needed_chance(figures)
    differ = chance < needed
    verdict = Verdict.UNCLEAR
    if statistics.smallest_chance(len(base), len(head)) >= needed:
        verdict = Verdict.TOO_FEW
    elif differ and ratio.middle > 1 + threshold and ratio.low > 1 + smallest:
        verdict = Verdict.WORSE
    elif differ and ratio.middle < 1 / (1 + threshold) and ratio.high < 1 / (1 + smallest):
        verdict = Verdict.BETTER
    elif threshold <= _BLIND and 1 / (1 + threshold) <= ratio.low and ratio.high <= 1 + threshold:
        verdict = Verdict.SAME
    samples = len(base), len(head)
    return Clock(key, plain.median(base), plain.median(head), ratio, chance, threshold, verdict, samples)


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
