"""containerd itself with `layerfs serve containerd` as its snapshotter, on every driver that works here."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from layerfs import mount_table, mounts, registry
from layerfs.testing.engines import BUSYBOX, Served, busybox_image, layerfs, listens, running, wait_until
from layerfs.testing.images import tar_of

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="containerd needs root"),
    pytest.mark.skipif(
        not all(map(shutil.which, ("containerd", "runc"))), reason="containerd or runc is not installed"
    ),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="busybox-static is not installed"),
]

IMAGE = "docker.io/library/busybox:test"

# What takes part in none of the tests, or in nothing that a private containerd may touch.
CONFIG = """
version = 2
root = "{0}/root"
state = "{0}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing",
  "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "{0}/containerd.sock"
[ttrpc]
  address = "{0}/ttrpc.sock"
"""


class Containerd:
    """A containerd of its own, and the store that it works on."""

    def __init__(self, place: Path, driver: str) -> None:
        self.place = place
        self.socket = place / "containerd.sock"
        self.served = Served("containerd", driver, place)
        self.served.start()
        printed = layerfs("serve", "containerd", "--print-config", "--socket", self.served.socket)
        (place / "config.toml").write_text(CONFIG.format(place) + printed)

    def ctr(self, *arguments: str | Path, code: int = 0) -> str:
        """Run ctr; what it prints. Commands that know a snapshotter are given ours."""
        given = [str(argument) for argument in arguments]
        for place, name in enumerate(given[:2], 1):
            if name in ("run", "snapshots", "import"):
                given[place:place] = ["--snapshotter", "layerfs"]
        done = subprocess.run(["ctr", "-a", self.socket, *given], capture_output=True, check=False, timeout=120)
        said = done.stderr.decode(errors="replace") + self.served.log.read_text()[-3000:]
        assert done.returncode == code, (given, done.stdout, said)
        return done.stdout.decode(errors="surrogateescape")

    def run(self, name: str, *command: str, options: tuple[str, ...] = ("--rm",), code: int = 0) -> str:
        # The host's network, because making another takes more than the tests need.
        return self.ctr("run", *options, "--net-host", IMAGE, name, *command, code=code)

    def snapshots(self) -> list[str]:
        lines = self.ctr("snapshots", "ls").splitlines()[1:]
        return [line.split()[0] for line in lines]

    def start_again(self) -> None:
        """Start the server, and wait until containerd, which tries every few seconds, has found it."""
        self.served.start()
        command = ["ctr", "-a", str(self.socket), "snapshots", "--snapshotter", "layerfs", "ls"]
        wait_until(lambda: subprocess.run(command, capture_output=True, check=False).returncode == 0, "it is found")

    def commits(self) -> int:
        """How many commits the server has done."""
        return self.served.log.read_text().count(" Commit ")


def _wait_for_commits(containerd: Containerd, count: int, process: subprocess.Popen[bytes]) -> None:
    wait_until(lambda: containerd.commits() >= count or process.poll() is not None, "layers are unpacked")


@pytest.fixture(params=registry.names(), scope="module")
def containerd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    place = tmp_path_factory.mktemp("engine")
    probe = registry.load(request.param).probe(place)
    if not probe.usable:
        pytest.skip(f"{request.param}: {probe.reason}; {probe.remedy}")
    engine = Containerd(place, request.param)
    with ExitStack() as stack:
        stack.callback(engine.served.stop)
        command = ["containerd", "--config", str(engine.place / "config.toml"), "--log-level", "warn"]
        stack.enter_context(running(command, place / "containerd.log"))
        wait_until(lambda: listens(engine.socket), "containerd listens")
        engine.ctr("images", "import", busybox_image(place / "busybox.tar", IMAGE))
        yield engine
    left = [point.target for point in mount_table.read() if point.target.is_relative_to(place)]
    for target in reversed(left):
        mounts.unmount(target, lazy=True)
    assert left == []


def test_a_container_runs_on_an_imported_image(containerd: Containerd) -> None:
    assert len(containerd.snapshots()) == 2
    assert containerd.run("one") == "hello\n"
    assert containerd.run("one", "/bin/ls", "/etc/passwd", code=1) == ""  # the upper layer deletes it
    script = "echo upper > /data/file; rm /etc/greeting; mv /data /moved && cat /moved/file"
    assert containerd.run("one", "/bin/sh", "-c", script) == "upper\n"
    assert containerd.run("one", "/bin/cat", "/data/file", "/etc/greeting") == "lower\nhello\n"
    containerd.run("one", "/bin/sh", "-c", "exit 7", code=7)
    assert len(containerd.snapshots()) == 2


@pytest.mark.thorough
def test_several_containers_at_once(containerd: Containerd) -> None:
    def run(number: int) -> str:
        script = f"echo {number} > /data/file; ls /data; cat /data/file"
        return containerd.run(f"many-{number}", "/bin/sh", "-c", script)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(8))) == [f"file\n{number}\n" for number in range(8)]
    assert len(containerd.snapshots()) == 2


def test_what_a_container_changed_can_be_committed_and_compared(containerd: Containerd) -> None:
    containerd.run("work", "/bin/sh", "-c", "echo new > /data/new; rm /data/file", options=())
    diff = containerd.ctr("snapshots", "diff", "work").encode(errors="surrogateescape")
    with tarfile.open(fileobj=io.BytesIO(diff)) as tar:
        names = set(tar.getnames())
    assert {"data/new", "data/.wh.file"} <= names
    containerd.ctr("snapshots", "commit", "done", "work")
    containerd.ctr("snapshots", "prepare", "next", "done")
    containerd.ctr("snapshots", "commit", "done", "next", code=1)  # the name is taken
    containerd.ctr("snapshots", "rm", "done", code=1)  # it has a child
    containerd.ctr("containers", "rm", "work")
    assert "done" in containerd.snapshots()
    for key in ("next", "done"):
        containerd.ctr("snapshots", "rm", key)
    assert len(containerd.snapshots()) == 2


def test_containers_outlive_the_server(containerd: Containerd) -> None:
    script = "echo before > /data/state; while true; do sleep 1; done"
    containerd.run("long", "/bin/sh", "-c", script, options=("-d",))

    pid = containerd.ctr("tasks", "ls").splitlines()[1].split()[1]
    seen = Path("/proc", pid, "root")  # what ctr shows of the output of an exec is not always all
    wait_until((seen / "data/state").exists, "the container writes")
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            code = containerd.served.stop(number)
            assert code == (0 if number is signal.SIGTERM else -number)
            assert (seen / "etc/greeting").read_text() == "hello\n"
            script = f"echo {code} > /data/down && rm -f /data/file && ls /bin/sh"
            containerd.ctr("tasks", "exec", "--exec-id", f"exec{code}", "long", "/bin/sh", "-c", script)
            containerd.start_again()
            assert (seen / "data/down").read_text() == f"{code}\n"
            assert sorted(os.listdir(seen / "data")) == ["down", "state"]
            assert containerd.run("other") == "hello\n"
    finally:
        containerd.ctr("tasks", "kill", "--signal", "SIGKILL", "long")
        wait_until(lambda: "RUNNING" not in containerd.ctr("tasks", "ls"), "the container ends")
        containerd.ctr("tasks", "rm", "long")
        containerd.ctr("containers", "rm", "long")
    assert len(containerd.snapshots()) == 2


@pytest.mark.thorough
def test_a_server_killed_in_the_middle_of_an_unpack_can_go_on(containerd: Containerd) -> None:
    layers = [tar_of({f"d{n}": None, f"d{n}/f": bytes([n]) * 200_000, "last": b"%d\n" % n}) for n in range(12)]
    name = "docker.io/library/deep:test"
    archive = busybox_image(containerd.place / "deep.tar", name, *layers)
    for _ in range(3):
        begin = containerd.commits()
        wanted = random.randint(1, 10)
        command = ["ctr", "-a", str(containerd.socket), "images", "import", "--snapshotter", "layerfs", str(archive)]
        with running(command, containerd.place / "import.log") as import_:
            _wait_for_commits(containerd, begin + wanted, import_)
            containerd.served.stop(signal.SIGKILL)
            containerd.start_again()
            import_.wait(60)
        if name in containerd.ctr("images", "ls"):
            containerd.ctr("images", "rm", "--sync", name)
    containerd.ctr("images", "import", archive)
    assert len(containerd.snapshots()) == 2 + 12
    out = containerd.ctr("run", "--rm", "--net-host", name, "deep", "/bin/sh", "-c", "cat /last; ls / | cat")
    assert out.splitlines()[0] == "11"
    assert {f"d{n}" for n in range(12)} <= set(out.split())
    containerd.ctr("images", "rm", "--sync", name)
    assert len(containerd.snapshots()) == 2
    layerfs("check", "--root", containerd.served.root)


def test_garbage_collection_takes_everything_away(containerd: Containerd) -> None:
    containerd.ctr("images", "rm", "--sync", IMAGE)
    try:
        assert containerd.snapshots() == []
        listing = ("layers", "--json", "--root", containerd.served.root)
        wait_until(lambda: json.loads(layerfs(*listing)) == [], "the layers are gone from the store")
    finally:
        containerd.ctr("images", "import", containerd.place / "busybox.tar")
