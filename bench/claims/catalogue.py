"""The claims as ``catalogue.toml`` has them, each with the experiments that test it and the rules that decide."""

from __future__ import annotations

import importlib.resources
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerfs.bench.target_name import driver_of
from layerfs.bench.workload import Workload, discover
from layerfs.errors import InvalidArgument
from layerfs.sizes import format_size, parse_size

SECONDS, SPEED = "seconds", "speed"
"""The figures of a cell beside counters; a speed is bytes or operations per second."""

Scale = Mapping[str, int]
"""How much a profile measures: values by the names that experiments use instead of numbers."""

LARGEST = "largest"
"""In a scale: the most bytes that a file has; experiments with larger ones are left to a larger profile."""


@dataclass(frozen=True)
class Cell:
    """One figure that a run can have.

    Attributes:
        workload: its name.
        steps: whose seconds are added up; empty where the figure is a counter.
        target: as `layerfs.bench.target_name` describes it.
        figure: `SECONDS`, `SPEED`, or the name of a counter.
        given: the parameters that are not left at their defaults; names of a `Scale` stand for its values.
    """

    workload: str
    steps: tuple[str, ...]
    target: str
    figure: str
    given: Mapping[str, object]

    @property
    def defaults(self) -> dict[str, object]:
        """The workload's parameters where nothing is given."""
        return _kind(self.workload).defaults()

    def parameters(self, scale: Scale) -> dict[str, object]:
        """Every parameter of the workload, size among them. Raises `InvalidArgument` for one that it does not have."""
        found = {"size": scale["large"], **self.defaults}
        for name, value in self.given.items():
            if name not in found:
                raise InvalidArgument(f"the workload {self.workload!r} has no parameter {name!r}")
            found[name] = _value(value, found[name], scale)
        return found

    def __str__(self) -> str:
        given = ", ".join(f"{name} {value}" for name, value in self.given.items())
        what = " + ".join(self.steps) if self.figure == SECONDS else f"{' + '.join(self.steps)} {self.figure}".strip()
        return f"{what} of {self.workload}{f' ({given})' if given else ''} on {self.target}"


@dataclass(frozen=True)
class Real:
    """By what a driver is known as the one that the sources have measured, and not another in its place.

    Attributes:
        fact: where a run's fingerprint says what the driver is, from the target's own facts down.
        value: what it says there.
    """

    fact: Sequence[str]
    value: str


@dataclass(frozen=True)
class Test:
    """What one figure has to be over another (ratio of medians) if a part of a claim is true.

    Attributes:
        shows: that part, in words.
        over: the other figure, or a number in the figure's own unit; a name of a `Scale` stands for its value.
        least, most: the ratio's bounds; None for no bound.
        takes: what targets have to be for the test to decide, where stand-ins for a driver would not do.
    """

    shows: str
    of: Cell
    over: Cell | int | str
    least: float | None
    most: float | None
    takes: Mapping[str, Real]

    @property
    def cells(self) -> list[Cell]:
        return [cell for cell in (self.of, self.over) if isinstance(cell, Cell)]

    @property
    def is_share(self) -> bool:
        """Whether both figures are of one measurement, so that each sample has a ratio of its own."""
        first, *others = [(cell.workload, cell.target, cell.given) for cell in self.cells]
        return first in others

    @property
    def rule(self) -> str:
        """For people."""
        bounds = [f"at least {self.least:g}"] if self.least is not None else []
        bounds += [f"at most {self.most:g}"] if self.most is not None else []
        return f"{self.of}, over {self.over}: {' and '.join(bounds)}"


@dataclass(frozen=True)
class Claim:
    """What somebody says.

    Attributes:
        id: for ``--only``.
        says: the claim in a sentence; ``source``: who says it, and where; ``theirs``: the figure given for it.
        refuted: what would refute it.
        tests: its parts. The first one's ratio is set beside the source's own figure.
        cannot: why it cannot be tested here at all; "" where it can.
        notes: what a reader of the verdict has to know of the drivers and workloads that it rests on.
    """

    id: str
    says: str
    source: str
    theirs: str
    refuted: str
    tests: Sequence[Test]
    cannot: str
    notes: Sequence[str]


@dataclass(frozen=True)
class Catalogue:
    claims: Sequence[Claim]
    scales: Mapping[str, Scale]

    def chosen(self, ids: Sequence[str]) -> list[Claim]:
        """The claims of these names, all for none. Raises `InvalidArgument` for one that is not there."""
        known = {claim.id: claim for claim in self.claims}
        for name in ids:
            if name not in known:
                raise InvalidArgument(f"there is no claim {name!r}; there are {', '.join(known)}")
        return [claim for claim in self.claims if not ids or claim.id in ids]


