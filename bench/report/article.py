"""The points that the article this project starts from has measured with iozone, to be held against ours.

dockone.io/article/1513 (all tables also in a copy of 2017): one container per driver, ``iozone -a -n 4k -g 1g``,
buffered and without fsync; neither machine nor repetitions are told. Its figures are kilobytes a second.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import NamedTuple

FILE = "article_iozone_kbps.csv"
DRIVERS: Mapping[str, str] = {
    "aufs": "aufs",
    "overlay": "overlay2",
    "devicemapper": "devicemapper",
    "btrfs": "btrfs",
    "zfs": "zfs",
}
"""Its names of drivers, and ours."""
_VOID = ("read", "aufs")
"""The article prints its Re-write column there once more."""


class Measured(NamedTuple):
    """Bytes, and bytes a second."""

    size: int
    rate: float


@cache
def points() -> Mapping[tuple[str, str], list[Measured]]:
    """By the article's name of a test (``write``, ``read`` …) and our name of a driver; what is void is left out."""
    found: dict[tuple[str, str], list[Measured]] = {}
    with resources.files("layerfs.bench.report").joinpath(FILE).open() as file:
        for row in csv.DictReader(file):
            for theirs, ours in DRIVERS.items():
                if (row["test"], theirs) != _VOID:
                    measured = Measured(int(row["file_kib"]) * 1024, float(row[f"{theirs}_KBps"]) * 1024)
                    found.setdefault((row["test"], ours), []).append(measured)
    return found
