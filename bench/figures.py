"""What the samples of one step give to compare: the step's time, the processor's, and the slowest of its operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from layerfs.bench import statistics

PROCESSOR = " (processor)"
"""Ends the name of a step where its processor time is meant."""
SLOWEST = " (slowest tenth)"
"""Where the mean of the slowest tenth of its operations is meant, which shows what the median cannot: one in five that
is slow, or those that wait for others."""
_TENTH = 10


def figures(
    step: str, seconds: Sequence[float], processor: Sequence[float], latencies: Sequence[Mapping[float, int]]
) -> dict[str, list[float]]:
    """The seconds of every sample, by the figure's name.

    Args:
        processor: of every sample, or of none; ``latencies``: the operations of each sample, as far as it knows them.
    """
    found = {step: list(seconds)}
    if processor:
        found[step + PROCESSOR] = list(processor)
    if all(sum(operations.values()) >= _TENTH for operations in latencies):
        found[step + SLOWEST] = [statistics.slowest(operations, 1 / _TENTH) for operations in latencies]
    return found


def is_extra(step: str) -> bool:
    """Whether it is of the slowest operations, which are few: they say what they can, and nobody waits for more."""
    return step.endswith(SLOWEST)