def load(text: str | None = None) -> Catalogue:
    """Read the catalogue of this package, or ``text``. Raises `InvalidArgument` for what is no catalogue."""
    if text is None:
        text = importlib.resources.files(__package__).joinpath("catalogue.toml").read_text()
    document = tomllib.loads(text)
    scales = {
        name: {key: value if isinstance(value, int) else parse_size(value) for key, value in values.items()}
        for name, values in document["scale"].items()
    }
    real = {driver: Real(**given) for driver, given in document.get("real", {}).items()}
    structural = document.get("structural", [])
    claims = [_claim(entry, document["notes"], real, structural) for entry in document["claim"]]
    for claim in claims:
        _check(claim, scales)
    doubles = {claim.id for claim in claims if [other.id for other in claims].count(claim.id) > 1}
    if doubles:
        raise InvalidArgument(f"several claims are called {', '.join(sorted(doubles))}")
    return Catalogue(claims, scales)


def _claim(
    entry: Mapping[str, Any], notes: Mapping[str, str], real: Mapping[str, Real], structural: Sequence[str]
) -> Claim:
    common = entry.get("experiment", {})
    try:
        tests = [test for given in entry.get("test", []) for test in _tests(common, given, real, structural)]
        words = {name: str(entry[name]) for name in ("id", "says", "source", "theirs", "refuted")}
    except KeyError as error:
        raise InvalidArgument(f"the claim {entry.get('id')!r} lacks {error}") from error
    used = {name for test in tests for cell in test.cells for name in (driver_of(cell.target), cell.workload)}
    own = [text for name, text in notes.items() if name in used]
    return Claim(**words, tests=tests, cannot=entry.get("cannot", ""), notes=own)


def _tests(
    common: Mapping[str, Any], given: Mapping[str, Any], real: Mapping[str, Real], structural: Sequence[str]
) -> Iterator[Test]:
    """One for each target of ``of``. What ``over`` does not say of its cell is as in ``of``'s experiment."""
    one = {**common, **given["of"]}
    targets = one["target"] if isinstance(one["target"], list) else [one["target"]]
    for target in targets:
        over = given["over"]
        of = _cell({**one, "target": target})
        other = _cell({**common, "target": target, **over}) if isinstance(over, dict) else over
        any_kind = given.get("any_kind", False) or of.figure in structural
        compared = [cell.target for cell in (of, other) if isinstance(cell, Cell) and not any_kind]
        yield Test(
            shows=given["shows"].replace("{target}", target),
            of=of,
            over=other,
            least=given.get("least"),
            most=given.get("most"),
            takes={name: real[driver_of(name)] for name in compared if driver_of(name) in real},
        )


def _cell(entry: Mapping[str, Any]) -> Cell:
    own = ("workload", "step", "target", "figure")
    steps = entry.get("step", [])
    return Cell(
        workload=entry["workload"],
        steps=(steps,) if isinstance(steps, str) else tuple(steps),
        target=entry["target"],
        figure=entry.get("figure", SECONDS),
        given={name: value for name, value in entry.items() if name not in own},
    )


def _check(claim: Claim, scales: Mapping[str, Scale]) -> None:
    if not all((claim.id, claim.says, claim.source, claim.theirs, claim.refuted)):
        raise InvalidArgument(f"the claim {claim.id!r} is not complete")
    if bool(claim.tests) == bool(claim.cannot):
        raise InvalidArgument(f"the claim {claim.id!r} needs either tests or the reason why there are none")
    for test in claim.tests:
        if test.least is None and test.most is None:
            raise InvalidArgument(f"the claim {claim.id!r}: {test.rule!r} has no bound")
        for cell in test.cells:
            if bool(cell.steps) != (cell.figure in (SECONDS, SPEED)):
                raise InvalidArgument(f"the claim {claim.id!r}: {cell} is neither a step nor a counter")
            for scale in scales.values():
                cell.parameters(scale)


def number(value: int | str, scale: Scale) -> int:
    """A constant of a test: itself, a name of the scale, or a size."""
    return value if isinstance(value, int) else scale[value] if value in scale else parse_size(value)


def amount(size: object) -> str:
    """A size for people."""
    return format_size(int(str(size))).replace(".0", "")


def _kind(name: str) -> type[Workload]:
    if name not in discover():
        raise InvalidArgument(f"there is no workload {name!r}")
    return discover()[name]


def _value(value: object, default: object, scale: Scale) -> object:
    """As the workload takes it: text is a number of the scale, a size, or one of an enumeration's values."""
    if isinstance(value, str) and not isinstance(default, str):
        return number(value, scale)
    return type(default)(value) if isinstance(default, str) else value
