"""How a run goes about its samples: how many, in what order, compared with what; stopped and gone on with."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from layerfs import registry
from layerfs.bench import calibration, fingerprint, memory, runfile, runner, scratch
from layerfs.bench.interrupts import Interrupts
from layerfs.bench.journal import Journal
from layerfs.bench.on_lower import OnAnyParent
from layerfs.bench.results import Failure, Run
from layerfs.bench.scratch import StoreTarget
from layerfs.bench.target import Layer
from layerfs.bench.workload import Timing
from layerfs.bench.workloads.seqread_lower import SeqreadLower
from layerfs.errors import EnvironmentUnfit, FailedPrecondition, InvalidArgument, OutOfSpace
from layerfs.store import Store

_numbers = itertools.count()


@dataclass(frozen=True)
class Steady(OnAnyParent):
    name = "steady"
    summary = "always the same"

    def measure(self, layer: Layer) -> list[Timing]:
        (layer.path / "file").write_bytes(b"x")
        return [Timing("step", 1.0)]

    def counters(self, layer: Layer) -> dict[str, int]:
        return {"bytes allocated": layer.grown}


@dataclass(frozen=True)
class Unsteady(Steady):
    name = "unsteady"

    def measure(self, layer: Layer) -> list[Timing]:  # noqa: ARG002
        return [Timing("step", 1.0 + next(_numbers) % 7)]


@dataclass(frozen=True)
class Stopped(Steady):
    """Stops the whole run at its third sample and at its fifth, once each."""

    name = "stopped"
    fuse: str = ""

    def measure(self, layer: Layer) -> list[Timing]:  # noqa: ARG002
        with open(self.fuse, "a") as fuse:
            fuse.write("x")
        if os.path.getsize(self.fuse) in (3, 5):
            raise KeyboardInterrupt
        return [Timing("step", float(os.path.getsize(self.fuse)))]


@pytest.fixture
def plan() -> Iterator[runner.Plan]:
    place = Path("/var/tmp") / f"layerfs-test-runs-{os.getpid()}"
    place.mkdir()
    yield runner.Plan(["native"], [Steady(1 << 20, 0)], 1 << 20, None, 1, place)
    left = os.listdir(place)
    shutil.rmtree(place)
    assert left == []


def _taken(plan: runner.Plan, journal: Journal | None = None) -> Run:
    with Interrupts() as interrupts:
        return runner.run(plan, interrupts, journal=journal)


def test_a_steady_workload_is_repeated_no_more_than_needed_and_an_unsteady_one_to_the_limit(plan: runner.Plan) -> None:
    works = [Steady(1 << 20, 0), Unsteady(1 << 20, 0)]
    run = _taken(dataclasses.replace(plan, workloads=works))
    counts = {series.workload.name: len(series.seconds) for series in run.series()}
    assert counts == {"steady": 5, "unsteady": runner.MOST_ROUNDS}


def test_when_the_time_is_spent_each_workload_still_has_the_fewest_rounds(plan: runner.Plan) -> None:
    run = _taken(dataclasses.replace(plan, workloads=[Unsteady(1 << 20, 0)], seconds=0.0))
    assert [len(series.seconds) for series in run.series()] == [runner.FEWEST_ROUNDS]


def test_native_counts_what_a_plain_directory_allocates(plan: runner.Plan) -> None:
    run = _taken(dataclasses.replace(plan, rounds=2))
    assert [sample.counters["bytes allocated"] for sample in run.samples] == [4096, 4096]


def test_a_stopped_run_goes_on_with_its_samples_and_nothing_is_measured_twice(
    plan: runner.Plan, tmp_path: Path
) -> None:
    work = Stopped(1 << 20, 0, fuse=str(tmp_path / "fuse"))
    plan = dataclasses.replace(plan, workloads=[work], rounds=4)
    file = tmp_path / "run.stopped"
    with pytest.raises(KeyboardInterrupt):
        _taken(plan, Journal(file, plan.identity))
    assert len(file.read_text().splitlines()) == 3, "the plan, and two samples"
    with open(file, "a") as torn:
        torn.write('{"target": "nat')
    with pytest.raises(KeyboardInterrupt):
        _taken(plan, Journal(file, plan.identity))
    assert len(file.read_text().splitlines()) == 4, "what was cut off is gone, or the next line would be with it"
    with open(file, "ab") as torn:
        torn.write(b'{"target": "\xc3')
    journal = Journal(file, plan.identity)
    run = _taken(plan, journal)
    assert [(s.round, s.timings[0].seconds) for s in run.samples] == [(0, 1.0), (1, 2.0), (2, 4.0), (3, 6.0)]
    assert any("went on" in warning for warning in run.warnings)
    journal.finish()
    assert not file.exists()


def test_a_stopped_run_of_other_options_is_not_mixed_in(plan: runner.Plan, tmp_path: Path) -> None:
    file = tmp_path / "run.stopped"
    _taken(dataclasses.replace(plan, rounds=1), Journal(file, plan.identity))
    other = dataclasses.replace(plan, filesystem="ext4")
    with pytest.raises(InvalidArgument, match=r"run\.stopped"):
        _taken(other, Journal(file, other.identity))


@pytest.mark.parametrize("name", ["kernel", "user", "version of layerfs", "seed"])
def test_a_run_that_was_stopped_elsewhere_is_not_gone_on_with(plan: runner.Plan, tmp_path: Path, name: str) -> None:
    plan, file = dataclasses.replace(plan, rounds=1), tmp_path / "run.stopped"
    _taken(plan, Journal(file, plan.identity))
    first, *samples = file.read_text().splitlines(keepends=True)
    file.write_text("".join([json.dumps({**json.loads(first), name: "another"}) + "\n", *samples]))
    with pytest.raises(InvalidArgument, match=f"{name} was 'another' and is "):
        _taken(plan, Journal(file, plan.identity))
    file.write_text(first[:40])
    _taken(plan, Journal(file, plan.identity))
    assert file.read_text().startswith(first), "stopped in its first line, it begins anew"


def test_a_calibration_measures_each_driver_twice_and_keeps_the_noise(plan: runner.Plan) -> None:
    targets = ["native", *calibration.twice(["overlay2", "vfs"])]
    assert targets == ["native", "overlay2", "overlay2 again", "vfs", "vfs again"]
    run = _taken(dataclasses.replace(plan, targets=targets[3:], workloads=[Unsteady(1 << 20, 0)], rounds=6))
    document = json.loads(json.dumps(runfile.document(run)))
    (entry,) = document["layerfs"]["calibration"]
    assert (entry["workload"], entry["step"], entry["target"]) == ("unsteady", "step", "vfs")
    assert calibration.thresholds([entry]) == {("unsteady", "step", "vfs"): entry["threshold"]}
    assert entry["threshold"] >= abs(entry["ratio"]["middle"] - 1)


def test_every_target_is_compared_with_the_first_by_a_ratio_with_interval(plan: runner.Plan) -> None:
    run = _taken(dataclasses.replace(plan, targets=["native", "vfs"], rounds=3))
    first, second = (b["extra_info"] for b in json.loads(json.dumps(runfile.document(run)))["benchmarks"])
    assert "against" not in first
    assert second["against"] == {"target": "native", "times": {"low": 1.0, "median": 1.0, "high": 1.0}}


def test_a_cold_cache_is_not_said_to_be_one_where_a_daemon_keeps_its_own(plan: runner.Plan) -> None:
    if not registry.load("zfs").probe(plan.place).usable:
        pytest.skip("zfs does not work on this host")
    works = [SeqreadLower(1 << 20, 0)]
    run = _taken(dataclasses.replace(plan, targets=["vfs", "zfs"], workloads=works, rounds=1))
    facts: dict[str, Any] = dict(run.fingerprint["targets"])  # type: ignore[call-overload]
    in_user_space = facts["zfs"]["backing"]["filesystem"] == "fuse.zfs"
    assert any(note.startswith("on zfs, cold is") for note in run.warnings) is in_user_space


@pytest.fixture
def cap() -> None:
    """Memory can be capped here."""
    try:
        with memory.capped(memory.SMALLEST):
            pass
    except EnvironmentUnfit as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("cap")
def test_the_memory_cap_holds_what_is_cached_and_is_gone_afterwards() -> None:
    """In a process of its own, for the cap is on the whole process."""
    place = Path("/var/tmp") / f"layerfs-test-cap-{os.getpid()}"
    program = (
        "import subprocess, sys; from pathlib import Path; from layerfs.bench import caches, content, memory\n"
        "file, before = Path(sys.argv[1]), memory.limit_now()\n"
        "with memory.capped(128 << 20):\n"
        "    assert memory.limit_now() == 128 << 20, memory.limit_now()\n"
        "    content.write_random(file, 192 << 20, 1)\n"
        "    caches.read([file])\n"
        "    print(caches.resident(file))\n"
        "    daemon = subprocess.Popen(['sleep', '60'])\n"
        "assert daemon.poll() is None\n"
        "daemon.kill()\n"
        "assert memory.limit_now() == before\n"
    )
    try:
        done = subprocess.run([sys.executable, "-c", program, str(place)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert 0 < float(done.stdout) < 0.67
    finally:
        place.unlink(missing_ok=True)


@pytest.mark.usefixtures("cap")
def test_what_was_started_below_the_memory_cap_and_stays_does_not_hold_it() -> None:
    program = (
        "import subprocess; from layerfs.bench import memory\n"
        "home, before = memory._home()[0], memory.limit_now()\n"
        "with memory.capped(128 << 20):\n"
        "    daemon = subprocess.Popen(['sleep', '60'])\n"
        "try:\n"
        "    assert memory.limit_now() == before\n"
        "    assert not list(home.glob('layerfs-bench-*'))\n"
        "    assert str(daemon.pid) in (home / 'cgroup.procs').read_text().split()\n"
        "finally:\n"
        "    daemon.kill()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_work_is_done_only_where_it_is_wanted(plan: runner.Plan) -> None:
    works = [Steady(1 << 20, 0), Unsteady(1 << 20, 0)]
    only = dataclasses.replace(
        plan, targets=["native", "vfs"], workloads=works, rounds=2, measured_on={"steady": {"vfs"}}
    )
    run = _taken(only)
    counts = {(series.workload.name, series.target): len(series.seconds) for series in run.series()}
    assert counts == {("steady", "vfs"): 2, ("unsteady", "native"): 2, ("unsteady", "vfs"): 2}


@dataclass(frozen=True)
class Failing(Steady):
    """Fails on every target but the native one."""

    name = "failing"

    def measure(self, layer: Layer) -> list[Timing]:
        if layer.target.name != "native":
            raise OutOfSpace("it is full")
        return [Timing("step", 1.0)]


def test_a_run_that_goes_on_leaves_out_what_fails_again_and_says_so(plan: runner.Plan) -> None:
    works = [Steady(1 << 20, 0), Failing(1 << 20, 0)]
    failing = dataclasses.replace(plan, targets=["native", "vfs", "vfs backing=nonesuch"], workloads=works, rounds=4)
    with pytest.raises(InvalidArgument, match="nonesuch"):
        _taken(failing)
    run = _taken(dataclasses.replace(failing, goes_on=True))
    counts = {(series.workload.name, series.target): len(series.seconds) for series in run.series()}
    assert counts == {("steady", "native"): 4, ("steady", "vfs"): 4, ("failing", "native"): 4}
    assert [(f.target, f.workload) for f in run.failures] == [("vfs backing=nonesuch", "")] + [("vfs", "failing")] * 2
    document = json.loads(json.dumps(runfile.document(run)))
    assert "it is full" in document["layerfs"]["failures"][1]["reason"]


class OneMounted(StoreTarget):
    """A driver that can have a single layer mounted."""

    most_mounted = 1


@dataclass(frozen=True)
class Crowd(Steady):
    name = "crowd"
    layers_at_once = 2


def test_what_wants_more_layers_mounted_than_a_driver_can_have_is_left_out_and_not_tried(plan: runner.Plan) -> None:
    works = [Steady(1 << 20, 0), Crowd(1 << 20, 0)]
    wanted = dataclasses.replace(plan, targets=["native", "vfs"], workloads=works, rounds=2)
    with Interrupts() as interrupts:
        run = runner.run(wanted, interrupts, kinds={"vfs": OneMounted})
    counts = {(series.workload.name, series.target): len(series.seconds) for series in run.series()}
    assert counts == {("steady", "native"): 2, ("steady", "vfs"): 2, ("crowd", "native"): 2}
    reason = "it has no more than 1 layers mounted at a time"
    assert run.failures == [Failure("vfs", "crowd", reason, known=True)]


def test_a_run_tells_what_failed_and_not_what_its_cleaning_up_met(
    plan: runner.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(store: Store) -> None:
        raise FailedPrecondition(f"{store.root} has children")

    monkeypatch.setattr(scratch, "_empty", unable)
    failing = dataclasses.replace(plan, targets=["vfs"], workloads=[Failing(1 << 20, 0)], rounds=1)
    with pytest.raises(OutOfSpace, match="it is full"):
        _taken(failing)
    with pytest.raises(FailedPrecondition, match="has children"):
        _taken(dataclasses.replace(failing, workloads=[Steady(1 << 20, 0)]))


def test_a_target_can_have_options_and_a_backing_of_its_own(plan: runner.Plan) -> None:
    if os.geteuid() != 0:
        pytest.skip("making a file system takes root")
    targets = ["overlay2", "overlay2 volatile=on backing=ext4", "btrfs"]
    run = _taken(dataclasses.replace(plan, targets=targets, rounds=1, filesystem="dir"))
    facts: dict[str, Any] = dict(run.fingerprint["targets"])  # type: ignore[call-overload]
    assert [facts[target]["options"].get("volatile") for target in targets] == [None, "on", None]
    assert facts[targets[1]]["backing"]["filesystem"] == "ext4"
    assert facts["btrfs"]["backing"]["filesystem"] == "btrfs", "it works on no other"
    assert facts["overlay2"]["backing"]["filesystem"] == fingerprint.storage(plan.place)["filesystem"]
