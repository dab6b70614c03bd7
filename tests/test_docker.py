"""Docker's own daemon with `layerfs serve docker` as its graph driver, on every driver that works here."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from layerfs import mount_table, mounts, registry
from layerfs.driver import Capability
from layerfs.store import Store
from layerfs.testing.engines import BUSYBOX, Served, busybox_layer, layerfs, running, wait_until

DOCKER = "/usr/bin/docker"  # Debian's, which fits its daemon

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="Docker needs root"),
    pytest.mark.skipif(shutil.which("dockerd") is None or not os.path.exists(DOCKER), reason="docker.io is missing"),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="busybox-static is not installed"),
]

PLUGINS = Path("/run/docker/plugins")  # where Docker looks for plugins; it has no setting for that
IMAGE = "bb:1"
GONE = "test -e /etc/passwd || echo gone"


class Docker:
    """A Docker daemon of its own, and the store that it works on."""

    def __init__(self, place: Path, driver: str) -> None:
        self.place = place
        self.name = f"layerfs-test-{os.getpid()}"
        self.served = Served("docker", driver, place, socket=PLUGINS / f"{self.name}.sock")
        (place / "daemon.json").write_text('{"experimental": true}')
        self.log = place / "dockerd.log"
        self.client = [DOCKER, "--host", f"unix://{place}/docker.sock"]
        self.command = [
            *("dockerd", "--config-file", str(place / "daemon.json"), "--storage-driver", self.name),
            *("--data-root", str(place / "root"), "--exec-root", str(place / "exec"), "--pidfile", str(place / "pid")),
            *("--host", f"unix://{place}/docker.sock", "--log-level", "warn", "--live-restore"),
            *("--iptables=false", "--ip6tables=false", "--bridge=none"),
        ]

    def started(self) -> Any:
        """The daemon, for the context."""
        return running(self.command, self.log)

    def wait(self) -> None:
        """Wait until the daemon answers."""
        command = [*self.client, "version"]
        wait_until(lambda: subprocess.run(command, capture_output=True, check=False).returncode == 0, "Docker answers")

    def raw(self, *arguments: str | Path, feed: bytes = b"", code: int = 0, **variables: str) -> bytes:
        """Run the client; what it prints."""
        command = [*self.client, *map(str, arguments)]
        environment = os.environ | {"DOCKER_BUILDKIT": "0", "DOCKER_CONFIG": str(self.place / "client")} | variables
        done = subprocess.run(
            command, input=feed, capture_output=True, check=False, timeout=120, env=environment, cwd=self.place
        )
        said = done.stderr.decode(errors="replace") + self.served.log.read_text()[-3000:]
        assert done.returncode == code, (arguments, done.stdout[-500:], said)
        return done.stdout

    def __call__(self, *arguments: str | Path, code: int = 0) -> str:
        return self.raw(*arguments, code=code).decode().strip()

    def run(self, *arguments: str, code: int = 0) -> str:
        return self("run", "--network", "none", *arguments, code=code)

    def layers(self) -> list[str]:
        """The keys in the store."""
        return [layer["key"] for layer in json.loads(layerfs("layers", "--json", "--root", self.served.root))]


@pytest.fixture(params=registry.names(), scope="module")
def docker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    place = tmp_path_factory.mktemp("docker")
    probe = registry.load(request.param).probe(place)
    if not probe.usable:
        pytest.skip(f"{request.param}: {probe.reason}; {probe.remedy}")
    docker = Docker(place, request.param)
    docker.served.start()
    with ExitStack() as stack:
        stack.callback(docker.served.stop)
        stack.enter_context(docker.started())
        docker.wait()
        docker.raw("import", "--change", 'CMD ["/bin/cat", "/etc/passwd"]', "-", IMAGE, feed=busybox_layer())
        yield docker
        for name in docker("ps", "-aq").split():
            docker("rm", "-f", name)
    left = [point.target for point in mount_table.read() if point.target.is_relative_to(place)]
    for target in reversed(left):
        mounts.unmount(target, lazy=True)
    assert left == []


def test_docker_shows_the_driver(docker: Docker) -> None:
    info = json.loads(docker("info", "--format", "{{json .}}"))
    assert info["Driver"] == docker.name
    assert ["Store", str(docker.served.root)] in info["DriverStatus"]
    graph = json.loads(docker("inspect", "--format", "{{json .GraphDriver}}", IMAGE))
    assert graph["Name"] == docker.name
    assert graph["Data"]["Store"] == str(docker.served.root)
    assert docker("images", "--format", "{{.Repository}}:{{.Tag}}") == IMAGE


def test_a_container_runs(docker: Docker) -> None:
    before = docker.layers()
    assert docker.run("--rm", IMAGE).startswith("root:x:0:0")
    assert docker.run("--rm", "--user", "user", IMAGE, "/bin/id", "-u") == "1000"
    assert docker.run("--rm", IMAGE, "/bin/sh", "-c", "echo x > /new; rm /etc/passwd; exit 7", code=7) == ""
    assert docker.run("--rm", IMAGE, "/bin/ls", "/etc/passwd", "/new", code=1) == "/etc/passwd"
    assert docker.layers() == before


@pytest.mark.thorough
def test_the_life_of_a_container(docker: Docker) -> None:
    loop = "echo started; trap 'exit 3' TERM; while true; do sleep 0.1; test ! -e /speak || echo tick; done"
    docker("create", "--network", "none", "--name", "life", IMAGE, "/bin/sh", "-c", loop)
    docker("start", "life")
    wait_until(lambda: docker("logs", "life") == "started", "the container speaks")
    docker("exec", "life", "/bin/sh", "-c", "echo kept > /kept")
    docker("restart", "life")
    assert docker("exec", "life", "/bin/cat", "/kept") == "kept"
    assert "life" in docker("ps", "--format", "{{.Names}}").split()
    with subprocess.Popen([*docker.client, "attach", "--no-stdin", "life"], stdout=subprocess.PIPE) as attached:
        docker("exec", "life", "/bin/touch", "/speak")
        assert attached.stdout is not None
        assert attached.stdout.readline() == b"tick\n"
        docker("stop", "life")
        attached.communicate(timeout=60)
    assert attached.returncode == 3
    assert docker("inspect", "--format", "{{.State.ExitCode}}", "life") == "3"
    docker("start", "life")
    docker("kill", "life")
    assert docker("inspect", "--format", "{{.State.Status}}", "life") == "exited"
    size = json.loads(docker("inspect", "--size", "life"))[0]
    assert size["SizeRw"] == len("kept\n")  # and the empty file
    docker("rm", "life")


def test_what_a_container_changed(docker: Docker) -> None:
    script = "mkdir /d; echo new > /d/new; rm /etc/passwd; touch /root"
    docker.run("--name", "work", IMAGE, "/bin/sh", "-c", script)
    assert set(docker("diff", "work").splitlines()) >= {"A /d", "A /d/new", "D /etc/passwd", "C /etc", "C /root"}
    (docker.place / "in").write_text("from outside")
    docker("cp", docker.place / "in", "work:/d/in")
    docker("cp", "work:/d/new", docker.place / "out")
    assert (docker.place / "out").read_text() == "new\n"
    with tarfile.open(fileobj=io.BytesIO(docker.raw("export", "work"))) as tar:
        names = set(tar.getnames())
        assert {"d/new", "d/in", "bin/busybox"} <= names
        assert "etc/passwd" not in names
    docker("commit", "work", "bb:committed")
    docker("rm", "work")
    assert docker.run("--rm", "bb:committed", "/bin/sh", "-c", f"cat /d/in; {GONE}") == "from outsidegone"
    docker("rmi", "bb:committed")


@pytest.mark.thorough
def test_images_are_saved_and_loaded_as_they_are(docker: Docker) -> None:
    docker.run("--name", "work", IMAGE, "/bin/sh", "-c", "echo 1 > /one; ln /one /two; rm /etc/passwd")
    docker("commit", "work", "bb:saved")
    docker("rm", "work")
    identity = docker("inspect", "--format", "{{.Id}}", "bb:saved")
    saved = docker.raw("save", "bb:saved")
    docker("rmi", "bb:saved")
    docker.raw("load", feed=saved)
    assert docker("inspect", "--format", "{{.Id}}", "bb:saved") == identity
    assert docker.raw("save", "bb:saved") == saved
    assert docker.run("--rm", "bb:saved", "/bin/sh", "-c", f"cat /two; {GONE}") == "1\ngone"
    # What Docker has saved is an image for layerfs as well, with its digests.
    (docker.place / "saved.tar").write_bytes(saved)
    other = docker.place / "other"
    layerfs("import", docker.place / "saved.tar", "--root", other, "--driver", "vfs")
    layerfs("check", "--root", other)
    docker("rmi", "bb:saved")


@pytest.mark.thorough
@pytest.mark.parametrize("buildkit", ["0", "1"])
def test_an_image_is_built(docker: Docker, tmp_path: Path, buildkit: str) -> None:
    context = tmp_path / "context"
    context.mkdir()
    (context / "file").write_text("copied\n")
    steps = [f"FROM {IMAGE}", "COPY file /data/", "RUN echo run >> /data/file && rm /etc/passwd", 'CMD ["/bin/ls"]']
    steps += [f"RUN echo {number} > /step{number}" for number in range(2)]
    (context / "Dockerfile").write_text("\n".join([*steps, ""]))
    docker.raw("build", "--network", "none", "--tag", "bb:built", context, DOCKER_BUILDKIT=buildkit)
    assert docker.run("--rm", "bb:built", "/bin/sh", "-c", f"cat /data/file /step1; {GONE}") == "copied\nrun\n1\ngone"
    assert len(docker("history", "-q", "bb:built").splitlines()) == len(steps)
    docker("rmi", "bb:built")
    docker("builder", "prune", "--all", "--force")


def test_a_size_limit(docker: Docker) -> None:
    with Store(docker.served.root) as store:
        can = bool(store.driver.capabilities & Capability.SIZE_LIMIT)
    limited = ("--rm", "--storage-opt", "size=32M", IMAGE, "/bin/dd", "if=/dev/urandom", "of=/f", "bs=1M", "count=64")
    if can:
        docker.run(*limited, code=1)
        docker.run(*limited[:-1], "count=8")
    else:
        docker.run(*limited, code=125)
    assert "dd" not in docker("ps", "--all", "--format", "{{.Command}}")


@pytest.mark.thorough
def test_several_containers_at_once(docker: Docker) -> None:
    def run(number: int) -> str:
        return docker.run("--rm", IMAGE, "/bin/sh", "-c", f"echo {number} > /etc/passwd; cat /etc/passwd")

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(run, range(6))) == [str(number) for number in range(6)]


def test_containers_outlive_the_server(docker: Docker) -> None:
    docker.run("--detach", "--name", "long", IMAGE, "/bin/sh", "-c", "while true; do sleep 1; done")
    seen = Path("/proc", docker("inspect", "--format", "{{.State.Pid}}", "long"), "root")
    for number in (signal.SIGTERM, signal.SIGKILL):
        assert docker.served.stop(number) == (0 if number is signal.SIGTERM else -number)
        with open(seen / "file", "a") as file:  # Docker asks the driver before it lets anybody in
            file.write("more\n")
        docker.served.start()
        assert docker("exec", "long", "/bin/cat", "/file").split()[-1] == "more"
        assert docker("diff", "long") == "A /file"
        assert docker.run("--rm", IMAGE, "/bin/echo", "other") == "other"
    docker("rm", "--force", "long")


def test_everything_goes_with_the_last_image(docker: Docker) -> None:
    docker.run("--name", "left", IMAGE, "/bin/true")
    docker("system", "prune", "--all", "--force")
    assert docker("ps", "-aq") == docker("images", "-aq") == ""
    assert docker.layers() == []
    assert "nothing is wrong" in layerfs("check", "--root", docker.served.root)
    docker.raw("import", "-", IMAGE, feed=busybox_layer())
    assert docker.run("--rm", IMAGE, "/bin/echo", "again") == "again"
