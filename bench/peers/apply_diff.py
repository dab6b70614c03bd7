"""Unpacking and packing a root file system: layerfs beside GNU tar and containers-storage.

``python -m layerfs.bench.peers apply-diff`` makes a Debian root file system with debootstrap (or takes ``--tree``),
packs it once, and then times in every round, in a random order and each on a fresh target after a ``sync``:

- *apply*: layerfs's `apply` with the diff ID that it computes, ``tar -x``, ``containers-storage applydiff``;
- *diff*: layerfs's `write_diff` of the whole tree, without and with its diff ID, ``tar -c``, ``containers-storage
  diff``, each into a pipe that is read and thrown away.

The programs' times include their start, layerfs's do not include Python's.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from layerfs.apply import apply
from layerfs.bench.peers import place
from layerfs.changes import compare
from layerfs.diff import write_diff
from layerfs.errors import EnvironmentUnfit

TOOLS: Final = ("tar", "containers-storage")
OURS: Final = "layerfs"
Action = Callable[[], None]


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _drain() -> Iterator[int]:
    """A pipe that somebody reads and throws away; GNU tar does not read files for /dev/null."""
    reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert reader.stdin is not None
    with reader.stdin:
        yield reader.stdin.fileno()
    reader.wait()


class Bench:
    """The six things that are timed, on one tree and its archive, below one scratch directory."""

    def __init__(self, tree: Path, scratch: Path) -> None:
        self._archive = scratch / "tree.tar"
        self._target = scratch / "target"
        self._store = ["--graph", str(scratch / "graph"), "--run", str(scratch / "run")]
        self._source = scratch / "source"
        self._source.mkdir()
        self._run("tar", "--numeric-owner", "-C", str(tree), "-cf", str(self._archive), ".")
        self._run("tar", "--numeric-owner", "-xpf", str(self._archive), "-C", str(self._source))
        self._cs("create-layer", "--name", "packed")
        self._cs("applydiff", "--file", str(self._archive), "packed")
        self.groups: dict[str, dict[str, tuple[Action, Action, Action]]] = {
            "apply": {
                OURS: (self._make_target, self._apply, self._remove_target),
                "tar -x": (self._make_target, self._untar, self._remove_target),
                "containers-storage applydiff": (self._make_layer, self._applydiff, self._remove_layer),
            },
            "diff": {
                OURS: (_nothing, self._diff, _nothing),
                "layerfs, with its diff ID": (_nothing, partial(self._diff, digest=True), _nothing),
                "tar -c": (_nothing, self._tar, _nothing),
                "containers-storage diff": (_nothing, self._cs_diff, _nothing),
            },
        }

    def close(self) -> None:
        subprocess.run(["containers-storage", *self._store, "shutdown", "--force"], capture_output=True, check=False)

    def _run(self, *command: str, stdout: int = subprocess.DEVNULL) -> None:
        subprocess.run(command, check=True, stdout=stdout, stderr=subprocess.PIPE)

    def _cs(self, verb: str, *arguments: str, stdout: int = subprocess.DEVNULL) -> None:
        self._run("containers-storage", verb, *self._store, *arguments, stdout=stdout)

    def _make_target(self) -> None:
        self._target.mkdir()

    def _remove_target(self) -> None:
        shutil.rmtree(self._target)

    def _make_layer(self) -> None:
        self._cs("create-layer", "--name", "target")

    def _remove_layer(self) -> None:
        self._cs("delete-layer", "target")

    def _apply(self) -> None:
        with _directory(self._target) as root, self._archive.open("rb") as stream:
            apply(stream, root)

    def _untar(self) -> None:
        self._run("tar", "--numeric-owner", "-xpf", str(self._archive), "-C", str(self._target))

    def _applydiff(self) -> None:
        self._cs("applydiff", "--file", str(self._archive), "target")

    def _diff(self, *, digest: bool = False) -> None:
        with _directory(self._source) as root, _drain() as pipe, os.fdopen(os.dup(pipe), "wb") as out:
            write_diff(compare(None, root), root, out, digest=digest)

    def _tar(self) -> None:
        with _drain() as pipe:
            self._run("tar", "--numeric-owner", "-C", str(self._source), "-c", ".", stdout=pipe)

    def _cs_diff(self) -> None:
        with _drain() as pipe:
            self._cs("diff", "--uncompressed", "packed", stdout=pipe)


def _nothing() -> None:
    pass


def _time(before: Action, action: Action, after: Action) -> float:
    before()
    os.sync()
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    after()
    return seconds


def measure(bench: Bench, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of every sample, by group and program."""
    samples: dict[tuple[str, str], list[float]] = {}
    cells = [(group, name, actions) for group, programs in bench.groups.items() for name, actions in programs.items()]
    for _ in track(range(rounds), "Rounds", console=Console(stderr=True), transient=True):
        for group, name, actions in random.sample(cells, len(cells)):
            samples.setdefault((group, name), []).append(_time(*actions))
    return samples


def render(bench: Bench, samples: dict[tuple[str, str], list[float]]) -> Table:
    """Medians, spread, and layerfs's time as a multiple of each peer's."""
    table = Table("", "program", title="Medians of one run; below 1 layerfs is faster")
    for heading in ("median", "fastest", "slowest", "layerfs takes"):
        table.add_column(heading, justify="right")
    for group, programs in bench.groups.items():
        own = statistics.median(samples[group, OURS])
        for number, name in enumerate(programs):
            times = samples[group, name]
            middle = statistics.median(times)
            table.add_row(
                group if number == 0 else "",
                name,
                *(f"{seconds:.3f} s" for seconds in (middle, min(times), max(times))),
                "" if name == OURS else f"{own / middle:.2f} x",
            )
        table.add_section()
    return table


def _debian(into: Path) -> Path:
    if shutil.which("debootstrap") is None:
        raise click.ClickException("debootstrap makes the tree; install its package, or name a tree with --tree")
    tree = into / "debian"
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(tree)], check=True, stdout=subprocess.DEVNULL)
    return tree


@click.command()
@click.option("--tree", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A root file system.")
@click.option("--rounds", default=7, show_default=True, help="Samples of each program.")
@place.option
def main(tree: Path | None, rounds: int, scratch: Path | None) -> None:
    """Time layerfs, GNU tar and containers-storage on the same tree."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise EnvironmentUnfit(f"{missing[0]} is not installed; install the package of that name")
    with place.place(scratch) as work:
        bench = Bench(tree or _debian(work), work)
        try:
            Console().print(render(bench, measure(bench, rounds)))
        finally:
            bench.close()
