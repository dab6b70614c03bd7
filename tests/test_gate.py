"""Comparing two runs, and failing where one is worse: what is found, what is not, and what cannot be told."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from layerfs.bench import compare, interleaved, recorded, runfile, verdicts
from layerfs.bench.caches import CacheState, Reached
from layerfs.bench.compare import Verdict
from layerfs.bench.recorded import Key
from layerfs.bench.results import Run, Sample
from layerfs.bench.workload import Timing, discover
from layerfs.errors import EnvironmentUnfit, InvalidArgument

_LAYERFS = [sys.executable, "-m", "layerfs.cli"]
_MACHINE = {"processor": "x", "cpus": 2, "memory": "4 GiB", "kernel": "6.1", "file system": "ext4", "disk": "sda"}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a run file of one step with these times, and one counter."""

    def made(
        name: str,
        seconds: Sequence[float],
        copied: int | None = 0,
        *,
        machine: dict[str, object] | None = None,
        size: int = 1 << 20,
        backing: str = "ext4",
        user: str = "root",
        how: str = "read",
        target: str = "overlay2",
        left_out: Mapping[str, str] = MappingProxyType({}),
        latencies: Sequence[float] = (),
        caches: Sequence[Reached] = (),
    ) -> Path:
        work = discover()["copyup-first-write"](size, 0)
        states = caches or [Reached(CacheState.WARM, how, 1.0)] * len(seconds)
        counters = {} if copied is None else {"bytes copied up": copied}
        samples = [
            Sample(target, work, number, [timing], counters, cache)
            for number, (value, cache) in enumerate(zip(seconds, states, strict=True))
            for timing in [Timing("open", value, latencies=Counter(value * part for part in latencies))]
        ]
        targets = {target: {"backing": {"filesystem": backing}}}
        facts = {"machine": machine or _MACHINE, "targets": targets, "user": user}
        run = Run(datetime(2026, 1, 31, tzinfo=UTC), size, 7, [target], samples, facts, ["it was hot"])
        runfile.write(runfile.document(run, {"left_out": dict(left_out)}), tmp_path / name)
        return tmp_path / name

    return made


def _noisy(middle: float, number: int = 12, seed: int = 1) -> list[float]:
    source = random.Random(seed)
    return [middle * source.gauss(1, 0.02) for _ in range(number)]


def _gate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_LAYERFS, "gate", *map(str, arguments)], capture_output=True, text=True, check=False)


# Judgement


@pytest.mark.parametrize(
    ("slower", "verdict"), [(1.0, Verdict.SAME), (1.02, Verdict.SAME), (1.3, Verdict.WORSE), (0.7, Verdict.BETTER)]
)
def test_a_clear_difference_is_told_from_none(slower: float, verdict: Verdict) -> None:
    found = compare.clock(Key("w", "s", "t"), _noisy(1.0, seed=1), _noisy(slower, seed=2), 0.1)
    assert found.verdict is verdict


def test_a_difference_below_the_threshold_is_no_regression_however_clear() -> None:
    found = compare.clock(Key("w", "s", "t"), _noisy(1.0, 40), _noisy(1.15, 40, seed=2), 0.2)
    assert found.verdict is not Verdict.WORSE
    assert found.chance < 0.01


def test_few_samples_are_called_too_few_and_what_is_called_enough_is() -> None:
    key = Key("w", "s", "t")
    for figures in (1, 20, 300):
        for bases in (1, 2):
            enough = compare.fewest(figures, bases)
            base, head = [1.0] * enough * bases, [2.0] * enough
            assert compare.clock(key, base, head, 0.1, figures=figures).verdict is Verdict.WORSE
            few = compare.clock(key, base[bases:], head[1:], 0.1, figures=figures)
            assert few.verdict is Verdict.TOO_FEW, "all of head above all of base, and yet it could be chance"


def test_wild_samples_cannot_tell() -> None:
    key = Key("w", "s", "t")
    assert compare.clock(key, [1, 9, 2, 7, 3, 8], [2, 8, 3, 9, 1, 7], 0.1).verdict is Verdict.UNCLEAR
    assert compare.clock(key, [1.0] * 9, [1.0] * 9, 16.0).verdict is Verdict.UNCLEAR, "so much noise is blindness"


