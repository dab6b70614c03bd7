"""Sizes in bytes as people write and read them; all units are binary, as in truncate(1) and btrfs(8)."""

from __future__ import annotations

import re

import humanize

from layerfs.errors import InvalidArgument

_UNITS = "KMGTPE"
_FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGTPE])(?:I?B)?|B)?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """The bytes that ``text`` means: ``4096``, ``10G``, ``64M``, ``1.5GiB``; ``10G`` and ``10GB`` are 10 GiB.

    Raises `InvalidArgument`.
    """
    found = _FORM.fullmatch(text)
    if not found:
        raise InvalidArgument(f"{text!r} is not a size; write it like 10G, 64M or 1.5GiB")
    number, unit = found.groups()
    scale = 1024 ** (1 + _UNITS.index(unit.upper())) if unit else 1
    return int(number) * scale if number.isdigit() else round(float(number) * scale)


def format_size(size: int) -> str:
    """``size`` for people: ``1.5 GiB``."""
    return humanize.naturalsize(size, binary=True)
