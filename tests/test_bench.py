"""``layerfs bench`` as a user runs it: on real stores, in a process of its own, interrupted, and without root."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs import mount_table, registry
from layerfs.kernel import loop

_COMMAND = [sys.executable, "-m", "layerfs.cli", "bench"]
_STEPS = {
    "copyup-first-write": {"make the layer", "open", "first write", "fsync", "second write"},
    "diff-apply": {"apply", "diff", "usage", "small diff"},
    "layer-lifecycle": {"create", "mount", "unmount", "remove"},
    "randread": {"read"},
    "randwrite": {"write"},
    "rewrite-upper": {"rewrite"},
    "seqread-lower": {"read"},
    "seqwrite-new": {"write"},
}


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory on a disk, which must be empty at the end, with no mount and no loop device left."""
    path = Path("/var/tmp") / f"layerfs-test-bench-{os.getpid()}"
    path.mkdir()
    yield path
    left = [str(mount.target) for mount in mount_table.read() if mount.target.is_relative_to(path)]
    for target in reversed(left):
        subprocess.run(["umount", "--lazy", target], check=False)
    names = os.listdir(path)
    loops = _loops(path)
    shutil.rmtree(path, ignore_errors=True)
    assert (left, names, loops) == ([], [], [])


def _loops(scratch: Path) -> list[str]:
    """Loop devices with a file below ``scratch``; the kernel frees one a moment after its last user went."""
    for _ in range(50):
        found = [
            file.read_text().strip()
            for file in Path("/sys/block").glob("loop*/loop/backing_file")
            if str(scratch) in file.read_text()
        ]
        if not found:
            break
        time.sleep(0.1)
    return found


def _usable(scratch: Path) -> list[str]:
    return [name for name in registry.names() if registry.load(name).probe(scratch).usable]


