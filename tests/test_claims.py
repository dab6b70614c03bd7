"""Claims: that the catalogue is whole, that its rules can come out each way, and the command on real stores."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import pytest

from layerfs import mount_table, registry
from layerfs.backing import FILESYSTEMS
from layerfs.bench import runfile, target_name
from layerfs.bench.claims import catalogue, evidence, plan, scoreboard
from layerfs.bench.claims.catalogue import Catalogue
from layerfs.bench.claims.judge import Outcome, Verdict, judge
from layerfs.bench.native import NATIVE
from layerfs.bench.results import Failure, Run, Sample
from layerfs.bench.workload import Timing, discover
from layerfs.errors import InvalidArgument

_CLAIMS = [sys.executable, "-m", "layerfs.cli", "claims"]
_MIB = 1 << 20

# The catalogue


@pytest.fixture(scope="module")
def known() -> Catalogue:
    return catalogue.load()


def test_every_claim_is_complete_and_can_be_tested_or_says_why_not(known: Catalogue) -> None:
    """That parameters exist and are set to what they can be, `load` itself sees to."""
    assert len(known.claims) > 50
    for claim in known.claims:
        assert re.fullmatch(r"[a-z0-9-]+", claim.id)
        assert claim.says.endswith("."), claim.id
        assert claim.refuted != "-" or claim.cannot, claim.id
        for test in claim.tests:
            assert "{" not in test.shows, claim.id
            assert None in (test.least, test.most) or test.least < test.most, claim.id  # type: ignore[operator]


def test_every_target_has_a_driver_and_a_backing_that_are_there(known: Catalogue) -> None:
    for claim in known.claims:
        for test in claim.tests:
            for cell in test.cells:
                name = target_name.parse(cell.target)
                assert name.driver in {*registry.names(), NATIVE}, claim.id
                assert name.filesystem in {*FILESYSTEMS, None}, claim.id
                if name.options:
                    registry.load(name.driver)(Path("/"), name.options).close()


def test_every_step_and_counter_is_one_that_the_workload_has(known: Catalogue, scratch: Path, tmp_path: Path) -> None:
    cells = [cell for claim in known.claims for test in claim.tests for cell in test.cells]
    possible = [name for name in {cell.workload for cell in cells} if not discover()[name].hindrance()]
    file = tmp_path / "run.json"
    command = [sys.executable, "-m", "layerfs.cli", "bench", "--scratch", str(scratch), "--driver", "overlay2"]
    command += ["--rounds=1", "--size=4M", "--no-native", f"--workload={','.join(possible)}", f"--output={file}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps: dict[str, set[str]] = {}
    counters: dict[str, set[str]] = {}
    for benchmark in json.loads(file.read_text())["benchmarks"]:
        extra = benchmark["extra_info"]
        steps.setdefault(extra["workload"], set()).add(extra["step"])
        counters.setdefault(extra["workload"], set()).update(extra["counters"])
    for cell in cells:
        if cell.workload in possible:
            assert set(cell.steps) <= steps[cell.workload], cell
            if not cell.steps and "written" not in cell.given:  # counted only where something is written
                assert cell.figure in counters[cell.workload], cell


def test_a_plan_has_each_experiment_once_and_only_where_it_is_wanted(known: Catalogue) -> None:
    for scale in known.scales.values():
        experiments = plan.union(known.claims, scale, {}, 1)
        labels = [work.label for work in experiments.workloads]
        assert len(labels) == len(set(labels)) == len(experiments.measured_on)
        parameters = [str((work.name, work.size, work.parameters)) for work in experiments.workloads]
        assert len(parameters) == len(set(parameters))
    claims = known.chosen(["docs-overlay2-shares"])
    experiments = plan.union(claims, known.scales["smoke"], {}, 1)
    assert experiments.measured_on == {"cache-share 4": {"overlay2"}, "cache-share 1": {"overlay2"}}
    assert not plan.union(claims, known.scales["smoke"], {"overlay2": "it is not there"}, 1).workloads


# The rules

_TEXT = """
[scale.smoke]
largest = "64M"
large = "16M"
[notes]
aufs = "not the kernel's"
[[claim]]
id = "one"
says = "It is slower."
source = "somebody"
theirs = "2 times"
refuted = "It is as fast."
[[claim.test]]
shows = "opening is slower"
of = { workload = "copyup-first-write", step = ["open", "fsync"], target = "overlay2" }
over = { workload = "copyup-first-write", step = ["open", "fsync"], target = "btrfs" }
least = 1.5
[[claim.test]]
shows = "the whole file is copied"
of = { workload = "copyup-first-write", figure = "bytes copied up", target = "overlay2" }
over = "large"
least = 0.99
most = 1.1
"""


def _run(
    times: Mapping[str, Sequence[float]],
    copied: int = 16 * _MIB,
    more: Mapping[str, object] = MappingProxyType({}),
    failures: Sequence[Failure] = (),
) -> evidence.Evidence:
    """A run of copyup-first-write with these times of its steps open and fsync, each half, by target."""
    work = discover()["copyup-first-write"](16 * _MIB, 0)
    samples = [
        Sample(target, work, number, [Timing("open", t / 2), Timing("fsync", t / 2)], {"bytes copied up": copied}, None)
        for target, every in times.items()
        for number, t in enumerate(every)
    ]
    facts: dict[str, object] = {"machine": {}, "targets": {target: {"backing": {}} for target in times}}
    run = Run(datetime(2026, 1, 31, tzinfo=UTC), 16 * _MIB, 7, list(times), samples, facts, [], failures)
    return evidence.parse(json.loads(json.dumps(runfile.document(run, more))), "run", {"largest": 1 << 30})


_STEADY = [1.0, 1.01, 0.99, 1.02, 0.98]


def _times(factor: float, times: Sequence[float] = _STEADY) -> list[float]:
    return [factor * time for time in times]


@pytest.mark.parametrize(
    ("factor", "copied", "verdict"),
    [
        (2.0, 16 * _MIB, Verdict.REPRODUCED),
        (2.0, 4096, Verdict.PARTLY),
        (1.0, 16 * _MIB, Verdict.PARTLY),
        (1.0, 4096, Verdict.REFUTED),
        (1.0, 32 * _MIB, Verdict.REFUTED),
        (1.5, 4096, Verdict.UNCLEAR),
        (1.5, 16 * _MIB, Verdict.PARTLY),
    ],
)
def test_a_claim_can_come_out_each_way(factor: float, copied: int, verdict: Verdict) -> None:
    (claim,) = catalogue.load(_TEXT).claims
    judged = judge(claim, [_run({"overlay2": _times(factor), "btrfs": _STEADY}, copied)])
    assert judged.verdict is verdict, judged.reason
    assert judged.ours is not None
    assert judged.ours.middle == pytest.approx(factor)
    assert judged.ours.low <= factor <= judged.ours.high
    assert "opening is slower" in judged.reason


def test_a_step_over_the_whole_is_a_share_of_each_sample_however_samples_differ() -> None:
    text = _TEXT.replace('step = ["open", "fsync"], target = "overlay2"', 'step = "open", target = "btrfs"')
    (claim,) = catalogue.load(text.replace("least = 1.5", "least = 0.45\nmost = 0.55")).claims
    (share, _) = judge(claim, [_run({"btrfs": [1.0, 9.0, 3.0, 30.0, 0.1]})]).findings
    assert share.outcome is Outcome.HOLDS
    assert share.ratio is not None
    assert (share.ratio.low, share.ratio.high) == pytest.approx((0.5, 0.5))


def test_few_samples_of_a_time_cannot_tell_however_far_apart() -> None:
    (claim,) = catalogue.load(_TEXT).claims
    judged = judge(claim, [_run({"overlay2": [9.0, 9.1, 9.2], "btrfs": [1.0, 1.1, 1.2]})])
    assert [finding.outcome for finding in judged.findings] == [Outcome.UNCLEAR, Outcome.HOLDS], "a counter needs one"


def test_what_was_not_measured_is_said_with_its_reason() -> None:
    (claim,) = catalogue.load(_TEXT).claims
    own = {"claims": {"scale": {"large": 16 * _MIB, "largest": 64 * _MIB}, "left_out": {"btrfs": "no such device"}}}
    partly = judge(claim, [_run({"overlay2": _STEADY}, more=own)])
    assert partly.verdict is Verdict.PARTLY
    assert "btrfs: no such device" in partly.reason
    swapped = dataclasses.replace(claim, tests=claim.tests[::-1])
    without = _run({"overlay2": _STEADY}, copied=4096, more=own)
    assert judge(claim, [without]).verdict is Verdict.UNCLEAR, "what it is mainly about was not tested"
    assert judge(swapped, [without]).verdict is Verdict.REFUTED
    nothing = judge(claim, [_run({}, failures=[Failure("overlay2", "", "it is full")])])
    assert nothing.verdict is Verdict.UNTESTABLE
    assert nothing.ours is None
    assert "it is full" in nothing.reason
    larger = {"claims": {"scale": {"large": 16 * _MIB, "largest": 8 * _MIB}, "left_out": {}}}
    assert "larger --profile" in judge(claim, [_run({}, more=larger)]).reason


def test_a_stand_in_decides_nothing_but_counters_of_its_form_on_disk() -> None:
    real = '[real.overlay2]\nfact = ["status", "mechanism"]\nvalue = "the kernel\'s own"\n'
    text = f'structural = ["bytes copied up"]\n{real}{_TEXT}'
    run = _run({"overlay2": _times(2.0), "btrfs": _STEADY})
    for mechanism, outcome in (("the kernel's own", Outcome.HOLDS), ("FUSE", Outcome.UNTESTABLE)):
        facts = {"targets": {"overlay2": {"status": {"mechanism": mechanism}}}}
        (claim,) = catalogue.load(text).claims
        found = judge(claim, [dataclasses.replace(run, fingerprint=facts)]).findings
        assert [finding.outcome for finding in found] == [outcome, Outcome.HOLDS]
        assert ("overlay2 was FUSE in run, which gives 2 [" in found[0].reason) == (outcome is Outcome.UNTESTABLE)
        (claim,) = catalogue.load(text.replace("least = 1.5", "least = 1.5\nany_kind = true")).claims
        assert judge(claim, [dataclasses.replace(run, fingerprint=facts)]).findings[0].outcome is Outcome.HOLDS


def test_each_part_is_judged_by_a_run_that_has_both_sides_of_it() -> None:
    (claim,) = catalogue.load(_TEXT).claims
    apart = [_run({"overlay2": _times(2.0)}), _run({"btrfs": _STEADY})]
    assert judge(claim, apart).findings[0].outcome is Outcome.UNTESTABLE, "never one side of each"
    together = [*apart, _run({"overlay2": _times(3.0), "btrfs": _STEADY})]
    found = judge(claim, together)
    assert found.verdict is Verdict.REPRODUCED
    assert found.ours is not None
    assert found.ours.middle == pytest.approx(3.0)


def test_a_parameter_younger_than_the_run_file_had_its_default() -> None:
    (claim,) = catalogue.load(_TEXT).claims
    run = _run({"overlay2": _times(2.0), "btrfs": _STEADY})
    for benchmark in run.benchmarks:
        del benchmark["params"]["depth"]
    assert judge(claim, [run]).verdict is Verdict.REPRODUCED
    for benchmark in run.benchmarks:
        benchmark["params"]["change"] = 8192
    assert judge(claim, [run]).verdict is Verdict.UNTESTABLE, "that is another experiment"
    (deep,) = catalogue.load(_TEXT.replace("target =", "depth = 16, target =")).claims
    old = _run({"overlay2": _times(2.0), "btrfs": _STEADY})
    for benchmark in old.benchmarks:
        del benchmark["params"]["depth"]
    assert judge(deep, [old]).verdict is Verdict.UNTESTABLE, "the default is not what was asked for"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("least = 1.5\n", "", "no bound"),
        ('figure = "bytes copied up", ', "", "neither a step nor a counter"),
        ('theirs = "2 times"\n', "", "theirs"),
        ("copyup-first-write", "nonesuch", "nonesuch"),
        ('target = "btrfs"', 'colour = "blue", target = "btrfs"', "colour"),
        ("[[claim.test]]", 'cannot = "x"\n[[claim.test]]', "either"),
    ],
)
def test_a_catalogue_with_a_mistake_is_refused(old: str, new: str, says: str) -> None:
    assert old in _TEXT
    with pytest.raises(InvalidArgument, match=says):
        catalogue.load(_TEXT.replace(old, new, 1))


def test_the_verdict_file_has_what_a_report_needs() -> None:
    claims = catalogue.load(_TEXT).claims
    run = _run({"overlay2": _times(2.0), "btrfs": _STEADY})
    document = json.loads(json.dumps(scoreboard.document([judge(claim, [run]) for claim in claims], [run])))
    assert document["layerfs_claims"] == 1
    assert document["fingerprint"] == run.fingerprint
    (entry,) = document["claims"]
    assert {"id", "claim", "source", "theirs", "ours", "verdict", "reason"} <= set(entry)
    assert entry["verdict"] == "reproduced"
    assert entry["ours"]["ratio"] == pytest.approx(2.0)


# The command


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory on a disk, which must be empty at the end, with nothing mounted in it."""
    path = Path("/var/tmp") / f"layerfs-test-claims-{os.getpid()}"
    path.mkdir()
    yield path
    left = [str(mount.target) for mount in mount_table.read() if mount.target.is_relative_to(path)]
    for target in reversed(left):
        subprocess.run(["umount", "--lazy", target], check=False)
    names = os.listdir(path)
    shutil.rmtree(path, ignore_errors=True)
    assert (left, names) == ([], [])


