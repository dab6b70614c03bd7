"""The benchmark's parts beside the workloads: statistics, caches, content, signals, fio, the run file, the table."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import statistics as plain
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from layerfs.bench import caches, content, fingerprint, fio, runfile, statistics, table
from layerfs.bench import plain as plain_io
from layerfs.bench.caches import CacheState, Reached
from layerfs.bench.crowd import at_once
from layerfs.bench.interrupts import Interrupts
from layerfs.bench.on_lower import OnAnyParent
from layerfs.bench.results import Run, Sample, split
from layerfs.bench.scratch import Scratch
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing
from layerfs.errors import LayerfsError, NotFound

# Statistics


def test_the_interval_of_the_median_covers_the_truth_about_as_often_as_it_says() -> None:
    source = random.Random(1)
    hits = 0
    for _ in range(40):
        interval = statistics.median([source.gauss(100, 5) for _ in range(20)])
        hits += interval.low <= 100 <= interval.high
    assert hits >= 32


def test_the_median_of_one_sample_is_that_sample() -> None:
    assert statistics.median([3.0]) == statistics.Interval(3.0, 3.0, 3.0)
    shown = {statistics.Interval(*bounds).words for bounds in ((3, 3, 3), (2, 3, 4), (0, 1, 2), (0, 1, 30))}
    assert shown == {"±?", "±33%", "±100%", "±>100%"}


def test_a_ratio_of_clearly_different_samples_excludes_one() -> None:
    found = statistics.ratio([20.0, 21.0, 19.0, 20.5, 20.0], [10.0, 10.5, 9.5, 10.0, 10.2])
    assert found.low > 1.5
    assert found.middle == 2.0
    assert found.low <= found.middle <= found.high


def test_a_ratio_of_like_samples_includes_one() -> None:
    source = random.Random(2)
    first, second = ([source.gauss(10, 2) for _ in range(8)] for _ in range(2))
    found = statistics.ratio(first, second)
    assert found.low < 1 < found.high


def test_the_probability_of_one_source_is_small_only_for_different_samples() -> None:
    source = random.Random(3)
    assert statistics.difference([20.0, 21.0, 19.0, 20.5, 22.0], [10.0, 10.5, 9.5, 10.0, 10.2]) < 0.01
    assert statistics.difference([5.0] * 6, [5.0] * 6) == 1.0, "ties say nothing"
    assert statistics.difference([2.0] * 8, [1.0] * 8) == pytest.approx(statistics.smallest_chance(8, 8))
    assert statistics.difference([1, 2], [2, 3, 4]) == pytest.approx(0.3), "1 with either 2, or 3 with 4: three of ten"
    found = [
        statistics.difference([source.gauss(10, 1) for _ in range(8)], [source.gauss(10, 1) for _ in range(8)])
        for _ in range(60)
    ]
    assert sum(p < 0.05 for p in found) <= 8, "identical sources are told apart about as often as it says"


@pytest.mark.parametrize("digits", [9, 1], ids=["no ties", "ties"])
def test_of_many_samples_not_every_way_is_counted_and_the_probability_is_the_same(
    monkeypatch: pytest.MonkeyPatch, digits: int
) -> None:
    source = random.Random(4)
    first, second = ([round(source.gauss(middle, 1), digits) for _ in range(n)] for middle, n in ((10.5, 40), (10, 61)))
    with monkeypatch.context() as patched:
        patched.setattr(statistics, "EXACT", 101)
        exact = statistics.difference(first, second)
    monkeypatch.setattr(statistics, "_ways", None)
    assert statistics.difference(first, second) == pytest.approx(exact, rel=0.05)
    assert 1e-6 < exact < 0.5
    assert statistics.difference([1.0] * 50, [1.0] * 60) == 1.0
    assert statistics.difference([2.0] * 50, [1.0] * 60) < 1e-12


def test_percentiles_are_of_operations_not_of_bins() -> None:
    latencies = {1.0: 98, 5.0: 1, 9.0: 1}
    assert statistics.percentile(latencies, 0.5) == 1.0
    assert statistics.percentile(latencies, 0.99) == 5.0
    assert statistics.percentile(latencies, 1.0) == 9.0


def test_the_slowest_part_is_of_operations_not_of_bins() -> None:
    latencies = {1.0: 17, 5.0: 2, 9.0: 1}
    assert statistics.slowest(latencies, 0.1) == 7.0
    assert statistics.slowest(latencies, 0.01) == 9.0
    assert statistics.slowest(latencies, 1) == pytest.approx(1.8)


# Caches


def test_cold_and_warm_are_what_they_say(on_disk: Path) -> None:
    file = on_disk / "data"
    content.write_random(file, 4 << 20, 1)
    warm = caches.establish(CacheState.WARM, file)
    assert warm.as_asked
    assert warm.resident == 1.0
    cold = caches.establish(CacheState.COLD, file)
    assert cold.as_asked
    assert cold.resident == 0.0
    os.close(os.open(file, os.O_RDONLY))
    assert caches.resident(file) == 0.0, "opening alone reads nothing"


def test_part_of_a_file_in_the_cache_is_seen_as_part(on_disk: Path) -> None:
    file = on_disk / "data"
    content.write_random(file, 8 << 20, 1)
    caches.establish(CacheState.COLD, file)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(descriptor, 4 << 20, 0)
    finally:
        os.close(descriptor)
    assert 0.45 < caches.resident(file) < 0.6


def test_a_state_that_was_not_reached_is_not_called_reached() -> None:
    assert not Reached(CacheState.COLD, "fadvise", 0.5).as_asked
    assert not Reached(CacheState.WARM, "read", 0.5).as_asked


def test_an_empty_file_is_not_resident(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert caches.resident(tmp_path / "empty") == 0.0


# Content


def test_random_content_depends_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        content.write_random(tmp_path / name, (1 << 20) + 17, seed)
    first, second, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second != other
    assert len(first) == (1 << 20) + 17


def test_the_tar_and_the_tree_hold_the_same_files(tmp_path: Path) -> None:
    content.write_tar(tmp_path / "tar", 50, 1 << 20, 3)
    root = tmp_path / "root"
    root.mkdir()
    content.small_files(50, 1 << 20, 3).fill(root)
    with tarfile.open(tmp_path / "tar") as tar:
        held = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
        assert len(held) == 50
        assert {name: file.read() for name, file in held.items() if file} == {
            str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.dat")
        }
    assert sum(path.stat().st_size for path in root.rglob("*.dat")) == pytest.approx(1 << 20, rel=0.01)


def test_every_layer_of_a_deep_base_is_part_of_every_directory(on_disk: Path) -> None:
    base = content.deepened(content.even_files(101, 512, 1), 3)
    with Scratch(on_disk, Interrupts()) as scratch:
        target = scratch.target("vfs", None, 1 << 20)
        target.build(base)
        with target.fresh(base, scratch.shared) as layer:
            for directory in (".", "even", "even/0000", "even/0001"):
                held = {path.name for path in (layer.path / directory).iterdir() if path.is_file()}
                assert held >= {"layer-2", "layer-3"}, directory


# Interrupts


def test_a_signal_is_raised_where_it_is_allowed() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts, interrupts.allowed():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_held_operation_is_let_finish() -> None:
    done = []

    def operate() -> None:
        with Interrupts() as interrupts, interrupts.allowed():
            with interrupts.held():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("operation")
            done.append("never")

    with pytest.raises(KeyboardInterrupt):
        operate()
    assert done == ["operation"]


def test_a_signal_outside_of_what_is_allowed_waits() -> None:
    done = []

    def operate() -> None:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            done.append("this")
            with interrupts.allowed():
                done.append("never")

    with pytest.raises(KeyboardInterrupt):
        operate()
    assert done == ["this"]


def test_a_second_signal_does_not_disturb_the_cleaning_up() -> None:
    done = []

    def operate() -> None:
        with Interrupts() as interrupts, interrupts.allowed():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                with interrupts.held():
                    done.append("cleaned")
                done.append("all")

    with pytest.raises(KeyboardInterrupt):
        operate()
    assert done == ["cleaned", "all"]


def test_a_signal_at_the_very_end_is_not_lost_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


# fio


def test_a_job_writes_what_it_was_told_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "with: colon"
    done = fio.run(file, "write", 1 << 16, 4 << 20, seed=5, end_fsync=1)
    assert (done.bytes, done.operations) == (4 << 20, 64)
    assert file.stat().st_size == 4 << 20
    assert done.seconds > 0
    assert sum(done.latencies.values()) == 64


@pytest.mark.parametrize(
    ("runtime", "latency", "seconds"),
    [(2, 20_000, 0.00128), (71, 475_674, 0.070), (2, 125_000, 0.002), (0, 10_000, 0.00064), (1, 0, 0.001)],
)
def test_the_time_of_a_job_is_that_of_its_operations_where_the_milliseconds_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: int, latency: int, seconds: float
) -> None:
    """A final fsync is no operation; several jobs at once have more of them than time."""
    latencies = {"mean": latency, "N": 64}
    done = {"io_bytes": 64, "total_ios": 64, "runtime": runtime, "lat_ns": latencies, "clat_ns": {"bins": {}}}
    job = {"read": done, "usr_cpu": 0, "sys_cpu": 0, "job_runtime": 1}
    program = tmp_path / "fio"
    program.write_text(f"#!/bin/sh\necho '{json.dumps({'jobs': [job]})}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert fio.run(tmp_path / "file", "read", 1, 64, seed=1).seconds == pytest.approx(seconds, abs=1e-9, rel=1e-4)


def test_no_block_that_fio_writes_is_like_another(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fio.run(tmp_path / name, "write", 1 << 16, 1 << 20, seed=seed)
    blocks = [block for name in "abc" for block in _blocks((tmp_path / name).read_bytes())]
    assert len(set(blocks)) == len(blocks) == 3 * 256
    assert len(zlib.compress(b"".join(blocks[:16]))) > 0.95 * 16 * 4096  # the time has zeros


@pytest.mark.parametrize("mode", ["write", "randwrite"])
@pytest.mark.parametrize("block", [4096, 3 * 4096, 1 << 20])
def test_no_block_that_is_written_from_here_is_like_another(tmp_path: Path, mode: str, block: int) -> None:
    """Neither in the file, nor in another one, nor in what is written over, nor in a base of the same seed."""
    size, files = (2 << 20) + 4096, [tmp_path / name for name in ("a", "b")]
    base = tmp_path / "base"
    content.write_random(base, size, 1)
    held = set(_blocks(base.read_bytes()))
    for seed in (1, 2):
        plain_io.run("write", files, plain_io.Job("write", block, size, seed, new=True))
        for file in files:
            before = set(_blocks(file.read_bytes()))
            assert len(before) == size // 4096
            assert held.isdisjoint(before)
            assert len(zlib.compress(file.read_bytes(), 1)) > 0.99 * size
            held |= before
    plain_io.run("write", files, plain_io.Job(mode, block, size, 3))
    for file in files:
        after = set(_blocks(file.read_bytes()))
        assert len(after) == size // 4096
        assert len(after - held) >= size // block * block // 4096
        held |= after


def _blocks(data: bytes) -> list[bytes]:
    return [data[offset : offset + 4096] for offset in range(0, len(data), 4096)]


def test_nothing_is_allocated_ahead_and_no_file_made_where_one_is_needed(tmp_path: Path) -> None:
    with pytest.raises(LayerfsError, match="fio"):
        fio.run(tmp_path / "missing", "randwrite", 4096, 1 << 20, seed=1, overwrite=1, allow_file_create=0)


def test_an_interrupted_job_takes_fio_with_it(tmp_path: Path) -> None:
    file = tmp_path / "endless"
    timer = threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts, interrupts.allowed():
        fio.run(file, "randread", 4096, 1 << 20, seed=1, time_based=1, runtime=60)
    timer.join()
    holding = [
        pid for pid in os.listdir("/proc") if pid.isdigit() and str(file).encode() in _command_line(Path("/proc", pid))
    ]
    assert holding == []


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


# The run file and the table


@dataclass(frozen=True)
class _Work(OnAnyParent):
    name = "work"
    summary = "a test's own"
    block: int = 4096

    def measure(self, layer: Layer) -> list[Timing]:
        raise NotImplementedError


def _run() -> Run:
    work = _Work(1 << 20, 0)
    samples = [
        Sample(
            target,
            work,
            number,
            [
                Timing("whole", factor * (1 + number / 100), bytes=1 << 20),
                Timing("random", factor / 2, operations=100, latencies={0.001: 99, 0.5: 1}),
                Timing("open", factor / 1000),
            ],
            {"bytes copied up": 4096 * (1 + (target == "slow"))},
            Reached(CacheState.COLD, "drop_caches", 0.0),
        )
        for target, factor in (("fast", 0.1), ("slow", 0.3))
        for number in range(5)
    ]
    return Run(datetime(2026, 1, 31, tzinfo=UTC), 1 << 30, 7, ["fast", "slow"], samples, {"kernel": "x"}, ["beware"])


def test_a_sample_whose_steps_have_other_names_is_a_series_of_its_own() -> None:
    work = _Work(1 << 20, 0)
    steps = ["read", "read, not cold", "read"]
    samples = [
        Sample("fast", work, number, [Timing(step, number + 1.0), Timing("close", 1.0)], counters, None)
        for number, step in enumerate(steps)
        for counters in [{} if "not" in step else {"bytes": number}]
    ]
    found = {series.step: series for series in split(samples)}
    assert {step: series.seconds for step, series in found.items()} == {
        "read": [1.0, 3.0],
        "read, not cold": [2.0],
        "close": [1.0, 1.0, 1.0],
    }
    assert found["close"].counters == found["read"].counters == {"bytes": [0, 2]}
    assert found["read, not cold"].counters == {}


def test_pytest_benchmark_opens_a_run_file_and_sets_the_drivers_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    runfile.write(runfile.document(_run()), file)
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(file), "--columns=min,median,iqr,outliers,ops"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "work: whole" in done.stdout
    assert "work[fast] whole" in done.stdout
    assert "work[slow] whole" in done.stdout


def test_the_run_file_has_the_fields_of_pytest_benchmark_and_all_raw_samples(tmp_path: Path) -> None:
    from pytest_benchmark.stats import Stats

    file = tmp_path / "run.json"
    runfile.write(runfile.document(_run()), file)
    contents = json.loads(file.read_text())
    assert set(contents) >= {"machine_info", "commit_info", "benchmarks", "datetime", "version"}
    first = contents["benchmarks"][0]
    assert set(first) == {"group", "name", "fullname", "params", "param", "extra_info", "options", "stats"}
    assert set(first["stats"]) == {*Stats.fields, "data", "iterations"}
    assert first["stats"]["data"] == pytest.approx([0.1, 0.101, 0.102, 0.103, 0.104])
    assert first["stats"]["median"] == plain.median(first["stats"]["data"])
    assert first["extra_info"]["counters"] == {"bytes copied up": [4096] * 5}
    assert first["extra_info"]["cache"][0]["asked"] == "cold"
    assert contents["layerfs"]["seed"] == 7
    assert set(contents["commit_info"]) >= {"id", "time", "author_time", "dirty", "project", "branch"}


def test_a_run_file_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LayerfsError, match=r"run\.json"):
        runfile.write({}, tmp_path / "file" / "run.json")


def test_the_table_has_units_spread_and_comparison() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table.render(_run()))
    text = console.export_text()
    assert "10.3 MB/s ±" in text
    assert "1,000 op/s" in text or "2,000 op/s" in text
    assert "100 μs" in text
    assert "0.33 x" in text
    assert "bytes copied up" in text
    assert "p99 1.00 ms" in text


def test_the_table_does_not_round_what_happens_seldom_to_none() -> None:
    work, seldom = _Work(1 << 20, 0), Timing("build", 2.5, operations=1)
    samples = [Sample("fast", work, number, [seldom], {}, None) for number in range(5)]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table.render(Run(datetime(2026, 1, 31, tzinfo=UTC), 1 << 30, 7, ["fast"], samples, {}, [])))
    assert "0.4 op/s" in console.export_text()


# The fingerprint


def test_the_fingerprint_says_what_figures_depend_on(tmp_path: Path) -> None:
    facts = fingerprint.take(tmp_path, {"overlay2": {"driver": "overlay2"}})
    assert json.loads(json.dumps(facts)) == facts
    assert facts["storage"]["filesystem"]  # type: ignore[index]
    assert facts["vm"]["dirty_ratio"].isdigit()  # type: ignore[index]
    assert facts["memory"]["total"] > 1 << 20  # type: ignore[index]


# Many at a time


@pytest.mark.parametrize("tasks", [1, 3])
def test_a_crowd_does_all_and_no_more_at_a_time_than_it_may(tasks: int) -> None:
    busy, most, done = 0, 0, set()
    lock = threading.Lock()

    def work(item: int) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.01)
        with lock:
            busy -= 1
            done.add(item)

    at_once(work, range(12), tasks)
    assert (done, busy, most) == (set(range(12)), 0, tasks)


def test_what_fails_in_a_crowd_is_raised_as_it_is_and_nothing_more_is_begun() -> None:
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        raise NotFound(f"no layer {item}")

    with pytest.raises(NotFound, match="no layer"):
        at_once(work, range(50), 1)
    assert len(begun) < 50