def test_identical_code_is_seldom_called_worse() -> None:
    source = random.Random(5)
    alarms = 0
    for _ in range(100):
        base, head = ([source.lognormvariate(0, 0.15) for _ in range(10)] for _ in range(2))
        alarms += compare.clock(Key("w", "s", "t"), base, head, compare.UNCALIBRATED).verdict is Verdict.WORSE
    assert alarms <= 1


def test_a_counter_is_worse_when_every_sample_is_and_a_block_does_not_matter(write: Write) -> None:
    base = recorded.read(write("base", _noisy(1), copied=1 << 20))
    for copied, verdict in (((1 << 20) + 4096, Verdict.SAME), (2 << 20, Verdict.WORSE), (4096, Verdict.BETTER)):
        head = recorded.read(write("head", _noisy(1), copied=copied))
        (counter,) = compare.compare(base, head, {}).counters
        assert counter.verdict is verdict


def test_both_measurements_of_a_calibrating_run_are_samples_of_one_driver() -> None:
    key, again = Key("w", "s", "btrfs"), Key("w", "s", "btrfs again")
    counter = recorded.CounterKey("w", "bytes", "btrfs again")
    other = Key("w", "s", "vfs")
    run = recorded.Recorded("run", {}, {key: [1.0, 2.0], again: [3.0], other: [4.0]}, {counter: [5]}, {key: 0.2})
    joined = run.joined()
    assert joined.seconds == {key: [1.0, 2.0, 3.0], other: [4.0]}
    assert joined.counters == {counter._replace(target="btrfs"): [5]}
    assert joined.thresholds == {key: 0.2}


def test_what_is_slow_only_now_and_then_is_seen(write: Write) -> None:
    base = recorded.read(write("base.json", _noisy(0.1), latencies=[1] * 20))
    head = recorded.read(write("head.json", _noisy(0.1, seed=2), latencies=[1] * 16 + [3] * 4))
    found = {clock.key.step: clock for clock in compare.compare(base, head, {}).clocks}
    assert {step: clock.verdict for step, clock in found.items()} == {
        "open": Verdict.SAME,
        "open (slowest tenth)": Verdict.WORSE,
    }
    assert found["open (slowest tenth)"].ratio.middle == pytest.approx(3, rel=0.1)


def test_what_the_slowest_operations_cannot_tell_is_nobodys_business(write: Write) -> None:
    """Few operations vary much, and more rounds would hardly help."""
    source = random.Random(4)
    varied = [source.lognormvariate(-2, 2) for _ in range(12)]
    base = recorded.read(write("base.json", [0.1] * 12, latencies=[1] * 20))
    head = recorded.read(write("head.json", [0.1] * 12, latencies=[1] * 20))
    (slowest,) = (key for key in base.seconds if "slowest" in key.step)
    wild = dataclasses.replace(head, seconds={**head.seconds, slowest: varied})
    none = dataclasses.replace(head, seconds={key: times for key, times in head.seconds.items() if key != slowest})
    for other in (wild, none):
        found = compare.compare(base, other, {})
        assert (found.verdict, found.untold) == (Verdict.SAME, set())
        assert "slowest tenth" not in verdicts.markdown(found)
    assert compare.compare(base, wild, {}).clocks[1].verdict is Verdict.UNCLEAR


# The command


def test_exit_codes_tell_regression_from_noise_from_mistake(write: Write, tmp_path: Path) -> None:
    base = write("base.json", _noisy(0.1))
    assert _gate(base, write("same.json", _noisy(0.1, seed=2))).returncode == 0
    slow = _gate(base, write("slow.json", _noisy(0.15, seed=2)))
    assert slow.returncode == 1
    assert "copyup-first-write: open on overlay2" in slow.stdout
    assert "worse" in slow.stdout
    more = _gate(base, write("more.json", _noisy(0.1, seed=2), copied=1 << 20))
    assert more.returncode == 1, "a counter alone suffices"
    unclear = write("unclear.json", [0.01, 0.9, 0.1, 0.2, 0.5, 0.05])
    assert _gate(base, unclear).returncode == 0
    assert _gate(base, unclear, "--strict").returncode == 5
    assert _gate(base).returncode == 2
    assert _gate(base, tmp_path / "missing.json").returncode == 2
    (tmp_path / "broken.json").write_text('{"benchmarks": 3}')
    broken = _gate(base, tmp_path / "broken.json")
    assert broken.returncode == 2
    assert "broken.json" in broken.stderr
    assert len(broken.stderr.splitlines()) == 1


