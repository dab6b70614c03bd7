"""What stands around the benchmark: its tests for pytest, the gate's trial, and the check against fio by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs.bench import check_fio, statistics

TOP = Path(__file__).parents[1]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory on a disk, which must be empty at the end."""
    if os.geteuid() != 0:
        pytest.skip("mounts need root here")
    path = Path("/var/tmp") / f"layerfs-test-tools-{os.getpid()}"
    path.mkdir()
    yield path
    left = os.listdir(path)
    for name in left:
        subprocess.run(["rm", "-rf", "--one-file-system", path / name], check=False)
    path.rmdir()
    assert left == []


def _module(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"layerfs.bench.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# Statistics of rates


@pytest.mark.parametrize(
    ("found", "total", "low", "high"),
    [(0, 50, 0.0, 0.0711), (10, 10, 0.6915, 1.0), (5, 10, 0.1871, 0.8129), (1, 50, 0.0005, 0.1065), (0, 0, 0.0, 1.0)],
)
def test_a_rate_has_clopper_and_pearsons_interval(found: int, total: int, low: float, high: float) -> None:
    rate = statistics.proportion(found, total)
    assert [rate.low, rate.high] == pytest.approx([low, high], abs=1e-4)


# The gate's trial


def test_a_trial_finds_what_a_counter_shows_keeps_it_and_is_not_repeated(scratch: Path, tmp_path: Path) -> None:
    output = tmp_path / "trial.jsonl"
    options = ["--size=1M", "--rounds=6", "--fault-trials=1", "--quiet-trials=1", f"--scratch={scratch}"]
    first = _module("gate_trial", *options, f"--output={output}")
    assert first.returncode == 0, first.stderr
    settings, *trials = map(json.loads, output.read_text().splitlines())
    assert settings["rounds"] == 6
    found = {fault: keys for trial in trials for fault, keys in trial["found"].items()}
    assert set(found) == {
        *("unchanged", "5 % more work", "10 % more work", "20 % more work", "50 % more work"),
        *("extra sync", "lost sharing", "now and then slow", "space left", "an inode left"),
    }
    assert any("bytes when fresh" in key for key in found["lost sharing"])
    assert any("bytes left in use" in key for key in found["space left"])
    assert any("inodes left in use" in key for key in found["an inode left"])
    with open(output, "a") as torn:
        torn.write('{"faulty": tr')
    again = _module("gate_trial", *options, f"--output={output}")
    assert again.returncode == 0, again.stderr
    assert "lost sharing" in again.stdout
    assert "of 2" not in again.stderr, "nothing was left to measure"
    assert len(output.read_text().splitlines()) == 3
    before, code, after = output.read_text().rpartition(trials[0]["code"])  # of the trial without a fault
    output.write_text(f"{before}another{code[7:]}{after}")
    changed = _module("gate_trial", *options, f"--output={output}")
    assert changed.returncode == 0, changed.stderr
    assert "1 of 1" in changed.stderr, "what other code did is measured again"
    assert len(output.read_text().splitlines()) == 4
    other = _module("gate_trial", "--rounds=7", f"--output={output}", f"--scratch={scratch}")
    assert other.returncode == 2
    assert "other settings" in other.stderr


# The harness against fio


def test_the_check_against_fio_measures_both(scratch: Path) -> None:
    done = _module("check_fio", "--size=64M", "--rounds=3", f"--scratch={scratch}", "--json")
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"seqwrite-new", "seqread-lower cold", "randread", "randwrite"}
    for pair in found.values():
        assert len(pair["ours"]) == len(pair["fio"]) == 3
        assert pair["ratio"]["low"] <= pair["ratio"]["median"] <= pair["ratio"]["high"]


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, "the same"), (1.02, "the same"), (1.2, "apart"), (0.8, "apart"), (1.05, "cannot tell")],
)
def test_within_five_per_cent_is_judged_over_the_interval(factor: float, verdict: str) -> None:
    theirs = [1 + number / 1000 for number in range(20)]
    assert check_fio.Pair([factor * value for value in theirs], theirs).verdict == verdict


# For people who live in pytest


def test_the_drivers_benchmarks_are_pytest_benchmarks(scratch: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "-k", "copyup-first-write"]
    command += ["--layerfs-drivers=overlay2,vfs", "--layerfs-size=1M", "--layerfs-rounds=2"]
    done = subprocess.run(
        [*command, f"--benchmark-json={results}", f"--basetemp={tmp_path / 'pytest'}"],
        cwd=TOP,
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks = json.loads(results.read_text())["benchmarks"]
    assert {one["params"]["driver"] for one in benchmarks} == {"overlay2", "vfs"}
    assert all(one["stats"]["rounds"] == 2 for one in benchmarks)
    (overlay,) = (one for one in benchmarks if one["params"]["driver"] == "overlay2")
    assert set(overlay["extra_info"]["steps"]) >= {"open", "first write", "second write"}
    assert min(overlay["extra_info"]["counters"]["bytes copied up"]) >= 1 << 20


def test_an_unknown_driver_is_a_usage_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--layerfs-drivers=nonesuch", "-p", "no:cacheprovider"]
    command += [f"--basetemp={tmp_path / 'pytest'}"]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "nonesuch" in done.stdout + done.stderr
