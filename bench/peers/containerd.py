"""containerd on layerfs's overlay2 beside containerd on its own overlayfs snapshotter: one containerd, both in turn.

``python -m layerfs.bench.peers containerd`` times in every round, in random order and after a ``sync``:

- *import*: ``ctr image import`` of a small Debian, which unpacks it;
- *run*: ``ctr run --rm … true``;
- *create and remove*: 100 containers by ``ctr containers create``, then each removed again.

What the server itself took of that is the sum of what its log says. Then single calls of the snapshots service: to
layerfs's server, and through containerd, with its own record of snapshots, to either snapshotter.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from layerfs.bench.peers import place
from layerfs.bench.peers.engines import (
    IMAGE,
    OURS,
    THEIRS,
    Step,
    calls_table,
    debian,
    measure,
    need,
    table,
)
from layerfs.testing.engines import Served, layerfs, listens, running, wait_until

NAMES: Final = {OURS: "layerfs", THEIRS: "overlayfs"}

CONFIG: Final = """\
version = 2
root = "{0}/root"
state = "{0}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{0}/containerd.sock"
[ttrpc]
  address = "{0}/ttrpc.sock"
"""


class Bench:
    """A containerd that both snapshotters serve."""

    def __init__(self, place: Path, stack: ExitStack, archive: Path, containers: int) -> None:
        self._archive = archive
        self._containers = containers
        self._socket = place / "containerd.sock"
        self.served = Served("containerd", "overlay2", place)
        # containerd removes snapshots that it does not know: direct calls need a server of their own.
        (place / "alone").mkdir()
        self._alone = Served("containerd", "overlay2", place / "alone")
        for served in (self.served, self._alone):
            served.start()
            stack.callback(served.stop)
        printed = layerfs("serve", "containerd", "--print-config", "--socket", self.served.socket)
        (place / "config.toml").write_text(CONFIG.format(place) + printed)
        command: list[str | Path] = ["containerd", "--config", place / "config.toml", "--log-level", "warn"]
        stack.enter_context(running(command, place / "log"))
        wait_until(lambda: listens(self._socket), "containerd listens")

    def ctr(self, *arguments: str | Path) -> None:
        command = ["ctr", "-a", str(self._socket), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"{' '.join(command)}: {done.stderr.strip()}")

    def steps(self) -> list[Step]:
        return [
            Step("import", self.import_, clean=self.forget),
            Step("run", self.run, self.import_, self.forget),
            Step(f"create and remove {self._containers}", self.create_and_remove, self.import_, self.forget),
        ]

    def import_(self, side: str) -> None:
        name = IMAGE.rpartition(":")[0]
        self.ctr("images", "import", "--snapshotter", NAMES[side], "--base-name", name, self._archive)

    def forget(self, _side: str) -> None:
        self.ctr("images", "rm", "--sync", IMAGE)

    def run(self, side: str) -> None:
        self.ctr("run", "--rm", "--net-host", "--snapshotter", NAMES[side], IMAGE, "one", "/bin/true")

    def create_and_remove(self, side: str) -> None:
        names = [f"c{number}" for number in range(self._containers)]
        for name in names:
            self.ctr("containers", "create", "--net-host", "--snapshotter", NAMES[side], IMAGE, name)
        for name in names:
            self.ctr("containers", "rm", name)

    def calls(self, count: int) -> dict[str, dict[str, list[float]]]:
        """Seconds of single calls, by side and method: the sides take turns."""
        sides = {
            "layerfs's server": (self._alone.socket, NAMES[OURS]),
            "layerfs through containerd": (self._socket, NAMES[OURS]),
            "overlayfs in containerd": (self._socket, NAMES[THEIRS]),
        }
        found: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
        clients = {side: _Client(*where) for side, where in sides.items()}
        for client in clients.values():
            client.begin()
        for number in range(count):
            for side, client in clients.items():
                client.cycle(number, found[side])
        for client in clients.values():
            client.end()
        return found


class _Client:
    """Calls the snapshots service at a socket."""

    def __init__(self, socket: Path, snapshotter: str) -> None:
        import grpc

        from layerfs.serve import api

        self._channel = grpc.insecure_channel(f"unix:{socket}")
        self._requests = {name: request for name, (request, _) in api.METHODS.items()}
        self._snapshotter = snapshotter
        self._calls: dict[str, Callable[..., Any]] = {
            name: self._channel.unary_unary(
                f"/{api.SERVICE}/{name}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            for name, (request, response) in api.METHODS.items()
        }

    def call(self, name: str, /, **fields: str) -> Any:
        # A lease or this label keep garbage collection away.
        made = {"labels": {"containerd.io/gc.root": "bench"}} if name in ("Prepare", "Commit") else {}
        request = self._requests[name](snapshotter=self._snapshotter, **fields, **made)
        return self._calls[name](request, metadata=[("containerd-namespace", "peers")], timeout=60)

    def begin(self) -> None:
        self.call("Prepare", key=f"{id(self)} begun")
        self.call("Commit", name=f"{id(self)} base", key=f"{id(self)} begun")

    def cycle(self, number: int, seconds: dict[str, list[float]]) -> None:
        """Prepare, mounts, a file, commit, remove."""
        key = f"{id(self)} {number}"
        mounts = self._timed(seconds, "Prepare", key=key, parent=f"{id(self)} base").mounts
        self._timed(seconds, "Mounts", key=key)
        (upper,) = [option[9:] for option in mounts[0].options if option.startswith("upperdir=")]
        (Path(upper) / "file").write_bytes(b"x" * 4096)
        self._timed(seconds, "Commit", name=f"{key} done", key=key)
        self._timed(seconds, "Remove", key=f"{key} done")

    def _timed(self, seconds: dict[str, list[float]], name: str, /, **fields: str) -> Any:
        start = time.perf_counter()
        answer = self.call(name, **fields)
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return answer

    def end(self) -> None:
        self.call("Remove", key=f"{id(self)} base")
        self._channel.close()


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Samples of each step on each side.")
@click.option("--containers", default=100, show_default=True, help="How many are created and removed.")
@click.option("--calls", default=200, show_default=True, help="Samples of each single call.")
@place.option
def main(rounds: int, containers: int, calls: int, scratch: Path | None) -> None:
    """Time containerd on layerfs and on its own overlayfs snapshotter."""
    need("containerd", "ctr", "runc")
    archive = debian()
    console = Console()
    with ExitStack() as stack:
        bench = Bench(stack.enter_context(place.place(scratch)), stack, archive, containers)
        samples = measure(bench.steps(), rounds, bench.served)
        console.print(table(f"containerd: medians of {rounds} rounds; below 1 layerfs is faster", "overlayfs", samples))
        console.print(calls_table(f"single calls, medians of {calls}", bench.calls(calls)))
