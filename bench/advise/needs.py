"""What work can ask of a driver, as ``needs.toml`` has it."""

from __future__ import annotations

import importlib.resources
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One figure of a run, the lower the better.

    Attributes:
        shows: what it is, for people.
        steps: of the workload, whose seconds are added up; empty where ``counter`` is meant.
        counter: a counter's name; "" where the time is meant.
        least: by parameter of the workload, the least value with which the figure says something of the need.
    """

    shows: str
    workload: str
    steps: tuple[str, ...]
    counter: str
    least: Mapping[str, float]


@dataclass(frozen=True)
class Need:
    """A kind of work: ``id`` is its flag, ``question`` what is asked where no flag is given."""

    id: str
    question: str
    figures: Sequence[Figure]


def load() -> list[Need]:
    """All of them."""
    text = importlib.resources.files(__package__).joinpath("needs.toml").read_text()
    return [_need(entry) for entry in tomllib.loads(text)["need"]]


def _need(entry: Mapping[str, Any]) -> Need:
    return Need(entry["id"], entry["question"], [_figure(each) for each in entry["figure"]])


def _figure(entry: Mapping[str, Any]) -> Figure:
    return Figure(
        entry["shows"],
        entry["workload"],
        tuple(entry.get("step", ())),
        entry.get("counter", ""),
        entry.get("least", {}),
    )
