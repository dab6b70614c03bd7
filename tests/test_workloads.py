"""The workloads of the benchmark: found, varied, and on what layers, in what cache state, with what they count."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from layerfs import mount_table, registry
from layerfs.bench import caches, runner, tasks, workload
from layerfs.bench.interrupts import Interrupts
from layerfs.bench.profiles import PROFILES
from layerfs.bench.scratch import Scratch, StoreTarget
from layerfs.bench.workload import Workload
from layerfs.bench.workloads.append_files import AppendMany
from layerfs.bench.workloads.cache_share import CacheShare
from layerfs.bench.workloads.knee_sweep import KneeSweep
from layerfs.bench.workloads.layer_lifecycle import LayerLifecycle
from layerfs.bench.workloads.randwrite import Randwrite
from layerfs.bench.workloads.tree_walk import TreeWalk
from layerfs.errors import InvalidArgument, LayerfsError


def test_the_workloads_are_found_and_described() -> None:
    found = workload.discover()
    assert set(found) >= {
        "append-big",
        "append-many",
        "bs-crossover",
        "cache-share",
        "change-tree",
        "copyup-crossover",
        "deep-layers",
        "frag-read",
        "knee-sweep",
        "parallel-heavy",
        "parallel-light",
        "reread",
        "start-stop-density",
        "tree-walk",
        "copyup-first-write",
        "diff-apply",
        "layer-lifecycle",
        "randread",
        "randwrite",
        "rewrite-upper",
        "seqread-lower",
        "seqwrite-new",
    }
    assert all(kind.summary for kind in found.values())


def test_a_swept_parameter_makes_one_workload_for_each_value() -> None:
    labels = [work.label for work in workload.chosen(["seqread-lower", "randread"], [1 << 20], 0)]
    assert labels == ["seqread-lower cold", "seqread-lower warm", "randread"]


def test_several_sizes_and_the_full_profile_make_more_of_them() -> None:
    works = workload.chosen(["seqread-lower"], [1 << 20, 4 << 20], 0)
    assert [work.label for work in works] == [
        "seqread-lower 1M cold",
        "seqread-lower 1M warm",
        "seqread-lower 4M cold",
        "seqread-lower 4M warm",
    ]
    assert {work.size for work in works} == {1 << 20, 4 << 20}


def test_the_usual_parameters_of_a_workload_are_those_that_it_has_where_none_is_given() -> None:
    for kind in workload.discover().values():
        assert kind.defaults() == kind(1 << 20, 0).parameters
    assert workload.discover() is workload.discover(), "looked for once"


def test_an_unknown_workload_is_named_with_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match=r"'seqwrote'.*seqwrite-new"):
        workload.chosen(["seqwrote"], [1 << 20], 0)


@pytest.mark.parametrize("access", ["read", "mmap"])
def test_readers_of_a_file_that_is_not_cold_are_not_called_cold(on_disk: Path, access: str) -> None:
    work = CacheShare(4 << 20, 0, readers=2, access=access)
    for kind, why in ((None, ""), ("tmpfs", ", not cold")):
        with Scratch(on_disk, Interrupts()) as scratch:
            target = scratch.target("native", kind, 64 << 20)
            target.build(work.base)
            with target.fresh(work.base, scratch.shared) as layer:
                assert [one.step for one in work.measure(layer)] == [f"first reader{why}", f"further reader{why}"]
                assert set(work.counters(layer)) == (set() if why else {"bytes cached"})


_ARC = """13 1 0x01 123 33456 5210 8104
name                            type data
hits                            4    7
size                            4    {size}
compressed_size                 4    99
"""


@pytest.mark.parametrize(
    ("copies", "ending"), [(1.0, ""), (4.0, ""), (0.25, ", cache unseen"), (None, ", cache unseen")]
)
def test_what_a_cache_of_its_own_grows_by_is_counted_where_files_are_not_in_the_page_cache(
    copies: float | None, ending: str, on_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ZFS in the kernel, which only a guest has: here its counters and mincore(2) are played."""
    work, arc = CacheShare(4 << 20, 0, readers=4), tmp_path / "arcstats"
    read, size = caches.read, 100 << 20

    def into_the_arc(files: Sequence[Path]) -> str:
        nonlocal size
        size += round((copies or 0) * work.base.size / work.readers) * len(files)
        arc.write_text(_ARC.format(size=size))
        return read(files)

    monkeypatch.setattr(caches, "_ARC", arc)
    monkeypatch.setattr(caches, "read", into_the_arc)
    monkeypatch.setattr(caches, "resident", lambda _file: 0.0)
    if copies is not None:
        arc.write_text(_ARC.format(size=size))
    else:
        monkeypatch.setattr(caches, "own_cache", lambda: None)
    steps, counters = _measured(work, on_disk, "native")
    assert steps == [f"first reader{ending}", f"further reader{ending}"]
    assert counters == ({} if ending else {"bytes cached": round((copies or 0) * work.base.size)})


