"""Medians with confidence intervals, by the bootstrap: no assumption about how noise is distributed."""

from __future__ import annotations

import math
import random
import statistics
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_RESAMPLES = 2000
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

    @property
    def words(self) -> str:
        """Its `spread` for people, who learn nothing from one of many times the median; one sample has none."""
        if self.low == self.high:  # or two samples that are alike by chance
            return "±?"
        return f"±{self.spread:.0%}" if self.spread <= 1 else "±>100%"

    @property
    def tells(self) -> bool:
        """Whether a ratio is surely not 1."""
        return self.low < self.high and not self.low <= 1 <= self.high


EXACT = 100
"""Samples of both sides together up to which `difference` counts all ways; of more, it would take seconds."""


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
    """The probability that one source gave both, by the permutation test on the sum of ranks (Mann and Whitney).

    Exact up to `EXACT` samples, and beyond by the normal distribution that the sum of so many ranks has. No assumption
    about how noise is distributed, and ties do no harm.
    """
    ordered = sorted([*samples, *reference])
    # Twice the mean of the ranks that equal values share, and so a whole number.
    rank = {value: bisect_left(ordered, value) + bisect_right(ordered, value) + 1 for value in ordered}
    fewer = min(samples, reference, key=len)
    expected = len(fewer) * (len(ordered) + 1)
    seen = abs(sum(rank[value] for value in fewer) - expected)
    if len(ordered) > EXACT:
        ties = sum(count**3 - count for count in Counter(ordered).values())
        others, total = len(ordered) - len(fewer), len(ordered)
        variance = len(fewer) * others / 3 * (total + 1 - ties / (total * (total - 1)))
        return math.erfc(max(0, seen - 1) / math.sqrt(2 * variance)) if variance else 1.0
    ways = _ways([rank[value] for value in ordered], len(fewer))
    extreme = sum(number for total, number in ways.items() if abs(total - expected) >= seen)
    return extreme / math.comb(len(ordered), len(fewer))


def smallest_chance(samples: int, reference: int) -> float:
    """The least that `difference` can say of so many: all of one side lie above all of the other, or all below."""
    return 2 / math.comb(samples + reference, samples)


def _ways(ranks: Sequence[int], chosen: int) -> dict[int, int]:
    """In how many ways so many of the ranks add up to each sum.

    The counts of all sums are the digits of one large number, which a rank that is added shifts.
    """
    unit = math.gcd(*ranks)
    width = len(ranks) // 8 + 1  # bytes of a digit: no count exceeds two to the number of ranks
    digits = [1] + [0] * chosen  # by how many ranks are in the sum
    for rank in ranks:
        for number in range(chosen, 0, -1):
            digits[number] += digits[number - 1] << (8 * width * (rank // unit))
    data = digits[chosen].to_bytes(digits[chosen].bit_length() // 8 + 1, "little")
    counts = (int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width))
    return {place * unit: count for place, count in enumerate(counts) if count}


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


def slowest(latencies: Mapping[float, int], part: float) -> float:
    """The mean latency of that ``part`` (0 to 1) of all operations which took the longest; at least of one."""
    wanted = left = max(1, round(part * sum(latencies.values())))
    total = 0.0
    for latency in sorted(latencies, reverse=True):
        taken = min(left, latencies[latency])
        total += taken * latency
        left -= taken
    return total / wanted


def _resampled(samples: Sequence[float], source: random.Random) -> float:
    return statistics.median(source.choices(samples, k=len(samples)))


def _interval(middle: float, estimates: list[float]) -> Interval:
    estimates.sort()
    cut = int((1 - _LEVEL) / 2 * len(estimates))
    return Interval(estimates[cut], middle, estimates[-1 - cut])
