"""What run files say of the cells of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerfs.bench import recorded
from layerfs.bench.claims.catalogue import SECONDS, SPEED, Cell, Scale


@dataclass(frozen=True)
class Evidence:
    """One run.

    Attributes:
        name: of its file.
        scale: by which the experiments' parameters have to be read.
        left_out: drivers and workloads that could not be used, with the reason.
    """

    name: str
    scale: Scale
    fingerprint: Mapping[str, Any]
    started: str
    benchmarks: Sequence[Mapping[str, Any]]
    failures: Sequence[Mapping[str, str]]
    left_out: Mapping[str, str]

    def samples(self, cell: Cell) -> list[float] | None:
        """The cell's figure of every sample; None where the run does not have it."""
        if cell.figure not in (SECONDS, SPEED):
            for benchmark in self._matching(cell):
                values = benchmark["extra_info"]["counters"].get(cell.figure)
                if values:
                    return [float(value) for value in values]
            return None
        by_step = {benchmark["extra_info"]["step"]: benchmark for benchmark in self._matching(cell)}
        if not set(cell.steps) <= set(by_step):
            return None
        steps = [by_step[step] for step in cell.steps]
        seconds = [sum(parts) for parts in zip(*(step["stats"]["data"] for step in steps), strict=True)]
        if cell.figure == SECONDS:
            return seconds
        extra = steps[0]["extra_info"]
        work = [count or size for count, size in zip(extra["operations"], extra["bytes"], strict=True)]
        return [amount / time for amount, time in zip(work, seconds, strict=True)] if all(work) else None

    def fact(self, target: str, path: Sequence[str]) -> str:
        """What the fingerprint says of a target; "" where it says nothing."""
        found: Any = self.fingerprint.get("targets", {}).get(target, {})
        for name in path:
            found = found.get(name, {})
        return str(found or "")

    def failure(self, cell: Cell) -> str:
        """Why the cell could not be measured; "" where nothing is known of that."""
        for failure in self.failures:
            if failure["target"] == cell.target and failure["workload"].partition(" ")[0] in ("", cell.workload):
                return failure["reason"]
        return ""

    def _matching(self, cell: Cell) -> list[Mapping[str, Any]]:
        # A parameter that is younger than the file is taken to have had its default then.
        wanted, usual = cell.parameters(self.scale), cell.defaults
        return [
            benchmark
            for benchmark in self.benchmarks
            if benchmark["extra_info"]["workload"] == cell.workload
            and benchmark["extra_info"]["target"] == cell.target
            and all(benchmark["params"].get(name, usual.get(name)) == value for name, value in wanted.items())
        ]


def read(file: Path, scale: Scale) -> Evidence:
    """Read a run file. Raises `InvalidArgument` where it is none.

    Args:
        scale: for a run that knows of none, with its own size as ``large``.
    """
    return parse(recorded.document(file), str(file), scale)


def parse(document: Any, name: str, scale: Scale) -> Evidence:
    """The same from the document itself."""
    recorded.parse(document, name)
    try:
        own = document["layerfs"]
        claims = own.get("claims", {"scale": {**scale, "large": own["size"]}, "left_out": {}})
        return Evidence(
            name,
            {str(unit): int(value) for unit, value in claims["scale"].items()},
            own["fingerprint"],
            document["datetime"],
            document["benchmarks"],
            own.get("failures", []),
            dict(claims["left_out"]),
        )
    except recorded.NOT_A_RUN as error:
        raise recorded.no_run(name, error) from error