def test_runs_of_two_machines_are_refused_without_force(write: Write) -> None:
    base = write("base.json", _noisy(0.1))
    head = write("head.json", _noisy(0.1, seed=2), machine={**_MACHINE, "kernel": "6.18"})
    refused = _gate(base, head)
    assert refused.returncode == 3
    assert "6.18" in refused.stderr
    forced = _gate(base, head, "--force")
    assert forced.returncode == 0
    assert "6.18" in forced.stderr
    with pytest.raises(EnvironmentUnfit):
        compare.compare(recorded.read(base), recorded.read(head), {})


def test_reports_for_ci_are_written(write: Write, tmp_path: Path) -> None:
    base, head = write("base.json", _noisy(0.1)), write("head.json", _noisy(0.2, seed=2))
    summary, junit = tmp_path / "summary.md", tmp_path / "junit.xml"
    summary.write_text("before\n")
    done = _gate(base, head, "--markdown", summary, "--junit", junit, "--json")
    assert done.returncode == 1
    verdict = json.loads(done.stdout)
    assert verdict["verdict"] == "worse"
    assert verdict["clocks"][0]["ratio"]["middle"] == pytest.approx(2, rel=0.1)
    assert summary.read_text().startswith("before\n## layerfs gate: 1 of 2")
    suite = ElementTree.fromstring(junit.read_text())  # noqa: S314 - our own
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("2", "1")
    assert [case.attrib["name"] for case in suite if case.find("failure") is not None] == [
        "copyup-first-write: open on overlay2"
    ]