def _claims(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_CLAIMS, *arguments], capture_output=True, text=True, check=False, cwd=cwd)


def test_claims_are_measured_judged_and_can_be_judged_again(scratch: Path, tmp_path: Path) -> None:
    for driver in ("overlay2", "vfs"):
        if not registry.load(driver).probe(scratch).usable:
            pytest.skip(f"{driver} does not work on this host")
    ids = "docs-overlay2-shares,tarasov-vfs-copies-all,petazzoni-aufs-shares,slacker"
    only = ("--only", ids, "--driver", "overlay2,vfs")
    options = ("--profile", "smoke", "--size", "2M", "--scratch", str(scratch), "--backing", "dir", "--seed", "1")
    done = _claims(*only, *options, "-o", "verdicts.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "verdicts.json").read_text())
    verdicts = {entry["id"]: entry for entry in written["claims"]}
    assert verdicts["docs-overlay2-shares"]["verdict"] == "reproduced"
    assert verdicts["docs-overlay2-shares"]["ours"]["ratio"] == pytest.approx(1, abs=0.1)
    outcomes = {test["shows"]: test["outcome"] for test in verdicts["tarasov-vfs-copies-all"]["tests"]}
    assert outcomes["a fresh layer holds all that its parent does"] == "holds"
    assert verdicts["petazzoni-aufs-shares"]["verdict"] == "cannot be tested"
    assert "--driver" in verdicts["petazzoni-aufs-shares"]["reason"]
    assert verdicts["slacker"]["verdict"] == "cannot be tested"
    assert written["fingerprint"]["targets"]["overlay2"]["driver"] == "overlay2"
    assert all(name in done.stdout for name in verdicts)
    again = _claims("--only", ids, "--json", "verdicts-run.json", "-o", "again.json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == json.loads((tmp_path / "again.json").read_text())
    judged_again = {entry["id"]: entry["verdict"] for entry in json.loads(again.stdout)["claims"]}
    assert judged_again == {name: entry["verdict"] for name, entry in verdicts.items()}


def test_the_list_has_every_claim_with_its_rule(known: Catalogue, tmp_path: Path) -> None:
    done = _claims("--list", "--json", cwd=tmp_path)
    assert [entry["id"] for entry in json.loads(done.stdout)] == [claim.id for claim in known.claims]
    shown = _claims("--list", cwd=tmp_path).stdout
    assert all(claim.says in shown for claim in known.claims)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--only", "nonesuch"], "nonesuch"), (["missing.json"], "missing.json"), (["--driver", "nonesuch"], "nonesuch")],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = _claims(*arguments, cwd=tmp_path)
    assert done.returncode in (2, 10), done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [[], ["--guest"]])
@pytest.mark.parametrize("place", ["here/a", "file/a", "/proc/a", f"{'long' * 63}"])
def test_where_verdicts_cannot_be_written_nothing_is_measured(place: str, more: list[str], tmp_path: Path) -> None:
    (tmp_path / "here/a").mkdir(parents=True)
    (tmp_path / "file").touch()
    done = _claims("--only=docs-overlay2-shares", "--driver=overlay2", "--size=1M", "-o", place, *more, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert place in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "here"]