def _measured(work: Workload, place: Path, name: str) -> tuple[list[str], dict[str, int]]:
    """The steps of one sample, and its counters."""
    with Scratch(place, Interrupts()) as scratch:
        target = scratch.target(name, None, 512 << 20)
        assert work.base is not None
        target.build(work.base)
        with target.fresh(work.base, scratch.shared) as layer:
            return [one.step for one in work.measure(layer)], work.counters(layer)


def test_readers_on_a_real_pool_are_counted_where_their_files_are_cached(on_disk: Path) -> None:
    """Through FUSE that is the page cache, a copy for each dataset; in the kernel it is the ARC."""
    probe = registry.load("zfs").probe(on_disk)
    if not probe.usable:
        pytest.skip(probe.reason)
    work = CacheShare(4 << 20, 0, readers=3)
    steps, counters = _measured(work, on_disk, "zfs")
    assert steps == ["first reader", "further reader"]
    if caches.own_cache() is None:
        assert counters == {"bytes cached": 3 * work.base.size}
    else:
        assert counters["bytes cached"] < 2 * work.base.size


@pytest.mark.parametrize(
    ("work", "done"),
    [(TreeWalk(1 << 20, 0, files=500, tasks=3), 1500), (AppendMany(1 << 20, 0, files=500, tasks=3), 500)],
)
def test_the_tasks_of_a_workload_are_processes(work: TreeWalk | AppendMany, done: int, on_disk: Path) -> None:
    """Threads would wait for each other: then all processor time that is used is this process's."""
    with Scratch(on_disk, Interrupts()) as scratch:
        target = scratch.target("native", None, 1 << 20)
        target.build(work.base)
        with target.fresh(work.base, scratch.shared) as layer:
            sizes = {path: path.stat().st_size for path in layer.path.rglob("*") if path.is_file()}
            before = time.process_time()
            timings = [timing for _ in range(5) for timing in work.measure(layer)]
            own = time.process_time() - before
            grown = [path.stat().st_size - size for path, size in sizes.items()]
    assert all(timing.operations == done for timing in timings)
    assert sum(timing.processor for timing in timings) > own
    assert len(grown) == 500
    assert set(grown) == {5 * len("one more line\n") if isinstance(work, AppendMany) else 0}


@pytest.mark.skipif(bool(KneeSweep.hindrance()), reason="takes root and memory control groups")
def test_a_size_sweep_below_a_memory_cap_has_more_than_whole_milliseconds(on_disk: Path) -> None:
    """fio tells no less, which is all the time that a file of 1M takes."""
    work = KneeSweep(1 << 20, 0)
    with Scratch(on_disk, Interrupts()) as scratch:
        target = scratch.target("native", None, 1 << 20)
        with target.fresh(None, scratch.shared) as layer:
            timings = [timing for _ in range(3) for timing in work.measure(layer)]
    assert [timing.step for timing in timings[:2]] == ["write", "read"]
    assert all(timing.bytes == 1 << 20 for timing in timings)
    assert any(timing.seconds * 1000 % 1 for timing in timings)


