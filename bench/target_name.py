"""What the name of a target says: ``overlay2``, ``overlay2 volatile=on``, ``vfs backing=xfs``, ``btrfs again``.

The first word is the driver. A word with an equals sign sets something: the backing's kind, or an option of the driver.
Other words only tell targets apart that are set up alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

AGAIN = " again"
"""Ends the name of a calibration's second target with the same driver."""
_BACKING = "backing"


class TargetName(NamedTuple):
    """The parts of a name.

    Attributes:
        driver: its name, or that of the native control.
        filesystem: kind of the backing (`layerfs.backing.FILESYSTEMS`); None for the run's own choice.
        options: of the driver, as `layerfs.store.Store` takes them.
    """

    driver: str
    filesystem: str | None
    options: Mapping[str, str]


def parse(name: str) -> TargetName:
    """Take a name apart. Whether its driver, backing and options exist is seen when the store is made."""
    driver, *words = name.split(" ")
    options = dict(word.split("=", 1) for word in words if "=" in word)
    return TargetName(driver, options.pop(_BACKING, None), options)


def driver_of(name: str) -> str:
    """The driver that a target's name begins with."""
    return parse(name).driver


def first_of_pair(name: str) -> str | None:
    """The target that ``name`` repeats in a calibrating run; None where it repeats none."""
    return name.removesuffix(AGAIN) if name.endswith(AGAIN) else None
