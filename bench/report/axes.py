"""Scales from values to places, with ticks at round values, and figures as people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import humanize

from layerfs.sizes import format_size

Format = Callable[[float], str]


def seconds(value: float) -> str:
    """``1.5 ms``, ``72.4 µs``."""
    return _round.sub(r"\1 ", humanize.metric(value, "s", precision=3)) if value else "0 s"


_round = re.compile(r"(?:\.0+|(\.\d*?[1-9])0+) ")  # zeros that say nothing


def speed(value: float) -> str:
    """Bytes a second: ``120 MB/s``."""
    return f"{humanize.naturalsize(value, format='%.3g')}/s".replace("Bytes", "B").replace("kB", "KB")


def size(value: float) -> str:
    """Bytes: ``64M``."""
    short = format_size(round(value)).replace(" Bytes", "B").replace(" Byte", "B")
    return short.replace(".0", "").replace(" ", "").removesuffix("iB")


def number(value: float) -> str:
    """``1,000``, ``1.5``."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def times(value: float) -> str:
    """A ratio: ``1.25×``, ``12×``, ``3.4k×``."""
    if value >= 10_000:
        return f"{value / 1000:,.0f}k×"
    if value >= 1000:
        return f"{value / 1000:.1f}k×"
    return f"{value:.0f}×" if value >= 10 else f"{value:.2g}×" if value < 0.1 else f"{value:.2f}×"


_SIZES = ("block", "memory", "file_size", "most", "parent_size", "change", "written")
"""Parameters in bytes."""


def value_words(name: str, value: object) -> str:
    """A parameter's value for people, with its name where the value alone says nothing."""
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if name in _SIZES and isinstance(value, int | float):
        return size(value)
    if isinstance(value, int | float):
        return f"{value:g} %" if name == "percent" else f"{name} {value:g}"
    return str(value)


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` on places from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    format: Format
    log: bool = False
    base: int = 10

    def place(self, value: float) -> float:
        low, high, value = (self._spread(v) for v in (self.low, self.high, min(max(value, self.low), self.high)))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """At most about ``most`` round values."""
        if not self.log:
            return _linear(self.low, self.high, most)
        if self.base == 2:
            return _thinned(
                [2.0**k for k in range(math.ceil(math.log2(self.low) - 1e-9), _floor2(self.high) + 1)], most
            )
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**k for k in powers for step in steps]
            found = [value for value in found if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]
            if len(found) <= most:
                break
        return _thinned(found, most)

    def _spread(self, value: float) -> float:
        return math.log10(value) if self.log else value


def scale(
    values: Iterable[float], start: float, end: float, form: Format, *, log: bool = False, base: int = 10
) -> Scale:
    """A scale that holds all ``values`` with some room; a linear one begins at 0."""
    found = [value for value in values if value > 0 or not log]
    low, high = (min(found), max(found)) if found else (1.0, 1.0)
    if not log:
        return Scale(min(0.0, low), high * 1.06 or 1.0, start, end, form)
    room = max((high / low) ** 0.06, 1.15 if base == 2 else 1.3)
    return Scale(low / room, high * room, start, end, form, log=True, base=base)


def _linear(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= raw * (1 - 1e-9))
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _floor2(value: float) -> int:
    return math.floor(math.log2(value) + 1e-9)


def _thinned(values: Sequence[float], most: int) -> list[float]:
    every = max(1, math.ceil(len(values) / most))
    return list(values[::every])