def test_a_task_that_fails_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(LayerfsError, match="No such file or directory"),
        tasks.ready("append", tmp_path / "missing", [["file"]]) as writers,
    ):
        writers.do("append")


@pytest.mark.skipif(os.geteuid() != 0, reason="a loop device needs root here")
@pytest.mark.parametrize(("backing", "counted"), [("ext4", True), ("dir", True), ("xfs", False)])
def test_an_inode_that_a_removed_layer_leaves_is_counted(on_disk: Path, backing: str, counted: bool) -> None:
    """Where the file system tells their number at once."""
    if not shutil.which(f"mkfs.{backing}") and backing != "dir":
        pytest.skip(f"needs mkfs.{backing}")
    work = LayerLifecycle(1 << 20, 0, repetitions=3, files=10, parent_size=40960)

    class Leaving(StoreTarget):
        def remove(self, key: str) -> None:
            super().remove(key)
            (self._store.driver.root / f"left {next(numbers)}").touch()

    numbers = itertools.count()
    found = []
    for kind in (StoreTarget, Leaving):
        with Scratch(on_disk, Interrupts(), {"vfs": kind}) as scratch:
            target = scratch.target("vfs", backing, 512 << 20)
            target.build(work.base)
            with target.fresh(work.base, scratch.shared, mounted=False) as layer:
                work.measure(layer)
                found.append(work.counters(layer).get("inodes left in use"))
    assert found == ([0, 3] if counted else [None, None])


@pytest.mark.parametrize("work", workload.chosen(["start-stop-density"], [1 << 20], 0), ids=lambda work: work.label)
def test_layers_started_one_after_the_other_and_at_once_are_each_clocked(on_disk: Path, work: Workload) -> None:
    """Where some wait for others, those are the slowest of all."""
    with Scratch(on_disk, Interrupts()) as scratch:
        target = scratch.target("vfs", None, 1 << 20)
        assert work.base
        target.build(work.base)
        with target.fresh(work.base, scratch.shared, mounted=False) as layer:
            timings = work.measure(layer)
            work.counters(layer)
    assert [(one.step, one.operations, sum(one.latencies.values())) for one in timings] == [
        ("up", 20, 20),
        ("down", 20, 20),
    ]
    assert all(max(one.latencies) <= one.seconds for one in timings)


def test_the_default_profile_starts_layers_one_after_the_other_and_at_once() -> None:
    works = workload.chosen(PROFILES["default"].workloads, [1 << 20], 0)
    tasks = [work.parameters["tasks"] for work in works if "tasks" in work.swept]
    assert tasks == [1, 8]


@pytest.mark.skipif(os.geteuid() != 0, reason="overlays are mounted, which takes root")
def test_every_workload_measures_a_union_where_the_driver_makes_one(on_disk: Path) -> None:
    """A layer without a parent would be a plain directory on overlay2, and the figures those of no driver."""
    works = workload.chosen(list(workload.discover()), [1 << 20], 1)
    with Scratch(on_disk, Interrupts()) as scratch:
        target = scratch.target("overlay2", None, 1 << 30)
        for base in {work.base.key: work.base for work in works}.values():
            target.build(base)
        for work in works:
            with target.fresh(work.base, scratch.shared) as layer:
                assert mount_table.at(layer.path)[-1].type == "overlay", work.label


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a file system, and drops all caches")
def test_what_a_daemon_has_written_is_on_the_disk_and_so_can_be_made_cold(on_disk: Path) -> None:
    """syncfs(2) on a FUSE file system reaches the daemon alone."""
    work = Randwrite(64 << 20, 1)
    with Scratch(on_disk, Interrupts()) as scratch:
        target = scratch.target("aufs", "ext4", 1 << 30)
        target.build(work.base)
        sample = runner.take_sample(work, target, 0, scratch.shared, Interrupts())
    assert sample.cache is not None
    assert sample.cache.as_asked, sample.cache
