"""Which workloads have to be measured on which targets, for all experiments of some claims together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerfs.bench.claims.catalogue import LARGEST, Cell, Claim, Scale, amount
from layerfs.bench.native import NATIVE
from layerfs.bench.target_name import driver_of
from layerfs.bench.workload import Workload, discover


@dataclass(frozen=True)
class Experiments:
    """What is to be measured.

    Attributes:
        measured_on: by a workload's label, the targets.
    """

    workloads: Sequence[Workload]
    measured_on: Mapping[str, set[str]]

    @property
    def targets(self) -> list[str]:
        """The native control first, a driver's variants beside it."""
        found = {target for targets in self.measured_on.values() for target in targets}
        return sorted(found, key=lambda name: (driver_of(name) != NATIVE, name))


def union(claims: Iterable[Claim], scale: Scale, left_out: Mapping[str, str], seed: int) -> Experiments:
    """The experiments of these claims, each measured once however many tests use it, with the native control.

    Args:
        left_out: drivers and workloads that cannot be used here, with the reason; tests that need them are passed over.
    """
    wanted: dict[str, list[tuple[dict[str, object], str]]] = {}
    for claim in claims:
        for test in claim.tests:
            if all(hindrance(cell, scale, left_out) == "" for cell in test.cells):
                for cell in test.cells:
                    wanted.setdefault(cell.workload, []).append((cell.parameters(scale), cell.target))
    workloads: list[Workload] = []
    measured_on: dict[str, set[str]] = {}
    for name, uses in wanted.items():
        kind = discover()[name]
        varied = _varied(kind, [parameters for parameters, _ in uses], scale)
        for parameters, target in uses:
            values: dict[str, Any] = parameters
            work = kind(seed=seed, swept=varied, **values)
            if work.label not in measured_on:
                workloads.append(work)
            control = set() if kind.about_layers else {NATIVE}
            measured_on.setdefault(work.label, control).add(target)
    return Experiments(workloads, measured_on)


def hindrance(cell: Cell, scale: Scale, left_out: Mapping[str, str]) -> str:
    """Why a cell is not measured here; "" where it is."""
    driver = driver_of(cell.target)
    if driver in left_out:
        return f"{driver}: {left_out[driver]}"
    if cell.workload in left_out:
        return f"{cell.workload}: {left_out[cell.workload]}"
    parameters: dict[str, Any] = cell.parameters(scale)
    if parameters["size"] > scale[LARGEST]:
        return f"it takes a file of {amount(parameters['size'])}, which only a larger --profile measures"
    if misfit := discover()[cell.workload](seed=0, **parameters).misfit:
        return f"{cell.workload} with {amount(parameters['size'])}: {misfit}; a larger --size or --profile may help"
    return ""


def _varied(kind: type[Workload], used: Sequence[Mapping[str, object]], scale: Scale) -> tuple[str, ...]:
    """The parameters that have to be in the label, for no two of the variants to have one label."""
    names = [name for name in used[0] if len({str(parameters[name]) for parameters in used}) > 1]
    usual = kind.defaults()
    return tuple(
        name for name in used[0] if name in names or str(used[0][name]) != str(usual.get(name, scale["large"]))
    )
