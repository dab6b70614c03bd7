"""Advice: that it follows from the figures of a run, says what it lacks, and what drivers cannot do."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from layerfs.bench import runfile, statistics
from layerfs.bench.advise import needs
from layerfs.bench.results import Run, Sample
from layerfs.bench.workload import Timing, discover

_ADVISE = [sys.executable, "-m", "layerfs.cli", "advise"]
_STEADY = (1.0, 1.01, 0.99, 1.02, 0.98)
_CAN = {"overlay2": ["ROOTLESS", "SHARED_CACHE"], "vfs": ["ROOTLESS"], "btrfs": ["BLOCK_COW", "SIZE_LIMIT"]}


def _write(
    file: Path,
    medians: Mapping[str, Mapping[str, float]],
    day: int = 1,
    spread: Sequence[float] = _STEADY,
    parameters: Mapping[str, int] = MappingProxyType({}),
) -> Path:
    """A run file with these medians of workload and driver, the same for every step and counter that needs ask for.

    Args:
        parameters: of the workloads, where not the usual ones.
    """
    samples = []
    for name, drivers in medians.items():
        figures = [figure for need in needs.load() for figure in need.figures if figure.workload == name]
        steps = list(dict.fromkeys(step for figure in figures for step in figure.steps)) or ["read"]
        for driver, middle in drivers.items():
            for number, factor in enumerate(spread):
                counters = {figure.counter: round(middle * 1e6) for figure in figures if figure.counter}
                work = discover()[name](1 << 20, 0, **parameters)  # type: ignore[arg-type]
                timings = [Timing(step, middle * factor) for step in steps]
                samples.append(Sample(driver, work, number, timings, counters, None))
    targets = sorted({sample.target for sample in samples})
    facts = {driver: {"capabilities": _CAN.get(driver, []), "backing": {}} for driver in targets}
    moment = datetime(2026, 1, day, tzinfo=UTC)
    run = Run(moment, 1 << 20, 7, targets, samples, {"machine": {}, "targets": facts}, [])
    runfile.write(runfile.document(run), file)
    return file


def _advise(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_ADVISE, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd, stdin=subprocess.DEVNULL
    )


def _answer(*arguments: object, cwd: Path | None = None) -> dict[str, Any]:
    done = _advise(*arguments, "--elsewhere", "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_advice_depends_on_the_work_and_has_the_cost_of_another_choice(tmp_path: Path) -> None:
    file = _write(
        tmp_path / "run.json",
        {
            "copyup-first-write": {"btrfs": 0.1, "overlay2": 1.0, "vfs": 0.4},
            "randwrite": {"btrfs": 0.4, "overlay2": 0.4, "vfs": 0.4},
            "build-steps": {"btrfs": 3.0, "overlay2": 1.0, "vfs": 9.0},
            "diff-apply": {"btrfs": 1.0, "overlay2": 1.0, "vfs": 1.0},
        },
    )
    large = _answer("--large-files", file)
    assert large["driver"] == "btrfs"
    assert [entry["driver"] for entry in large["ranking"]] == ["btrfs", "vfs", "overlay2"]
    assert large["ranking"][2]["ratio"] == pytest.approx(10**0.5)
    assert large["ranking"][2]["low"] <= 10**0.5 <= large["ranking"][2]["high"]
    assert large["equally_good"] == []
    assert large["not_measured"] == []
    builds = _answer("--builds", file)
    assert [entry["driver"] for entry in builds["ranking"]] == ["overlay2", "btrfs", "vfs"]
    assert builds["ranking"][-1]["ratio"] == pytest.approx(3)
    text = _advise("--large-files", "--elsewhere", file).stdout
    assert "Use btrfs" in text
    assert "block-cow" in text
    assert "Worst: overlay2, 3.2 x" in text


def test_what_the_chosen_driver_is_worse_at_is_said(tmp_path: Path) -> None:
    file = _write(
        tmp_path / "run.json",
        {"copyup-first-write": {"btrfs": 0.1, "overlay2": 1.0}, "build-steps": {"btrfs": 3.0, "overlay2": 1.0}},
    )
    text = _advise("--large-files", "--builds", "--elsewhere", file).stdout
    assert "But building layer upon layer: btrfs takes 3 x" in text
    assert "layerfs bench --driver all --workload randwrite,diff-apply" in text, "and what was not measured"


def test_where_not_all_drivers_have_all_figures_the_needs_decide_which_are_compared(tmp_path: Path) -> None:
    file = _write(
        tmp_path / "run.json",
        {
            "copyup-first-write": {"btrfs": 1.0, "overlay2": 2.0, "vfs": 3.0},
            "randwrite": {"overlay2": 1.0},
            "start-stop-density": {"btrfs": 1.0, "overlay2": 1.0},
        },
    )
    large = _answer("--large-files", file)
    assert [entry["driver"] for entry in large["ranking"]] == ["btrfs", "overlay2", "vfs"]
    assert [figure["workload"] for figure in large["not_measured"]] == ["randwrite"]
    both = _answer("--large-files", "--many-containers", file)
    assert [entry["driver"] for entry in both["ranking"]] == ["btrfs", "overlay2"]
    assert both["ranking"][0] == {"driver": "btrfs", "ratio": 1.0, "low": 1.0, "high": 1.0}
    assert "vfs" in both["left_out"]
    alone = _advise("--small-files", "--elsewhere", file)
    assert alone.returncode == 3, "one run without any of the figures"


def test_drivers_that_cannot_be_told_apart_are_named(tmp_path: Path) -> None:
    works = {"build-steps": {"btrfs": 1.0, "overlay2": 1.001}, "diff-apply": {"btrfs": 1.0, "overlay2": 1.0}}
    answer = _answer("--builds", _write(tmp_path / "run.json", works))
    assert {answer["driver"], *answer["equally_good"]} == {"btrfs", "overlay2"}
    few = _advise("--builds", "--elsewhere", _write(tmp_path / "few.json", works, spread=[1.0, 1.1]))
    assert "by chance" in few.stdout or "may be chance" in few.stdout


def test_what_is_required_comes_from_the_drivers(tmp_path: Path) -> None:
    file = _write(tmp_path / "run.json", {"build-steps": {"btrfs": 1.0, "overlay2": 2.0, "vfs": 3.0}})
    answer = _answer("--builds", "--require", "rootless", file)
    assert answer["driver"] == "overlay2"
    assert "rootless" in answer["left_out"]["btrfs"]
    alone = _answer("--builds", "--require", "size-limit", file)
    assert [entry["driver"] for entry in alone["ranking"]] == ["btrfs"]
    done = _advise("--builds", "--require", "size-limit", "--require", "rootless", "--elsewhere", file)
    assert done.returncode == 3
    assert "layerfs bench" in done.stderr


def test_what_does_not_work_here_is_left_out_unless_it_is_for_elsewhere(tmp_path: Path) -> None:
    from layerfs import registry

    usable = {name: registry.load(name).probe(Path("/var/tmp")).usable for name in registry.names()}
    missing = next((name for name, works in usable.items() if not works), None)
    if missing is None:
        pytest.skip("every driver works on this host")
    file = _write(tmp_path / "run.json", {"build-steps": {missing: 0.1, "overlay2": 1.0, "vfs": 2.0}})
    assert _answer("--builds", file)["driver"] == missing
    here = _advise("--builds", "--json", file)
    assert json.loads(here.stdout)["driver"] == "overlay2"
    assert "does not work here" in json.loads(here.stdout)["left_out"][missing]


def test_the_newest_run_that_answers_is_taken(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for need in (["--builds"], ["--little-memory"]):
        done = _advise(*need, cwd=tmp_path)
        assert done.returncode == 3
        assert "layerfs bench --driver all --workload" in done.stderr
    whole = {"build-steps": {"btrfs": 1.0, "overlay2": 2.0}, "diff-apply": {"btrfs": 1.0, "overlay2": 2.0}}
    _write(results / "old.json", {name: {"btrfs": 9.0, "overlay2": 1.0} for name in whole}, day=1)
    _write(results / "new.json", whole, day=2)
    _write(results / "newest.json", {"build-steps": {"btrfs": 9.0, "overlay2": 1.0}}, day=3)
    (results / "verdicts.json").write_text('{"layerfs_claims": 1}')
    answer = _answer("--builds", cwd=tmp_path)
    assert answer["driver"] == "btrfs"
    assert answer["run"] == "results/new.json"
    _write(results / "short.json", {name: {"btrfs": 9.0, "overlay2": 1.0} for name in whole}, day=4, spread=_STEADY[:3])
    assert _answer("--builds", cwd=tmp_path)["run"] == "results/new.json"
    memory = {"cache-share": {"btrfs": 4.0, "overlay2": 1.0}}
    _write(results / "memory.json", memory, day=1)
    assert _answer("--little-memory", cwd=tmp_path)["driver"] == "overlay2"


def test_one_reader_says_nothing_of_what_many_share(tmp_path: Path) -> None:
    alone = _write(tmp_path / "alone.json", {"cache-share": {"btrfs": 0.9, "overlay2": 1.0}}, parameters={"readers": 1})
    done = _advise("--little-memory", "--elsewhere", alone)
    assert done.returncode == 3
    assert "--workload cache-share" in done.stderr
    several = _write(
        tmp_path / "four.json", {"cache-share": {"btrfs": 4.0, "overlay2": 1.0}}, parameters={"readers": 4}
    )
    both, added = json.loads(alone.read_text()), json.loads(several.read_text())
    both["benchmarks"] += added["benchmarks"]
    several.write_text(json.dumps(both))
    answer = _answer("--little-memory", several)
    assert answer["driver"] == "overlay2"
    assert answer["ranking"][1]["ratio"] == pytest.approx(4)


def test_of_many_variants_the_usual_one_counts(tmp_path: Path) -> None:
    files = [
        _write(tmp_path / f"{number}.json", {"diff-apply": {"btrfs": btrfs, "overlay2": 1.0}}, parameters=parameters)
        for number, (parameters, btrfs) in enumerate([({"files": 10}, 9.0), ({}, 4.0), ({"files": 10_000}, 9.0)])
    ]
    whole, *others = (json.loads(file.read_text()) for file in files)
    for other in others:
        whole["benchmarks"] += other["benchmarks"]
    files[0].write_text(json.dumps(whole))
    answer = _answer("--builds", files[0])
    assert answer["ranking"][1]["ratio"] == pytest.approx(4)


def test_without_flags_and_terminal_it_says_what_to_give(tmp_path: Path) -> None:
    done = _advise(cwd=tmp_path)
    assert done.returncode == 2
    assert all(f"--{need.id}" in done.stderr for need in needs.load())


def test_on_a_terminal_it_asks(tmp_path: Path) -> None:
    file = _write(tmp_path / "run.json", {"build-steps": {"btrfs": 1.0, "overlay2": 2.0, "vfs": 3.0}})
    questions = needs.load()
    answers = ["y" if need.id == "builds" else "n" for need in questions] + ["y", "n"]  # and without root
    own, other = pty.openpty()
    try:
        os.write(own, "".join(f"{answer}\n" for answer in answers).encode())
        done = subprocess.run(
            [*_ADVISE, "--elsewhere", str(file)], stdin=other, capture_output=True, text=True, check=False, timeout=60
        )
    finally:
        os.close(own)
        os.close(other)
    assert done.returncode == 0, done.stderr
    assert "Use overlay2" in done.stdout
    assert all(need.question in done.stdout for need in questions)


def test_the_needs_name_workloads_that_exist() -> None:
    for need in needs.load():
        assert need.question.endswith("?")
        for figure in need.figures:
            assert figure.workload in discover()
            assert bool(figure.steps) != bool(figure.counter)
            assert set(figure.least) <= {field.name for field in dataclasses.fields(discover()[figure.workload])}


def test_the_mean_of_ratios_is_geometric_and_weighted() -> None:
    fast, slow = list(_STEADY), [8 * value for value in _STEADY]
    found = statistics.mean_ratio([(slow, fast), (fast, fast)], [1 / 3, 2 / 3])
    assert found.middle == pytest.approx(2)
    assert found.low <= 2 <= found.high