def test_compare_prints_and_never_fails_for_a_regression(write: Write) -> None:
    command = [*_LAYERFS, "compare", str(write("a.json", _noisy(0.1))), str(write("b.json", _noisy(0.2)))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "worse" in done.stdout


@pytest.mark.parametrize("coding", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_a_locale_without_utf_8_is_no_error(write: Write, tmp_path: Path, coding: dict[str, str]) -> None:
    files = [str(write("base.json", _noisy(1e-5))), str(write("head.json", _noisy(2e-5)))]
    files_for_ci = [f"--markdown={tmp_path / 'found.md'}", f"--junit={tmp_path / 'junit.xml'}"]
    environment = {**os.environ, "LC_ALL": "C", **coding}
    for command, code in (("compare", 0), ("gate", 1)):
        words = [*_LAYERFS, command, *files, *(files_for_ci if command == "gate" else [])]
        done = subprocess.run(words, capture_output=True, check=False, env=environment)
        assert done.returncode == code, done.stderr
        assert b"10.0 ?s" in done.stdout
        assert done.stdout.isascii()
    assert "\N{GREEK SMALL LETTER MU}s" in (tmp_path / "found.md").read_text("utf-8")
    assert ElementTree.parse(tmp_path / "junit.xml").getroot().attrib["failures"] == "1"  # noqa: S314 - our own


def test_markdown_stays_below_the_limit_and_keeps_the_worst() -> None:
    keys = [Key(f"work {number}" + "x" * 500, "step", "target") for number in range(5000)]
    clock = compare.clock(keys[0], [1.0] * 9, [1.0] * 9, 16.0)
    clocks = [dataclasses.replace(clock, key=key) for key in keys]
    worst = compare.clock(Key("worst|<b>", "step", "target"), _noisy(1), _noisy(3), 0.1)
    found = compare.Comparison("a", "b", [], [*clocks, worst], [], 0, [])
    text = verdicts.markdown(found)
    assert len(text.encode()) <= verdicts.MARKDOWN_LIMIT + 100
    assert text.index("worst") < text.index("work 0")
    assert "<b>" not in text.replace("\\<b\\>", "")
    assert "more, none of them worse" in text


def _calibrated(run: Path, place: Path) -> Path:
    """The same run with a calibration, by which opening may take 40 % longer."""
    document = json.loads(run.read_text())
    ratio = {"low": 0.7, "middle": 1.0, "high": 1.4}
    entry = {"workload": "copyup-first-write", "step": "open", "target": "overlay2", "ratio": ratio, "threshold": 0.4}
    document["layerfs"]["calibration"] = [entry]
    calibration = place / "calibration.json"
    calibration.write_text(json.dumps(document))
    return calibration


def test_thresholds_come_from_a_calibration_file(write: Write, tmp_path: Path) -> None:
    base, head = write("base.json", _noisy(0.1)), write("head.json", _noisy(0.13, seed=2))
    assert _gate(base, head).returncode == 1
    calibration = _calibrated(base, tmp_path)
    assert _gate(base, head, "--calibration", calibration).returncode == 0
    assert _gate(base, head, "--calibration", head).returncode == 2


def _compare(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [*_LAYERFS, "compare", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_gate_that_cannot_fail_is_refused_and_says_how_many_samples_it_takes(write: Write) -> None:
    base, head = write("base.json", [0.1] * 4), write("head.json", [0.9] * 4)
    shown = _compare(base, head)
    assert shown.returncode == 0
    assert "1 has too few samples to tell: measure at least 5 a side" in shown.stdout
    refused = _gate(base, head)
    assert refused.returncode == 2
    assert "--rounds 5" in refused.stderr.splitlines()[-1]
    assert _gate(base, write("more.json", [0.1] * 4, 1 << 20)).returncode == 1, "a counter is sure"
    assert _gate(write("base.json", [0.1] * 5), write("head.json", [0.9] * 5)).returncode == 1


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"size": 2 << 20}, "size 1048576 and 2097152"),
        ({"backing": "xfs"}, "backing 'ext4' and 'xfs'"),
        ({"user": "not root of the host"}, "user 'root' and 'not root of the host'"),
        ({"how": "fadvise"}, "cache 'warm by read' and 'warm by fadvise'"),
    ],
)
def test_what_was_measured_differently_is_not_compared(write: Write, changed: dict[str, Any], named: str) -> None:
    base, head = write("base.json", _noisy(0.1)), write("head.json", _noisy(0.3), **changed)
    for refused in (_compare(base, head), _gate(base, head, "--force")):
        assert refused.returncode == 2
        assert named in refused.stderr


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        (Reached(CacheState.WARM, "fadvise", 1.0), "cache 'warm by read' and 'warm by fadvise'"),
        (Reached(CacheState.WARM, "read", 0.5), "cache 'warm by read' and 'warm by read, not reached'"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_sample_of_other_conditions_is_left_out_and_named(
    write: Write, odd: Reached, named: str, at_once: bool
) -> None:
    """In a run of many rounds, and among runs of one round each."""
    base = recorded.read(write("base.json", _noisy(0.1)))
    warm = Reached(CacheState.WARM, "read", 1.0)
    caches, seconds = [odd, *[warm] * 11], [9.0, *_noisy(0.1, 11, seed=2)]
    if at_once:
        head = recorded.read(write("head.json", seconds, caches=caches))
    else:
        pairs = list(zip(seconds, caches, strict=True))
        runs = [recorded.read(write("head.json", [value], caches=[cache])) for value, cache in pairs]
        head = recorded.together(runs, "head")
    found = compare.compare(base, head, {})
    (clock,) = found.clocks
    assert (clock.verdict, clock.samples, found.verdict) == (Verdict.SAME, (12, 11), Verdict.SAME)
    assert [named in warning for warning in found.warnings].count(True) == 1
    assert len(head.counters[found.counters[0].key]) == 11


def test_conditions_that_most_samples_have_are_those_of_the_figure(write: Write) -> None:
    caches = [Reached(CacheState.WARM, "read", 0.5)] * 7 + [Reached(CacheState.WARM, "read", 1.0)] * 5
    base, head = write("base.json", _noisy(0.1)), write("head.json", _noisy(0.1), caches=caches)
    refused = _compare(base, head)
    assert refused.returncode == 2
    assert "'warm by read, not reached'" in refused.stderr


def test_of_runs_that_are_alike_only_in_part_the_rest_is_named(write: Write, tmp_path: Path) -> None:
    documents = [json.loads(write(f"{size}.json", _noisy(0.1), size=size).read_text()) for size in (1 << 20, 2 << 20)]
    other = json.loads(write("other.json", _noisy(0.1), target="vfs").read_text())
    for place, document in zip(("base.json", "head.json"), documents, strict=True):
        document["benchmarks"] += other["benchmarks"]
        document["layerfs"]["fingerprint"]["targets"] |= other["layerfs"]["fingerprint"]["targets"]
        (tmp_path / place).write_text(json.dumps(document))
    done = _gate(tmp_path / "base.json", tmp_path / "head.json", "--strict")
    assert done.returncode == 5
    assert "2 are not compared, for the head measured differently" in done.stdout
    assert "size 1048576 and 2097152" in done.stdout


def test_a_driver_that_does_not_work_in_the_head_any_more_is_a_regression(write: Write, tmp_path: Path) -> None:
    base, junit = write("base.json", _noisy(0.1)), tmp_path / "junit.xml"
    head = write("head.json", _noisy(0.1), target="vfs", left_out={"overlay2": "mount: no such device"})
    done = _gate(base, head, "--junit", junit)
    assert done.returncode == 1
    assert "mount: no such device" in done.stdout
    failures = ElementTree.fromstring(junit.read_text()).iter("failure")  # noqa: S314 - our own
    assert ["no such device" in failure.attrib["message"] for failure in failures] == [True, True]


def test_a_counter_that_the_head_lacks_is_named(write: Write) -> None:
    base, head = write("base.json", _noisy(0.1)), write("head.json", _noisy(0.1, seed=2), None)
    done = _gate(base, head)
    assert done.returncode == 0
    assert "1 is missing in the head" in done.stdout
    assert _gate(base, head, "--strict").returncode == 5


def test_a_calibration_of_other_conditions_says_nothing(write: Write, tmp_path: Path) -> None:
    base, head = write("base.json", _noisy(0.1)), write("head.json", _noisy(0.13, seed=2))
    calibration = _calibrated(write("other.json", _noisy(0.1), size=2 << 20), tmp_path)
    assert _gate(base, head, "--calibration", calibration).returncode == 1


def test_what_cannot_be_written_is_refused_first(write: Write, environments: tuple[Path, Path], tmp_path: Path) -> None:
    base = write("base.json", _noisy(0.1))
    for option in ("--markdown", "--junit"):
        assert "is a directory" in _gate(base, base, option, tmp_path).stderr
    # What is built would leave a trace.
    build = ["--build-base", f"touch {tmp_path / 'built'}"]
    done = _gate(*build, environments[1], "--keep", base)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "is no directory" in done.stderr
    assert not (tmp_path / "built").exists()


def test_options_without_effect_are_refused(write: Write, environments: tuple[Path, Path]) -> None:
    base = write("base.json", _noisy(0.1))
    for option in ("--rounds=20", "--driver=vfs", "--no-calibrate", "--seed=1"):
        done = _gate(base, base, option)
        assert done.returncode == 2
        assert option.split("=")[0] in done.stderr.replace("--calibrate", "--no-calibrate")
    for option in (f"--calibration={base}", "--guest=qemu"):
        done = _gate(*environments, option)
        assert done.returncode == 2
        assert "no effect" in done.stderr


# Two versions in one job


@pytest.fixture
def environments(tmp_path: Path) -> tuple[Path, Path]:
    """Two environments with this layerfs; in the second, every file of a fresh layer is written once more."""
    slow = (
        "import layerfs.bench.scratch as s; m = s.StoreTarget.mount\n"
        "def mount(self, key):\n"
        "    tree = m(self, key)\n"
        "    for file in tree.rglob('*.dat'): file.write_bytes(file.read_bytes())\n"
        "    return tree\n"
        "s.StoreTarget.mount = mount\n"
    )
    made = []
    for name, prelude in (("base", ""), ("head", slow)):
        place = tmp_path / name / "bin"
        place.mkdir(parents=True)
        (place / "layerfs").touch()
        (place.parent / "prelude.py").write_text(prelude)
        # The interpreter of an environment, which runs the program with or without the change.
        script = f"exec(open({str(place.parent / 'prelude.py')!r}).read()); import sys; from layerfs.cli import main"
        script += "; sys.argv = sys.argv[3:]; sys.argv.insert(0, 'layerfs'); sys.exit(main())"
        (place / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{script}" "$@"\n')
        (place / "python").chmod(0o755)
        made.append(place.parent)
    return made[0], made[1]


def test_two_environments_are_measured_in_turn_and_a_counter_gives_the_slow_one_away(
    environments: tuple[Path, Path], tmp_path: Path
) -> None:
    keep = tmp_path / "kept"
    base, head = environments
    options = ["--driver", "overlay2", "--size", "1M", "--workload", "copyup-first-write", "--rounds", "5", "--json"]
    options += ["--seed", str(2**31 - 1)]  # the largest one; later rounds have others
    done = _gate(base, *options, "--build-head", f"cp -a {head} {{}}", "--keep", keep)
    assert done.returncode == 1, done.stderr
    verdict = json.loads(done.stdout)
    worse = {entry["key"]["counter"] for entry in verdict["counters"] if entry["verdict"] == "worse"}
    assert "bytes when fresh" in worse
    assert verdict["calibrated"]
    assert sorted(os.listdir(keep))[:3] == ["000-base-again.json", "000-base.json", "000-head.json"]
    assert len(os.listdir(keep)) == 15, "a counter is sure: no more rounds"


def test_more_rounds_are_measured_while_something_is_unclear(environments: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = environments
    options = ["--driver", "overlay2", "--size", "1M", "--workload", "copyup-first-write", "--rounds", "5", "--json"]
    for seconds, rounds in ((0, 5), (10**6, 10)):
        keep = tmp_path / str(seconds)
        limit = ["--max-time", str(seconds), "--threshold", "0"]  # nothing is ever surely the same
        with subprocess.Popen(
            [*_LAYERFS, "gate", str(base), str(base), *options, *limit, "--keep", str(keep)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as gate:
            while gate.poll() is None and (not keep.exists() or len(os.listdir(keep)) < 3 * rounds):
                time.sleep(0.1)
            if seconds:
                assert gate.poll() is None, "it goes on"
                gate.send_signal(signal.SIGINT)
                assert gate.wait() == 130
            else:
                assert gate.wait() in (0, 1)
        assert len(os.listdir(keep)) >= 3 * rounds


def test_only_what_cannot_be_told_is_measured_again_in_longer_and_longer_steps(tmp_path: Path) -> None:
    works = {name: discover()[name](1 << 20, 0) for name in ("randread", "append-many")}
    asked: list[list[str]] = []
    looks: list[int] = []

    def side(words: Sequence[str], _folder: Path) -> tuple[int, str]:
        given = [word.removeprefix("--workload=") for word in words if word.startswith("--workload=")]
        (file,) = (word.removeprefix("--output=") for word in words if word.startswith("--output="))
        samples = [Sample("vfs", works[name], 0, [Timing("whole", 1.0)], {}, None) for name in given or works]
        facts = {"machine": _MACHINE, "targets": {"vfs": {"backing": {}}}}
        run = Run(datetime(2026, 1, 31, tzinfo=UTC), 1 << 20, 7, ["vfs"], samples, facts, [])
        runfile.write(runfile.document(run), Path(file))
        asked.append(given)
        return 0, ""

    def untold(measured: interleaved.Measured) -> set[str]:
        looks.append(len(measured.head.seconds[Key("append-many", "whole", "vfs")]))
        return {"append-many"} if looks[-1] < 20 else set()

    options: Mapping[str, Any] = {"rounds": 6, "seed": 1, "calibrate": False, "keep": tmp_path, "untold": untold}
    found = interleaved.measure(side, side, [], [], seconds=10**6, **options)
    assert asked == [[]] * 12 + [["append-many"]] * 44
    assert looks == [6, 9, 13, 19, 28]
    assert {key.workload: len(times) for key, times in found.base.seconds.items()} == {"append-many": 28, "randread": 6}
    looks.clear()
    interleaved.measure(side, side, [], [], seconds=0, **options)
    assert looks == [6], "there was no time for more"


def test_what_is_surely_worse_needs_no_more_rounds(write: Write) -> None:
    base, unclear = write("base.json", _noisy(0.1)), write("unclear.json", [0.01, 0.9, 0.1, 0.2, 0.5, 0.05])
    worse = write("worse.json", [0.01, 0.9, 0.1, 0.2, 0.5, 0.05], copied=1 << 20)
    for head, untold in ((base, set()), (unclear, {"copyup-first-write"}), (worse, set())):
        assert compare.compare(recorded.read(base), recorded.read(head), {}).untold == untold


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_gate_lets_the_measurement_clean_up(
    environments: tuple[Path, Path], number: signal.Signals
) -> None:
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root here")
    place = Path("/var/tmp") / f"layerfs-test-gate-{os.getpid()}"  # on a disk
    place.mkdir()
    try:
        options = ["--driver=overlay2", "--size=1M", "--workload=layer-lifecycle", "--backing=ext4"]
        with subprocess.Popen(
            [*_LAYERFS, "gate", *map(str, environments), *options, f"--scratch={place}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as gate:
            while not _mounted(place) and gate.poll() is None:
                time.sleep(0.02)
            gate.send_signal(number)
            said = gate.communicate()[1]
        assert (gate.returncode, said) == (130, "layerfs: interrupted\n")
        assert _left(place) == []
    finally:
        for mount in reversed(_mounted(place)):
            subprocess.run(["umount", "-l", mount], check=False)
        shutil.rmtree(place)


def test_an_interrupted_gate_ends_what_it_builds(environments: tuple[Path, Path], tmp_path: Path) -> None:
    started = tmp_path / "started"
    build = f"sh -c 'sleep 300 & echo $! >{started}.new && mv {started}.new {started}; wait'"
    with subprocess.Popen(
        [*_LAYERFS, "gate", str(environments[0]), "--build-head", build], stderr=subprocess.PIPE, text=True
    ) as gate:
        while not started.exists() and gate.poll() is None:
            time.sleep(0.02)
        gate.send_signal(signal.SIGTERM)
        said = gate.communicate()[1]
    assert (gate.returncode, said) == (130, "layerfs: interrupted\n")
    sleeping = Path(f"/proc/{started.read_text().strip()}/stat")
    while sleeping.exists() and sleeping.read_text().rpartition(")")[2].split()[0] != "Z":  # nobody may wait for it
        time.sleep(0.02)


def _mounted(place: Path) -> list[str]:
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return [mount for mount in mounts if mount.startswith(f"{place}/")]


def _left(place: Path) -> list[str]:
    """Mounts, loop devices, processes and files of what works in a directory."""
    files = [*Path("/sys/block").glob("loop*/loop/backing_file"), *Path("/proc").glob("[0-9]*/cmdline")]
    return [*_mounted(place), *(text for text in map(_text, files) if str(place) in text), *os.listdir(place)]


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def test_rounds_that_can_tell_nothing_are_refused_after_the_first(
    environments: tuple[Path, Path], tmp_path: Path
) -> None:
    base, _ = environments
    options = ["--driver", "vfs", "--size", "1M", "--workload", "copyup-first-write", "--no-calibrate"]
    done = _gate(base, base, *options, "--rounds", "5", "--max-time", "0", "--keep", tmp_path / "kept")
    assert done.returncode == 2
    assert "give --rounds" in done.stderr
    assert len(os.listdir(tmp_path / "kept")) == 2


def test_a_build_that_fails_is_no_regression(environments: tuple[Path, Path]) -> None:
    done = _gate(environments[0], "--build-head", "false {}", "--driver", "overlay2")
    assert done.returncode == 4
    assert "building the head" in done.stderr
    empty = _gate(environments[0], "--build-head", "mkdir {}", "--driver", "overlay2")
    assert empty.returncode == 2


def test_a_head_that_lacks_what_the_base_has_is_a_regression(environments: tuple[Path, Path], tmp_path: Path) -> None:
    broken = "import layerfs.drivers.vfs as v; from layerfs.driver import Probe\n"
    broken += "v.VfsDriver.probe = classmethod(lambda cls, place: Probe(False, 'it is broken'))\n"
    (environments[1] / "prelude.py").write_text(broken)
    options = ["--driver", "vfs", "--size", "1M", "--workload", "layer-lifecycle", "--markdown", tmp_path / "found.md"]
    done = _gate(*environments, *options)
    assert done.returncode == 1, done.stderr
    assert "could not be measured in the head" in done.stdout
    assert "it is broken" in (tmp_path / "found.md").read_text()
    both = _gate(environments[1], environments[1], *options)
    assert both.returncode == 3, "nothing can be told"


def test_what_cannot_run_is_told_from_what_fails(environments: tuple[Path, Path]) -> None:
    (environments[1] / "prelude.py").write_text("raise SystemExit(70)")
    failed = _gate(*environments, "--driver", "overlay2", "--size", "1M", "--workload", "layer-lifecycle")
    assert failed.returncode == 4, failed.stderr
    assert _gate(environments[0], environments[0], "--driver", "nonesuch").returncode == 2


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InvalidArgument, match=r"list\.json"):
        recorded.read(tmp_path / "list.json")
