"""Medians with confidence intervals, by the bootstrap: no assumption about how noise is distributed."""

from __future__ import annotations

import math
import random
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_RESAMPLES = 2000
_PERMUTATIONS = 5000
SMALLEST_CHANCE = 1 / (_PERMUTATIONS + 1)
"""The least that `difference` can say."""
_LEVEL = 0.95
# Fixed, so that one set of samples always gives one interval.
_SEED = 20_141


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % confidence interval."""

    low: float
    middle: float
    high: float

    @property
    def spread(self) -> float:
        """Half the interval's width, as a part of the estimate."""
        return (self.high - self.low) / 2 / self.middle if self.middle else 0.0


def median(samples: Sequence[float]) -> Interval:
    """The median, with the percentile bootstrap's interval (Efron 1979). From one sample there is no width."""
    source = random.Random(_SEED)  # noqa: S311
    return _interval(statistics.median(samples), [_resampled(samples, source) for _ in range(_RESAMPLES)])


def ratio(samples: Sequence[float], reference: Sequence[float]) -> Interval:
    """Median of ``samples`` over median of ``reference``, both resampled."""
    source = random.Random(_SEED)  # noqa: S311
    estimates = [_resampled(samples, source) / _resampled(reference, source) for _ in range(_RESAMPLES)]
    return _interval(statistics.median(samples) / statistics.median(reference), estimates)


def mean_ratio(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], weights: Sequence[float]) -> Interval:
    """The geometric mean of several such ratios, of samples to their reference each; ``weights`` sum to one."""
    source = random.Random(_SEED)  # noqa: S311

    def mean(estimate: Callable[[Sequence[float]], float]) -> float:
        parts = zip(pairs, weights, strict=True)
        return math.exp(sum(weight * math.log(estimate(one) / estimate(other)) for (one, other), weight in parts))

    return _interval(mean(statistics.median), [mean(lambda some: _resampled(some, source)) for _ in range(_RESAMPLES)])


def difference(samples: Sequence[float], reference: Sequence[float]) -> float:
    """The probability that one source gave both, by a permutation test on the sum of ranks (as Mann and Whitney's).

    No assumption about how noise is distributed, and ties (fio tells whole milliseconds) do no harm.
    """
    together = [*samples, *reference]
    ordered = sorted(together)
    rank = {value: (bisect_left(ordered, value) + bisect_right(ordered, value)) / 2 for value in ordered}
    ranks = [rank[value] for value in together]
    expected = len(samples) * len(together) / 2
    seen = abs(sum(ranks[: len(samples)]) - expected)
    source = random.Random(_SEED)  # noqa: S311
    extreme = sum(abs(sum(source.sample(ranks, len(samples))) - expected) >= seen - 1e-9 for _ in range(_PERMUTATIONS))
    return (extreme + 1) / (_PERMUTATIONS + 1)


def proportion(found: int, total: int) -> Interval:
    """How often something happens that happened ``found`` times in ``total``: Clopper and Pearson's exact interval."""
    if not total:
        return Interval(0.0, 0.0, 1.0)
    tail = (1 - _LEVEL) / 2
    low = _root(lambda part: 1 - _at_most(found - 1, total, part) < tail) if found else 0.0
    high = _root(lambda part: _at_most(found, total, part) > tail) if found < total else 1.0
    return Interval(low, found / total, high)


def _at_most(found: int, total: int, part: float) -> float:
    """The binomial distribution."""
    return sum(math.comb(total, k) * part**k * (1 - part) ** (total - k) for k in range(found + 1))


def _root(below: Callable[[float], bool]) -> float:
    """Where in 0 to 1 ``below`` ceases to hold."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low


def percentile(latencies: Mapping[float, int], part: float) -> float:
    """The latency that ``part`` (0 to 1) of all operations did not exceed (nearest rank)."""
    wanted = part * sum(latencies.values())
    seen = 0
    for latency in sorted(latencies):
        seen += latencies[latency]
        if seen >= wanted:
            return latency
    raise ValueError("no latencies")


def _resampled(samples: Sequence[float], source: random.Random) -> float:
    return statistics.median(source.choices(samples, k=len(samples)))


def _interval(middle: float, estimates: list[float]) -> Interval:
    estimates.sort()
    cut = int((1 - _LEVEL) / 2 * len(estimates))
    return Interval(estimates[cut], middle, estimates[-1 - cut])