def _bench(scratch: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*_COMMAND, "--scratch", str(scratch), "--seed", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_all_usable_drivers_run_all_workloads(scratch: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    works = [word for name in _STEPS for word in ("--workload", name)]
    done = _bench(scratch, "--driver", "all", "--size", "4M", "--rounds", "2", "--output", str(file), *works)
    assert done.returncode == 0, done.stderr
    assert str(file) in done.stdout
    run = json.loads(file.read_text())
    drivers = _usable(scratch)
    steps = {
        (b["extra_info"]["target"], b["extra_info"]["workload"], b["extra_info"]["step"]) for b in run["benchmarks"]
    }
    expected = {(driver, work, step) for driver in drivers for work, names in _STEPS.items() for step in names}
    control = {step for step in steps if step[0] == "native"}
    assert steps - control == expected
    assert {work for _, work, _ in control} == set(_STEPS) - {"diff-apply", "layer-lifecycle"}
    assert set(run["layerfs"]["left_out"]) == set(registry.names()) - set(drivers)
    for driver in drivers:
        assert driver in done.stdout
        assert run["layerfs"]["fingerprint"]["targets"][driver]["driver"] == driver
    for benchmark in run["benchmarks"]:
        assert len(benchmark["stats"]["data"]) == 2
        assert all(seconds > 0 for seconds in benchmark["stats"]["data"]), benchmark["fullname"]
    assert all(state["as_asked"] for b in run["benchmarks"] for state in b["extra_info"]["cache"])


def test_copy_up_is_counted_in_whole_files_or_blocks_and_is_never_negative(scratch: Path, tmp_path: Path) -> None:
    wanted = [name for name in ("overlay2", "btrfs", "vfs") if name in _usable(scratch)]
    file = tmp_path / "run.json"
    arguments = ("--size", "8M", "--rounds", "3", "--workload", "copyup-first-write", "--output", str(file))
    done = _bench(scratch, "--driver", ",".join(wanted), *arguments)
    assert done.returncode == 0, done.stderr
    counted = {
        b["extra_info"]["target"]: b["extra_info"]["counters"]["bytes copied up"]
        for b in json.loads(file.read_text())["benchmarks"]
    }
    assert all(number >= 0 for numbers in counted.values() for number in numbers), counted
    copied = {target: max(numbers) for target, numbers in counted.items()}
    if "overlay2" in wanted:
        assert 8 << 20 <= copied["overlay2"] < 9 << 20
    if "btrfs" in wanted:
        assert 8192 <= copied["btrfs"] < 1 << 20
    assert copied["vfs"] < 1 << 20, "it was copied when the layer was made"


def test_counters_show_what_sets_the_drivers_apart(scratch: Path, tmp_path: Path) -> None:
    """Shared page cache, fragments, whole copies of a file of which little changes."""
    wanted = [name for name in ("overlay2", "btrfs") if name in _usable(scratch)]
    file = tmp_path / "run.json"
    works = "cache-share,frag-read,copyup-crossover,append-many,append-big,start-stop-density,deep-layers"
    arguments = ("--no-native", "--size", "4M", "--rounds", "1", "--workload", works, "--output", str(file))
    done = _bench(scratch, "--driver", ",".join(wanted), *arguments)
    assert done.returncode == 0, done.stderr
    extras = [b["extra_info"] for b in json.loads(file.read_text())["benchmarks"]]
    counters = {(e["label"], c, e["target"]): v[0] for e in extras for c, v in e["counters"].items()}
    looked_up = [e["cache"] for e in extras if e["workload"] == "deep-layers"]
    assert looked_up, "or what a driver has just copied would be known by name, and what it has mounted not"
    assert all(state["asked"] == "cold" and state["as_asked"] for states in looked_up for state in states)
    assert all(looked_up)
    if "overlay2" in wanted:
        assert counters["cache-share", "bytes cached", "overlay2"] < 5 << 20, "one place for four readers"
        assert counters["copyup-crossover 1", "bytes copied up", "overlay2"] >= 4 << 20
        assert counters["append-big", "bytes copied up", "overlay2"] >= 4 << 20
    if "btrfs" in wanted:
        assert counters["cache-share", "bytes cached", "btrfs"] > 15 << 20, "one place for each reader"
        assert counters["copyup-crossover 1", "bytes copied up", "btrfs"] < 1 << 20
        assert counters["frag-read", "extents", "btrfs"] > 50


def test_the_remaining_workloads_run(scratch: Path, tmp_path: Path) -> None:
    works = "reread,bs-crossover,parallel-light,parallel-heavy,tree-walk,change-tree"
    arguments = ("--size", "4M", "--rounds", "1", "--workload", works, "--output", str(tmp_path / "run.json"))
    done = _bench(scratch, "--driver", "overlay2", *arguments)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in works.split(","))


def test_json_is_the_run_file_and_nothing_else(scratch: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    arguments = ("--driver", "vfs", "--size", "1M", "--rounds", "1", "--workload", "layer-lifecycle", "--json")
    done = _bench(scratch, *arguments, "--output", str(file))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(file.read_text())


def test_what_cannot_work_is_refused_before_anything_is_measured(scratch: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = ("--driver", "vfs", "--size", "1M", "--rounds", "1", "--workload", "layer-lifecycle")
    for more, said in (
        (("--output", str(tmp_path)), "is a directory"),
        (("--output", str(tmp_path / "file" / "run.json")), "is no directory"),
        (("--output", str(tmp_path), "--guest"), "is a directory"),
        (("--output", "/proc/run.json"), "'/proc/run.json' cannot be written"),
        (("--max-time", "1"), "--max-time has no effect"),
        (("--precision", "1"), "--precision has no effect"),
    ):
        done = _bench(scratch, *arguments, *more)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, "not even a warning about the machine, which comes with figures"
        assert said in done.stderr


def test_the_run_file_goes_to_results_where_there_is_one(scratch: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    arguments = ["--driver", "vfs", "--no-native", "--size", "1M", "--rounds", "1", "--workload", "seqwrite-new"]
    done = subprocess.run(
        [*_COMMAND, "--scratch", str(scratch), *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").iterdir()
    assert file.name.endswith("-vfs-1M.json")


@pytest.mark.parametrize(
    ("given", "filesystem", "disk"),
    [("ext4", "ext4", "loop"), ("xfs-noreflink", "xfs", "loop"), ("tmpfs", "tmpfs", "")],
)
def test_the_backing_can_be_chosen(scratch: Path, tmp_path: Path, given: str, filesystem: str, disk: str) -> None:
    file = tmp_path / "run.json"
    arguments = ("--size", "2M", "--rounds", "1", "--workload", "seqwrite-new", "--output", str(file))
    done = _bench(scratch, "--driver", "overlay2", "--backing", given, *arguments)
    assert done.returncode == 0, done.stderr
    for facts in json.loads(file.read_text())["layerfs"]["fingerprint"]["targets"].values():
        assert facts["backing"]["filesystem"] == filesystem
        assert str(facts["backing"].get("disk", "")).startswith(disk)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A block device of 2G, with nothing on it."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    with open(tmp_path / "disk.img", "w+b") as file:
        file.truncate(2 << 30)
        path, fd = loop.attach(file.fileno(), "disk")
    try:
        yield str(path)
    finally:
        os.close(fd)


@pytest.mark.parametrize("driver", ["overlay2", "btrfs", "zfs"])
def test_a_driver_stands_on_a_device_that_is_wiped_afterwards(
    scratch: Path, tmp_path: Path, device: str, driver: str
) -> None:
    if driver not in _usable(scratch):
        pytest.skip(f"{driver} does not work on this host")
    filesystem, file = {"overlay2": "ext4"}.get(driver, driver), tmp_path / "run.json"
    arguments = ["--driver", driver, "--device", device, "--size", "2M", "--rounds", "1", "--output", str(file)]
    arguments += ["--workload", "seqwrite-new,layer-lifecycle"]
    subprocess.run(["mkswap", device], check=True, capture_output=True)
    done = _bench(scratch, *arguments)
    assert done.returncode == 6, done.stderr
    assert f"{device!r} already holds data (swap)" in done.stderr
    done = _bench(scratch, *arguments, "--force")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["layerfs"]["fingerprint"]["targets"]
    assert ("native" in found) is (driver != "zfs")
    assert ("Left out: native" in done.stderr) is (driver == "zfs")
    for facts in found.values():
        assert filesystem in facts["backing"]["filesystem"] or driver == "zfs"
        assert facts["backing"].get("disk", Path(device).name) == Path(device).name
    assert subprocess.run(["blkid", "--probe", device], capture_output=True, check=False).stdout == b"", "wiped"


def test_small_files_are_many_in_a_sample_and_the_figures_are_those_of_one(scratch: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    arguments = ["--driver", "overlay2", "--size", "4K,64K,1M", "--rounds", "1", "--output", str(file)]
    works = ["seqwrite-new", "seqread-lower", "reread", "rewrite-upper", "randread", "randwrite", "bs-crossover"]
    works += ["copyup-first-write", "copyup-crossover", "parallel-light", "frag-read", "layer-lifecycle"]
    done = _bench(scratch, *arguments, "--workload", ",".join(works))
    assert done.returncode == 0, done.stderr
    assert "Left out: randread 4K: the file is one block" in done.stderr
    assert "Left out: frag-read 64K:" in done.stderr
    found = {entry["fullname"]: entry for entry in json.loads(file.read_text())["benchmarks"]}
    labels = {entry["extra_info"]["label"] for entry in found.values()}
    assert {
        f"{work} {size}" for work in ("seqwrite-new", "reread", "copyup-first-write") for size in ("4K", "64K", "1M")
    } <= labels
    assert {"randwrite 64K", "bs-crossover 64K 64K", "bs-crossover 4K 4K", "frag-read 1M", "layer-lifecycle"} <= labels
    assert not {"randwrite 4K", "bs-crossover 4K 64K", "frag-read 4K", "layer-lifecycle 4K"} & labels
    for size, files in ((4096, 256), (65536, 64)):
        written = found[f"seqwrite-new/write[overlay2-{size >> 10}K]"]["extra_info"]
        assert written["bytes"] == [size]
        assert sum(count for _, count in written["latencies"][0]) == files
        copied = found[f"copyup-first-write/open[overlay2-{size >> 10}K]"]["extra_info"]["counters"]
        assert size <= copied["bytes copied up"][0] < size + 4096
    cold = found["seqread-lower/read[overlay2-4K-cold]"]["extra_info"]["cache"]
    assert cold[0]["as_asked"] or cold[0]["how"] == "fadvise"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--driver", "nonesuch"], 2, "nonesuch"),
        (["--driver", "vfs", "--size", "1K"], 2, "4K"),
        (["--driver", "vfs", "--size", "4K", "--workload", "randread"], 2, "one block"),
        (["--driver", "vfs", "--workload", "nonesuch"], 2, "seqwrite-new"),
        (["--driver", "vfs", "--size", "900P"], 9, "free"),
        (["--driver", "vfs", "--backing", "nonesuch", "--size", "1M"], 2, "nonesuch"),
        (["--driver", "vfs", "--device", "/dev/nonesuch", "--size", "1M"], 2, "No such file"),
        (["--driver", "vfs", "--device", "/dev/null", "--backing", "dir"], 2, "on no device"),
        (["--driver", "btrfs", "--device", "/dev/null", "--backing", "ext4"], 2, "btrfs does not work on ext4"),
        (["--driver", "vfs,overlay2", "--device", "/dev/null"], 2, "for one driver"),
        (["--driver", "vfs", "--device", "/dev/null", "--calibrate"], 2, "for one driver"),
        (["--driver", "vfs", "--device", "/dev/null", "--guest"], 2, "a guest sees no device"),
        (["--driver", "vfs", "--force"], 2, "--force has no effect"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_made(
    scratch: Path, arguments: list[str], code: int, says: str
) -> None:
    done = _bench(scratch, *arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_fio_its_package_is_named(scratch: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path)}
    arguments = ["--driver", "vfs", "--size", "1M", "--workload", "randread"]
    done = subprocess.run(
        [*_COMMAND, "--scratch", str(scratch), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 3
    assert "package fio" in done.stderr


@pytest.mark.parametrize("driver", ["overlay2", "btrfs"])
def test_an_interrupt_at_any_moment_leaves_nothing_and_ends_with_130(scratch: Path, driver: str) -> None:
    if driver not in _usable(scratch):
        pytest.skip(f"{driver} does not work on this host")
    source = random.Random()
    for attempt in range(6):
        delay, number = source.uniform(0, 4), source.choice([signal.SIGINT, signal.SIGTERM])
        command = [*_COMMAND, "--scratch", str(scratch), "--driver", driver]
        command += ["--no-native", "--size", "16M", "--rounds", "100"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            _wait_for_handler(process.pid)
            time.sleep(delay)
            process.send_signal(number)
            if attempt % 2:
                time.sleep(0.05)
                process.send_signal(signal.SIGINT)
            errors = process.communicate(timeout=60)[1]
        context = f"{number.name} after {delay:.3f} s: {errors}"
        assert process.returncode == 130, context
        assert "Traceback" not in errors, context
        assert os.listdir(scratch) == [], context
        assert not [mount for mount in mount_table.read() if mount.target.is_relative_to(scratch)], context
        assert _loops(scratch) == [], context


def _wait_for_handler(pid: int) -> None:
    """Until the interpreter has started the program, whose handler for SIGTERM then is there (proc_pid_status(5))."""
    bit = 1 << signal.SIGTERM - 1
    for _ in range(600):
        caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line)
        if int(caught.split()[1], 16) & bit:
            return
        time.sleep(0.05)
    raise AssertionError("the program did not start within 30 seconds")


def test_what_a_killed_run_left_goes_with_the_next_one(scratch: Path, tmp_path: Path) -> None:
    command = [*_COMMAND, "--scratch", str(scratch), "--driver", "overlay2", "--size", "16M", "--rounds", "100"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(scratch.glob("*/overlay2")):
            time.sleep(0.1)
        time.sleep(1)
        process.kill()
    assert os.listdir(scratch), "it was killed in the middle"
    arguments = ("--size", "1M", "--rounds", "1", "--workload", "seqwrite-new", "--output", str(tmp_path / "run.json"))
    done = _bench(scratch, "--driver", "overlay2", *arguments)
    assert done.returncode == 0, done.stderr


def test_it_runs_without_root(scratch: Path) -> None:
    """As another user where there is one to become; an ordinary user runs it as he is."""
    prefix: list[str] = []
    scratch.chmod(0o777)
    if os.geteuid() == 0:
        prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        if subprocess.run([*prefix, *_COMMAND, "--list"], capture_output=True, check=False).returncode:
            pytest.skip("another user cannot read this installation")
    own, file = scratch / "own", scratch / "out"  # pytest's own directory is closed to other users
    for place in (own, file):
        subprocess.run([*prefix, "mkdir", str(place)], check=True)
    works = [word for name in _STEPS for word in ("--workload", name)]
    command = [*_COMMAND, "--scratch", str(own), "--driver", "overlay2", "--size", "4M", "--rounds", "1", *works]
    done = subprocess.run(
        [*prefix, *command, "--output", str(file / "run.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "posix_fadvise" in done.stderr, "what cold means here is said"
    run = json.loads((file / "run.json").read_text())
    assert {b["extra_info"]["workload"] for b in run["benchmarks"]} == set(_STEPS)
    assert os.listdir(own) == []
    assert os.listdir(file) == ["run.json"]
    for place in (own, file):
        shutil.rmtree(place)
