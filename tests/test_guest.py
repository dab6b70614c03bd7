"""Guests as users run them: a real kernel each time, of the kind that LAYERFS_TEST_GUEST names (uml unless it does)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs import registry
from layerfs.errors import EnvironmentUnfit, InvalidArgument
from layerfs.guest import Request, run

KIND = os.environ.get("LAYERFS_TEST_GUEST", "uml")
NEEDED = {"uml": "linux.uml", "qemu": "qemu-system-x86_64"}[KIND]
LAYERFS = [sys.executable, "-m", "layerfs.cli"]

pytestmark = [
    pytest.mark.skipif(not shutil.which(NEEDED), reason=f"{NEEDED} is not installed; .ci/packages says what has it"),
    pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed"),
]


class Launcher:
    """``layerfs guest`` as a process in a directory of its own, of which nothing may stay."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "work"
        self.scratch = directory / "scratch"
        self.mark = uuid.uuid4().hex
        for place in (self.directory, self.scratch):
            place.mkdir()

    def start(self, *command: str, options: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
        given = {"TMPDIR": str(self.scratch), "LAYERFS_TEST_MARK": self.mark, **environment}
        return subprocess.Popen(
            [*LAYERFS, "guest", f"--kind={KIND}", "--memory=1G", *options, "--", *command],
            cwd=self.directory,
            env={**os.environ, **given},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(
        self, *command: str, options: tuple[str, ...] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*command, options=options, **environment)
        try:
            out, said = process.communicate(timeout=300)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, said)

    def left(self) -> list[str]:
        """What is still there of it: files, and processes once they have had a moment to end."""
        for _ in range(100):
            processes = [name for name in _processes() if self.mark in _environment(name)]
            if not processes:
                break
            time.sleep(0.1)
        return [*os.listdir(self.scratch), *processes]


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()]


def _environment(process: str) -> str:
    with contextlib.suppress(OSError):
        return Path("/proc", process, "environ").read_bytes().decode(errors="replace")
    return ""


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    made = Launcher(tmp_path)
    yield made
    assert made.left() == []


LOOK = """
import json, os, platform, sys
facts = {
    "kernel": platform.release(), "user": os.geteuid(), "directory": os.getcwd(), "python": sys.executable,
    "variable": os.environ["LAYERFS_TEST_MARK"], "terminal": os.isatty(1), "input": os.readlink("/proc/self/fd/0"),
    "disks": [open(d, "rb").seek(0, 2) for d in os.environ["LAYERFS_GUEST_DISKS"].split()],
}
json.dump(facts, open("facts.json", "w"))
for place in ("/etc", "/usr/lib", sys.argv[1], "/tmp", "/var/tmp", "/run"):
    open(f"{place}/{facts['variable']}", "w").close()
print("to the output")
print("to the errors", file=sys.stderr)
sys.exit(7)
"""


def test_a_command_runs_where_the_host_does_but_changes_only_what_it_may(launcher: Launcher) -> None:
    elsewhere = launcher.directory.parent
    done = launcher(sys.executable, "-c", LOOK, str(elsewhere), options=("--disk=64M", "--disk=100M"))
    assert (done.returncode, done.stdout, done.stderr) == (7, "to the output\n", "to the errors\n")
    facts = json.loads((launcher.directory / "facts.json").read_text())
    assert facts.pop("kernel") != os.uname().release
    assert facts == {
        "user": 0,
        "directory": str(launcher.directory),
        "python": sys.executable,
        "variable": launcher.mark,
        "terminal": False,
        "input": "/dev/null",
        "disks": [64 << 20, 100 << 20],
    }
    assert os.listdir(launcher.directory) == ["facts.json"]
    for place in ("/etc", "/usr/lib", str(elsewhere), "/tmp", "/var/tmp", "/run"):
        assert not Path(place, launcher.mark).exists()


def test_only_named_directories_are_changed(launcher: Launcher) -> None:
    named = launcher.directory / "named"
    named.mkdir()
    script = "echo here > named/file && mkdir -p named/a/b && ln -s file named/link; echo nowhere > file"
    done = launcher("sh", "-c", script, options=("--write=named",))
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(named)) == ["a", "file", "link"]
    assert (named / "link").read_text() == "here\n"
    assert os.listdir(launcher.directory) == ["named"]


