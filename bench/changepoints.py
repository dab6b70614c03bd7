"""Where the level of a series changes: e-divisive means, without assumptions about how the noise is distributed.

Matteson and James, "A nonparametric approach for multiple change point analysis of multivariate data", 2014; with
exponent 1, and the permutation test of their section 3.2 with a fixed seed, so that one series gives one answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise

SMALLEST = 3
"""Values that a level has at least."""
_PERMUTATIONS, _SIGNIFICANT, _SEED = 999, 0.01, 20_141


def change_points(values: Sequence[float]) -> list[int]:
    """The places at which a new level begins, in order; a place is that of the level's first value."""
    source = random.Random(_SEED)  # noqa: S311
    borders = [0, len(values)]
    while True:
        found, place = _best(values, borders)
        if place is None or not _is_significant(found, values, borders, source):
            return borders[1:-1]
        borders = sorted([*borders, place])


def _is_significant(found: float, values: Sequence[float], borders: Sequence[int], source: random.Random) -> bool:
    """Whether values in random order within their segments seldom divide as well; ends early where they often do."""
    as_far = 1
    for _ in range(_PERMUTATIONS):
        shuffled: list[float] = []
        for begin, end in pairwise(borders):
            shuffled += source.sample(values[begin:end], end - begin)
        as_far += _best(shuffled, borders)[0] >= found * (1 - 1e-12)
        if as_far >= _SIGNIFICANT * (_PERMUTATIONS + 1):
            return False
    return True


def _best(values: Sequence[float], borders: Sequence[int]) -> tuple[float, int | None]:
    """The split that divides a segment best, and how well."""
    best: tuple[float, int | None] = (0.0, None)
    for begin, end in pairwise(borders):
        divergence, place = _split(values[begin:end])
        if place is not None and divergence > best[0]:
            best = divergence, begin + place
    return best


def _split(values: Sequence[float]) -> tuple[float, int | None]:
    """The scaled energy distance between a part at the beginning and one that follows it, at its greatest.

    The second part need not reach to the end: where a level comes back, it is found all the same.
    """
    number = len(values)
    sums = [[0.0] * (number + 1)]  # of distances between the first i and the first j values
    for value in values:
        row = accumulate((abs(value - other) for other in values), initial=0.0)
        sums.append([above + own for above, own in zip(sums[-1], row, strict=True)])
    best: tuple[float, int | None] = (0.0, None)
    for place in range(SMALLEST, number - SMALLEST + 1):
        left = sums[place][place]
        for end in range(place + SMALLEST, number + 1):
            m, n = place, end - place
            between = sums[place][end] - left
            right = sums[end][end] - 2 * sums[place][end] + left
            divergence = (2 * between / (m * n) - left / m**2 - right / n**2) * m * n / end
            if divergence > best[0]:
                best = divergence, place
    return best
