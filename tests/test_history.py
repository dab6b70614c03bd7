"""The course of figures over many runs: where a level changes, and where nothing does."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from layerfs.bench import runfile
from layerfs.bench.changepoints import change_points
from layerfs.bench.history import sparkline
from layerfs.bench.results import Run, Sample
from layerfs.bench.workload import Timing, discover

_BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def _noisy(*levels: tuple[int, float], seed: int = 1) -> list[float]:
    source = random.Random(seed)
    return [source.gauss(level, 0.05) for number, level in levels for _ in range(number)]


# Change points


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([(10, 1.0), (10, 2.0)], [10]),
        ([(12, 1.0), (5, 1.5)], [12]),
        ([(8, 1.0), (8, 2.0), (8, 1.0)], [8, 16]),
        ([(20, 1.0)], []),
        ([(3, 1.0), (1, 9.0), (6, 1.0)], []),
    ],
)
def test_levels_are_found_where_they_begin(levels: list[tuple[int, float]], expected: list[int]) -> None:
    assert change_points(_noisy(*levels)) == expected


def test_noise_alone_seldom_looks_like_a_change() -> None:
    """At a level of 1 %: 100 courses give one on average, and more than 5 once in two thousand times."""
    alarms = sum(bool(change_points(_noisy((12, 1.0), seed=seed))) for seed in range(100))
    assert alarms <= 5


def test_few_or_equal_values_have_no_change() -> None:
    for values in ([], [1.0], [1.0, 2.0], [1.0, 1.0, 2.0, 2.0], [3.0] * 30):
        assert change_points(values) == []


def test_an_answer_does_not_change() -> None:
    values = _noisy((9, 1.0), (9, 1.06))
    assert change_points(values) == change_points(values)


def test_a_sparkline_has_a_bar_for_each_value() -> None:
    assert sparkline([1.0, 2.0, 1.5]) == "▁█▅"
    assert sparkline([2.0, 2.0]) == "▁▁"


# The command


def _write(folder: Path, number: int, seconds: float, kernel: str = "6.1") -> None:
    work = discover()["copyup-first-write"](1 << 20, 0)
    source = random.Random(number)
    samples = [
        Sample(target, work, n, [Timing("open", value * source.gauss(1, 0.03))], {}, None)
        for target, value in (("overlay2", seconds), ("vfs", 0.1))
        for n in range(5)
    ]
    targets = {target: {"backing": {"filesystem": "ext4"}} for target in ("overlay2", "vfs")}
    facts = {"machine": {"processor": "x", "kernel": kernel}, "targets": targets}
    run = Run(_BEGIN + timedelta(days=number), 1 << 20, 7, list(targets), samples, facts, [])
    runfile.write(runfile.document(run), folder / f"{number:02}.json")


def _history(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "layerfs.cli", "history", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    for number in range(12):
        _write(folder, number, 0.1 if number < 7 else 0.2)
    return folder


def test_a_slower_version_is_dated_and_other_drivers_are_not_blamed(results: Path) -> None:
    done = _history("--results", results, "--json")
    assert done.returncode == 0, done.stderr
    (machine,) = json.loads(done.stdout)
    changes = {course["target"]: course["changes"] for course in machine["courses"]}
    assert changes["vfs"] == []
    (change,) = changes["overlay2"]
    assert change["run"] == "07.json"
    assert change["ratio"] == pytest.approx(2, rel=0.1)
    shown = _history("copyup-first-write", "--results", results, "--driver", "overlay2")
    assert shown.returncode == 0
    assert "2026-01-08" in shown.stdout
    assert "vfs" not in shown.stdout


def test_runs_of_another_machine_are_no_part_of_the_course(results: Path) -> None:
    for number in range(12, 24):
        _write(results, number, 0.4, kernel="6.18")
    machines = json.loads(_history("--results", results, "--driver", "overlay2", "--json").stdout)
    assert [len(course["points"]) for machine in machines for course in machine["courses"]] == [12, 12]
    assert [len(course["changes"]) for machine in machines for course in machine["courses"]] == [1, 0]


def test_what_is_no_run_file_is_passed_over_and_said(results: Path) -> None:
    (results / "verdicts.json").write_text('{"layerfs_claims": 1}')  # is known, and belongs there
    (results / "other.json").write_text("{}")
    done = _history("--results", results)
    assert done.returncode == 0
    assert "other.json" in done.stderr
    assert "verdicts.json" not in done.stderr


def test_nothing_to_show_is_a_sentence(results: Path, tmp_path: Path) -> None:
    for arguments in (["--results", tmp_path / "none"], ["nonesuch", "--results", results]):
        done = _history(*arguments)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