def test_a_directory_that_the_guest_covers_is_there_all_the_same() -> None:
    place = Path("/var/tmp") / f"layerfs-test-guest-{os.getpid()}"
    launcher_place = place / "launcher"
    launcher_place.mkdir(parents=True)
    try:
        launcher = Launcher(launcher_place)
        done = launcher("sh", "-c", "cp /proc/sys/kernel/osrelease result; ls /var/tmp")
        needed = {place.name, *Path.cwd().parts[3:4]} if Path.cwd().is_relative_to("/var/tmp") else {place.name}
        assert done.returncode == 0
        assert set(done.stdout.split()) <= needed
        assert place.name in done.stdout
        assert (launcher.directory / "result").read_text().strip() != os.uname().release
        assert launcher.left() == []
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize(("command", "code"), [("kill -9 $$", 137), ("exec /etc/passwd", 126)])
def test_how_the_command_ended_is_passed_on(launcher: Launcher, command: str, code: int) -> None:
    assert launcher("sh", "-c", command).returncode == code


def test_a_command_may_be_named_from_the_working_directory(launcher: Launcher) -> None:
    program = launcher.directory / "program"
    program.write_text("#!/bin/sh\nexit 5\n")
    program.chmod(0o755)
    assert launcher("./program").returncode == 5


def test_a_command_that_is_not_there(launcher: Launcher) -> None:
    done = launcher("no-such-command")
    assert done.returncode == 127
    assert "'no-such-command'" in done.stderr


def test_output_is_passed_on_byte_for_byte(tmp_path: Path) -> None:
    data = hashlib.shake_256(b"layerfs").digest(3 << 20) + b"\r\n\x03\x04\x11\x13\n"
    (tmp_path / "data").write_bytes(data)
    with open(tmp_path / "output", "w+b") as output:
        assert run(Request(("cat", "data"), KIND, directory=tmp_path), output=output.fileno()) == 0
    assert (tmp_path / "output").read_bytes() == data


def test_output_comes_while_the_command_runs(launcher: Launcher) -> None:
    process = launcher.start("sh", "-c", "echo ready; until test -e go; do sleep 0.1; done; echo gone")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    (launcher.directory / "go").touch()
    assert process.communicate(timeout=120) == ("gone\n", "")
    assert process.returncode == 0


