"""The verdicts on claims that `layerfs claims` wrote, for the scoreboard."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerfs.bench import recorded
from layerfs.bench.statistics import Interval
from layerfs.errors import InvalidArgument

VERDICTS = ("reproduced", "partly", "refuted", "cannot tell", "cannot be tested")
SIGNS = dict(zip(VERDICTS, ("✓", "◐", "✗", "?", "–"), strict=True))
"""So that colour is not all that tells them apart."""
FORMAT = 1


@dataclass(frozen=True)
class Claim:
    """One claim with its verdict.

    Attributes:
        identity: short, such as ``b1``; ``claim``: in a sentence; ``source``: who made it.
        theirs: the figure that came with it, in words; ``ours``: the ratio measured; None for none.
        verdict: one of `VERDICTS`; ``reason``: why, in a sentence.
    """

    identity: str
    claim: str
    source: str
    theirs: str
    ours: Interval | None
    verdict: str
    reason: str


def read(file: Path) -> list[Claim]:
    """Read a file of verdicts. Raises `InvalidArgument` where it is none."""
    return parse(recorded.document(file), str(file))


def is_one(document: Any) -> bool:
    """Whether a document holds verdicts."""
    return isinstance(document, dict) and "layerfs_claims" in document


def parse(document: Any, name: str) -> list[Claim]:
    """The same from the document itself."""
    try:
        if document["layerfs_claims"] > FORMAT:
            raise InvalidArgument(f"{name!r} was written by a later version of layerfs; use that one")
        return [_claim(entry) for entry in document["claims"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InvalidArgument(f"{name!r} is not a file of verdicts of `layerfs claims`: {error!r}") from error


def counted(claims: Sequence[Claim]) -> list[tuple[str, int]]:
    """How many there are of each verdict that occurs."""
    counts = [(verdict, sum(claim.verdict == verdict for claim in claims)) for verdict in VERDICTS]
    return [(verdict, count) for verdict, count in counts if count]


def _claim(entry: Any) -> Claim:
    if entry["verdict"] not in VERDICTS:
        raise ValueError(f"there is no verdict {entry['verdict']!r}")
    return Claim(
        str(entry["id"]),
        str(entry["claim"]),
        str(entry["source"]),
        _words(entry.get("theirs")),
        _interval(entry.get("ours")),
        entry["verdict"],
        str(entry.get("reason") or ""),
    )


def _words(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.3g}×"
    return value if isinstance(value, str) else json.dumps(value)


def _interval(value: Any) -> Interval | None:
    if value is None:
        return None
    found = Interval(float(value["low"]), float(value["ratio"]), float(value["high"]))
    if not all(math.isfinite(part) and part >= 0 for part in (found.low, found.middle, found.high)):
        raise ValueError(f"{value!r} is no ratio")
    return found
