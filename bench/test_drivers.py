"""The drivers' benchmarks as ordinary pytest-benchmark tests: ``pytest bench``, for people who live in pytest.

What is timed is a workload's ``measure`` as a whole, on a layer that is fresh for each round; the steps that it clocks
itself, and its counters, are under ``extra_info``. Workloads that run fio are left to ``layerfs bench``, for its start
would be timed too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from layerfs import registry
from layerfs.bench import runner, workload
from layerfs.bench.interrupts import Interrupts
from layerfs.bench.scratch import Scratch
from layerfs.bench.statistics import median
from layerfs.bench.target import Layer, Target
from layerfs.bench.workload import Timing, Workload
from layerfs.sizes import parse_size

_MIB = 1 << 20
WORKLOADS = (
    "append-many",
    "cache-share",
    "copyup-crossover",
    "copyup-first-write",
    "deep-layers",
    "diff-apply",
    "layer-lifecycle",
    "start-stop-density",
    "tree-walk",
)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Scratch]:
    """Below TMPDIR, else below /var/tmp, which is on a disk where /tmp may not be."""
    with Scratch(Path(os.environ.get("TMPDIR", "/var/tmp")), Interrupts()) as made:  # noqa: S108
        yield made


@pytest.fixture(scope="module")
def target(driver: str, scratch: Scratch, request: pytest.FixtureRequest) -> Target:
    """One store for each driver."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root; `layerfs unshare -- pytest bench` makes one of a namespace")
    probe = registry.load(driver).probe(scratch.root)
    if not probe.usable:
        pytest.skip(f"{driver}: {probe.reason}; {probe.remedy}")
    size = parse_size(request.config.getoption("--layerfs-size"))
    room = 64 * size + 2048 * _MIB  # for sparse files: only what is written takes space
    if shutil.disk_usage(scratch.root).free < 16 * size + 512 * _MIB:
        pytest.skip(f"{scratch.root} has not enough free space for files of {size} bytes")
    return scratch.target(driver, None, room)


@pytest.fixture(scope="module")
def built() -> set[tuple[str, str]]:
    """Targets, and the keys of the committed layers that they have."""
    return set()


@pytest.mark.parametrize("name", WORKLOADS)
def test_driver(
    name: str,
    target: Target,
    scratch: Scratch,
    built: set[tuple[str, str]],
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
) -> None:
    size = parse_size(request.config.getoption("--layerfs-size"))
    misfits: list[str] = []
    works = workload.chosen([name], [size], seed=1, left_out=lambda work: misfits.append(work.misfit))
    if not works:
        pytest.skip(misfits[0])
    work = works[0]
    _build(work, target, scratch, built)
    samples: list[list[Timing]] = []
    counters: list[dict[str, int]] = []
    held = ExitStack()

    def set_up() -> tuple[tuple[Layer], dict[str, object]]:
        layer = held.enter_context(target.fresh(work.base, scratch.shared, mounted=work.mounted))
        held.callback(work.tear_down, layer)
        work.set_up(layer)
        runner.settle(work, layer)
        return (layer,), {}

    def measure(layer: Layer) -> None:
        samples.append(list(work.measure(layer)))

    def tear_down(layer: Layer) -> None:
        counters.append(work.counters(layer))
        held.close()

    benchmark.group = work.label
    rounds = request.config.getoption("--layerfs-rounds")
    with held:
        benchmark.pedantic(measure, setup=set_up, teardown=tear_down, rounds=rounds)  # type: ignore[no-untyped-call]
    benchmark.extra_info["steps"] = {
        timing.step: median([sample[number].seconds for sample in samples]).middle
        for number, timing in enumerate(samples[0])
    }
    benchmark.extra_info["counters"] = {key: [found[key] for found in counters] for key in counters[0]}
    assert all(timing.seconds > 0 for sample in samples for timing in sample)


def _build(work: Workload, target: Target, scratch: Scratch, built: set[tuple[str, str]]) -> None:
    """What the samples stand on, where an earlier test has not made it already."""
    work.prepare(scratch.shared)
    if (target.name, work.base.key) not in built:
        target.build(work.base)
        built.add((target.name, work.base.key))