def test_a_terminal_is_one_in_the_guest_too(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    script = "import os; print(os.isatty(1), os.isatty(2)); open('two', 'w').write('')"
    code = run(Request((sys.executable, "-c", script), KIND, directory=tmp_path), output=theirs, errors=2)
    os.close(theirs)
    assert (code, os.read(ours, 4096).split()[0]) == (0, b"True")
    os.close(ours)
    assert os.listdir(tmp_path) == []  # nothing was named as writable


def test_a_guest_is_ended_when_its_time_is_over(launcher: Launcher) -> None:
    done = launcher("sleep", "1000", options=("--timeout=6",))
    assert done.returncode == 124
    assert done.stderr == "layerfs: the guest had not finished 'sleep 1000' after 6 s and was ended\n"


def test_an_interrupt_reaches_the_command(launcher: Launcher) -> None:
    script = "trap 'echo interrupted > trapped; exit 3' INT; echo ready; while :; do sleep 0.1; done"
    process = launcher.start("sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert (launcher.directory / "trapped").read_text() == "interrupted\n"


def test_a_command_that_will_not_be_interrupted_is_ended(launcher: Launcher) -> None:
    process = launcher.start("sh", "-c", "trap '' INT; echo ready; sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 130


def test_a_killed_launcher_leaves_nothing(launcher: Launcher) -> None:
    process = launcher.start("sh", "-c", "echo ready; sleep 1000", options=("--disk=1G",))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate(timeout=120)
    assert launcher.left() == []


def test_the_command_need_not_end_what_it_started(launcher: Launcher) -> None:
    done = launcher("sh", "-c", "(trap '' HUP TERM INT; exec sleep 1000) & echo started")
    assert (done.returncode, done.stdout) == (0, "started\n")


def test_a_kernel_that_dies_is_no_success(launcher: Launcher) -> None:
    done = launcher("sh", "-c", "sleep 1; echo c > /proc/sysrq-trigger")
    assert done.returncode == 1
    assert done.stderr.startswith(f"layerfs: the {KIND} guest ended before its command did; its console said: ")
    assert "sysrq" in done.stderr


def test_nobody_reads_the_output(launcher: Launcher) -> None:
    with launcher.start("yes") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "y\n"
        process.stdout.close()
        assert process.wait(timeout=120) == 141


def test_what_is_missing_is_named(launcher: Launcher, tmp_path: Path) -> None:
    done = launcher("true", PATH=str(tmp_path))
    package = {"uml": "user-mode-linux", "qemu": "qemu-system-x86"}[KIND]
    assert done.returncode == EnvironmentUnfit.exit_code
    assert (
        done.stderr
        == f"layerfs: a guest needs the program {NEEDED}, which was not found; install the package {package}\n"
    )


def test_the_whole_host_is_never_given_away(launcher: Launcher) -> None:
    done = launcher("true", options=("--write=/",))
    assert done.returncode == InvalidArgument.exit_code
    assert "--write /" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0 or KIND != "uml", reason="is about being root of a host that one is not root of")
def test_a_user_without_privileges_is_root_in_the_guest() -> None:
    libraries = os.pathsep.join(path for path in sys.path if path and not path.endswith(".zip"))
    place = Path("/var/tmp") / f"layerfs-test-guest-user-{os.getpid()}"
    place.mkdir()
    try:
        os.chown(place, 65534, 65534)
        done = subprocess.run(
            ["/usr/bin/python3", "-m", "layerfs.cli", "guest", "--", "sh", "-c", "id -u; mount -t tmpfs t /mnt; >file"],
            cwd=place,
            env={
                "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
                "PYTHONPATH": libraries,
                "HOME": str(place),
                "TMPDIR": str(place),
            },
            user=65534,
            group=65534,
            extra_groups=[],
            capture_output=True,
            text=True,
            check=False,
        )
        if "No module" in done.stderr:
            pytest.skip(f"the Python of the system cannot import layerfs as another user: {done.stderr}")
        assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
        assert (place / "file").stat().st_uid == 65534
    finally:
        shutil.rmtree(place)


def test_every_driver_works_in_the_guest(launcher: Launcher) -> None:
    done = launcher(*LAYERFS, "drivers", "--json")
    found = {driver["name"]: driver for driver in json.loads(done.stdout)}
    assert sorted(found) == registry.names()
    assert {name: driver["reason"] for name, driver in found.items() if not driver["usable"]} == {}


DEVICES = """
set -eu
modprobe dm_thin_pool && dmsetup targets | grep -q thin-pool
head -c 64M /dev/zero > /var/tmp/file && mkfs.btrfs -q -f --mixed /var/tmp/file
mkdir /var/tmp/tree && mount -o loop /var/tmp/file /var/tmp/tree && btrfs subvolume create /var/tmp/tree/volume
python3 -c 'import os; os.open("/dev/fuse", os.O_RDWR)'
unshare --user --map-root-user --mount mount -t tmpfs none /mnt
"""


def test_the_guest_has_device_mapper_loop_devices_fuse_and_user_namespaces(launcher: Launcher) -> None:
    done = launcher("sh", "-c", DEVICES)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_benchmark_runs_in_a_guest_and_its_run_file_says_so(tmp_path: Path) -> None:
    file = tmp_path / "results" / "run.json"
    file.parent.mkdir()
    options = ["--workload=seqwrite-new", "--driver=vfs,overlay2", "--size=1M", "--rounds=1", f"--output={file}"]
    command = [*LAYERFS, "bench", f"--guest={KIND}", f"--scratch={tmp_path}", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "seqwrite-new" in done.stdout
    fingerprint = json.loads(file.read_text())["layerfs"]["fingerprint"]
    assert fingerprint["guest"] == {"kind": KIND, "host": f"Linux {os.uname().release}"}
    assert os.uname().release not in fingerprint["kernel"]
    assert {target["backing"]["disk"] for target in fingerprint["targets"].values()} <= {"ubda", "vda"}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["results", "run.json"]


@pytest.mark.skipif(KIND != "uml", reason="takes two kernels; the one of uml is a file that can be copied")
def test_the_gate_compares_two_kernels_in_guests(tmp_path: Path) -> None:
    kernel, keep = shutil.copy(str(shutil.which(NEEDED)), tmp_path / "kernel"), tmp_path / "kept"
    options = ["--driver=overlay2", "--size=64K", "--workload=copyup-first-write", "--rounds=7", "--no-calibrate"]
    places = [f"--scratch={tmp_path}", f"--keep={keep}", "--json"]
    kernels = [f"--base-kernel={shutil.which(NEEDED)}", f"--head-kernel={kernel}"]
    done = subprocess.run(
        [*LAYERFS, "gate", "--max-time=0", *options, *places, *kernels], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr  # figures of a busy machine may differ; whether they do is not asked
    counters = {entry["key"]["counter"]: entry for entry in json.loads(done.stdout)["counters"]}
    assert counters["bytes copied up"]["verdict"] == "same"
    runs = sorted(keep.iterdir())
    assert len(runs) == 14
    assert {json.loads(run.read_text())["layerfs"]["fingerprint"]["guest"]["kind"] for run in runs} == {KIND}


@pytest.mark.parametrize("kernel", ["/nonesuch", "nonesuch"])
def test_a_kernel_that_is_not_there_is_no_regression(kernel: str, tmp_path: Path) -> None:
    command = [*LAYERFS, "gate", f"--guest={KIND}", f"--scratch={tmp_path}", "--driver=overlay2"]
    done = subprocess.run(
        [*command, f"--base-kernel={kernel}", f"--head-kernel={kernel}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == InvalidArgument.exit_code
    assert "nonesuch" in done.stderr
    assert len(done.stderr.splitlines()) == 1
