"""Docker on layerfs's overlay2 beside Docker on its own overlay2: two daemons, in turn.

``python -m layerfs.bench.peers docker`` times in every round, in random order and after a ``sync``:

- *load*: ``docker load`` of a small Debian;
- *run*: ``docker run --rm … true``;
- *create and remove*: 100 containers by ``docker create``, then each removed again.

What the server itself took of that is the sum of what its log says.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from layerfs.bench.peers import place
from layerfs.bench.peers.engines import OURS, THEIRS, Step, debian, measure, need, table
from layerfs.testing.engines import Served, running, wait_until

DOCKER: Final = "/usr/bin/docker"
PLUGINS: Final = Path("/run/docker/plugins")
IMAGE: Final = "debian:peers"


class Bench:
    """Two daemons, one of which uses layerfs."""

    def __init__(self, place: Path, stack: ExitStack, archive: Path, containers: int) -> None:
        self._archive = place / "docker.tar"
        self._containers = containers
        self._place = place
        name = f"layerfs-peers-{os.getpid()}"
        convert = ["skopeo", "--insecure-policy", "copy"]
        command = [*convert, f"oci-archive:{archive}:peers", f"docker-archive:{self._archive}:{IMAGE}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"skopeo: {done.stderr.strip()}")
        self.served = Served("docker", "overlay2", place, socket=PLUGINS / f"{name}.sock")
        self.served.start()
        stack.callback(self.served.stop)
        for side, driver in ((OURS, name), (THEIRS, "overlay2")):
            self._start(side, driver, stack)

    def _start(self, side: str, driver: str, stack: ExitStack) -> None:
        place = self._place / side
        place.mkdir()
        (place / "daemon.json").write_text('{"experimental": true}')
        command: list[str | Path] = [
            *("dockerd", "--config-file", place / "daemon.json", "--storage-driver", driver),
            *("--data-root", place / "root", "--exec-root", place / "exec", "--pidfile", place / "pid"),
            *("--host", f"unix://{place}/docker.sock", "--log-level", "warn"),
            *("--iptables=false", "--ip6tables=false", "--bridge=none"),
        ]
        stack.enter_context(running(command, place / "log"))
        wait_until(lambda: self._run(side, "version").returncode == 0, "Docker answers")

    def _run(self, side: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [DOCKER, "--host", f"unix://{self._place / side}/docker.sock", *arguments]
        environment = os.environ | {"DOCKER_CONFIG": str(self._place / "client")}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    def docker(self, side: str, *arguments: str) -> None:
        done = self._run(side, *arguments)
        if done.returncode:
            raise click.ClickException(f"docker {' '.join(arguments)}: {done.stderr.strip()}")

    def steps(self) -> list[Step]:
        return [
            Step("load", self.load, clean=self.forget),
            Step("run", self.run, self.load, self.forget),
            Step(f"create and remove {self._containers}", self.create_and_remove, self.load, self.forget),
        ]

    def load(self, side: str) -> None:
        self.docker(side, "load", "--quiet", "--input", str(self._archive))

    def forget(self, side: str) -> None:
        self.docker(side, "rmi", "--force", IMAGE)

    def run(self, side: str) -> None:
        self.docker(side, "run", "--rm", "--network", "none", IMAGE, "/bin/true")

    def create_and_remove(self, side: str) -> None:
        names = [f"c{number}" for number in range(self._containers)]
        for name in names:
            self.docker(side, "create", "--network", "none", "--name", name, IMAGE, "/bin/true")
        for name in names:
            self.docker(side, "rm", name)


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Samples of each step on each side.")
@click.option("--containers", default=100, show_default=True, help="How many are created and removed.")
@place.option
def main(rounds: int, containers: int, scratch: Path | None) -> None:
    """Time Docker on layerfs and on its own overlay2."""
    need("dockerd", DOCKER, "skopeo", "runc")
    archive = debian()
    with ExitStack() as stack:
        bench = Bench(stack.enter_context(place.place(scratch)), stack, archive, containers)
        samples = measure(bench.steps(), rounds, bench.served)
    Console().print(table(f"Docker: medians of {rounds} rounds; below 1 layerfs is faster", "overlay2", samples))
