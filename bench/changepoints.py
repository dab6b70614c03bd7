"""Where the level of a series changes: e-divisive means, without assumptions about how the noise is distributed.

Matteson and James, "A nonparametric approach for multiple change point analysis of multivariate data", 2014; with
exponent 1, and the permutation test of their section 3.2 with a fixed seed, so that one series gives one answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

SMALLEST = 2
"""Values that a level has at least."""
_PERMUTATIONS, _SIGNIFICANT, _SEED = 399, 0.05, 20_141


def change_points(values: Sequence[float]) -> list[int]:
    """The places at which a new level begins, in order; a place is that of the level's first value."""
    source = random.Random(_SEED)  # noqa: S311
    borders = [0, len(values)]
    while True:
        found, place = _best(values, borders)
        if place is None:
            break
        as_far = 1
        for _ in range(_PERMUTATIONS):
            shuffled: list[float] = []
            for begin, end in pairwise(borders):
                shuffled += source.sample(values[begin:end], end - begin)
            as_far += _best(shuffled, borders)[0] >= found * (1 - 1e-12)
        if as_far / (_PERMUTATIONS + 1) >= _SIGNIFICANT:
            break
        borders = sorted([*borders, place])
    return borders[1:-1]


def _best(values: Sequence[float], borders: Sequence[int]) -> tuple[float, int | None]:
    """The split that divides a segment best, and how well."""
    best: tuple[float, int | None] = (0.0, None)
    for begin, end in pairwise(borders):
        divergence, place = _split(values[begin:end])
        if place is not None and divergence > best[0]:
            best = divergence, begin + place
    return best


def _split(values: Sequence[float]) -> tuple[float, int | None]:
    """The scaled energy distance between the two parts, at its greatest."""
    number = len(values)
    to_left = [sum(abs(value - other) for other in values[:place]) for place, value in enumerate(values)]
    to_right = [sum(abs(value - other) for other in values[place + 1 :]) for place, value in enumerate(values)]
    left, right, total = 0.0, sum(to_right), sum(to_left)
    best: tuple[float, int | None] = (0.0, None)
    for place in range(1, number):
        left += to_left[place - 1]  # distances within the left part
        right -= to_right[place - 1]
        m, n = place, number - place
        if m < SMALLEST or n < SMALLEST:
            continue
        between = total - left - right
        energy = 2 * between / (m * n) - 2 * left / (m * (m - 1)) - 2 * right / (n * (n - 1))
        divergence = energy * m * n / number
        if divergence > best[0]:
            best = divergence, place
    return best
