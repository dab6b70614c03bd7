"""How often the gate finds a slowdown that is known, and how often it cries wolf.

``python -m layerfs.bench.gate_trial``: each trial measures one driver three times in the same blocks: as the base, once
more for the calibration, and changed by a fault. The gate judges the changed one; whether the fault is among its
findings is counted. The fault "none" counts false alarms, over every figure of the run.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import click

from layerfs.bench import calibration, recorded, runfile, runner, workload
from layerfs.bench.caches import write_back
from layerfs.bench.compare import compare
from layerfs.bench.content import Base
from layerfs.bench.interrupts import Interrupts
from layerfs.bench.recorded import Recorded
from layerfs.bench.scratch import StoreTarget
from layerfs.bench.target_name import AGAIN
from layerfs.kernel import userns
from layerfs.sizes import parse_size

_CHANGED = " changed"


class MoreWork(StoreTarget):
    """Applying a diff and making a layer do so much more work, as a part of what they did."""

    part = 0.0

    def create(self, key: str, base: Base | None) -> None:
        with self._more():
            super().create(key, base)

    def apply(self, key: str, diff: BinaryIO) -> int:
        with self._more():
            return super().apply(key, diff)

    def _more(self) -> _Repeated:
        return _Repeated(self.part)


class _Repeated:
    """Goes on computing for a part of the processor time, and waiting for a part of the rest, that its body took."""

    def __init__(self, part: float) -> None:
        self._part = part

    def __enter__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        wall, processor = time.perf_counter() - self._wall, time.process_time() - self._processor
        until = time.process_time() + processor * self._part
        while time.process_time() < until:
            pass
        time.sleep(max(0.0, wall - processor) * self._part)


class ExtraSync(StoreTarget):
    """Making a layer has everything on the disk."""

    def create(self, key: str, base: Base | None) -> None:
        super().create(key, base)
        write_back(self._store.driver.root)


class LostSharing(StoreTarget):
    """A fresh layer's files have blocks of their own, as after a lost reflink or a copy-up that comes too early."""

    def mount(self, key: str) -> Path:
        tree = super().mount(key)
        for file in tree.rglob("*.dat"):
            file.write_bytes(file.read_bytes())
        return tree


def _more(part: float) -> type[StoreTarget]:
    return type(f"More{part:.0%}", (MoreWork,), {"part": part})


@dataclass(frozen=True)
class Fault:
    """A known slowdown, and by which findings it counts as found.

    Attributes:
        target: what the changed driver is measured as.
        finds: whether a finding of this workload and step or counter is the fault's.
    """

    target: type[StoreTarget]
    finds: Callable[[str, str], bool]


def _slower_path(label: str, step: str) -> bool:
    return (label.split(maxsplit=1)[0], step.removesuffix(calibration.PROCESSOR)) in (
        ("layer-lifecycle", "create"),
        ("diff-apply", "apply"),
        ("copyup-first-write", "make the layer"),
    )


FAULTS: Mapping[str, Fault] = {
    "none": Fault(StoreTarget, lambda _label, _step: True),
    "5 % more work": Fault(_more(0.05), _slower_path),
    "10 % more work": Fault(_more(0.10), _slower_path),
    "20 % more work": Fault(_more(0.20), _slower_path),
    "50 % more work": Fault(_more(0.50), _slower_path),
    "extra sync": Fault(ExtraSync, _slower_path),
    "lost sharing": Fault(LostSharing, lambda _label, counter: "bytes" in counter),
}


@click.command()
@click.option("--driver", default="overlay2", show_default=True)
@click.option("--size", default="4M", show_default=True)
@click.option("--workload", "names", multiple=True, default=("copyup-first-write", "diff-apply", "layer-lifecycle"))
@click.option("--rounds", default=15, show_default=True, help="Samples of each side in a trial.")
@click.option("--trials", default=10, show_default=True, help="Of each fault.")
@click.option("--fault", "faults", multiple=True, type=click.Choice(list(FAULTS)), default=tuple(FAULTS))
@click.option("--scratch", type=click.Path(path_type=Path), default=Path("/var/tmp"))  # noqa: S108
@click.option("--output", type=click.Path(path_type=Path), help="JSON with every finding.")
def main(
    driver: str,
    size: str,
    names: tuple[str, ...],
    rounds: int,
    trials: int,
    faults: tuple[str, ...],
    scratch: Path,
    output: Path | None,
) -> None:
    """Count detections of known slowdowns and false alarms."""
    userns.enter()
    results: dict[str, list[list[str]]] = {fault: [] for fault in faults}
    with Interrupts() as interrupts, tempfile.TemporaryDirectory(prefix="layerfs-trial-", dir=scratch) as place:
        for number in range(trials):
            for name in faults:
                plan = runner.Plan(
                    targets=[driver, driver + AGAIN, driver + _CHANGED],
                    workloads=workload.chosen(names, [parse_size(size)], number),
                    size=parse_size(size),
                    rounds=rounds,
                    seed=number,
                    place=Path(place),
                )
                found = _findings(plan, FAULTS[name], interrupts)
                results[name].append(found)
                click.echo(f"trial {number + 1}, {name}: {', '.join(found) or 'nothing'}", err=True)
                if output:
                    output.write_text(json.dumps(results, indent=1) + "\n")
    for name, every in results.items():
        click.echo(f"{name:16} {'false alarms' if name == 'none' else 'found':12} {sum(map(bool, every))} of {trials}")


def _findings(plan: runner.Plan, fault: Fault, interrupts: Interrupts) -> list[str]:
    driver = plan.targets[0]
    run = runner.run(plan, interrupts, kinds={driver + _CHANGED: fault.target})
    whole = recorded.parse(runfile.document(run), "trial")
    base, head = whole.only(driver, driver), whole.only(driver + _CHANGED, driver)
    comparison = compare(_anywhere(base), _anywhere(head), base.thresholds)
    return [str(c.key) for c in comparison.regressions if fault.finds(c.key[0], c.key[1])]


def _anywhere(side: Recorded) -> Recorded:
    """Both stand on one machine."""
    return Recorded(side.name, {}, side.seconds, side.counters)


if __name__ == "__main__":
    main()
