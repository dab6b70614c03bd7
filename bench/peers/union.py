"""Union mounts: layerfs-aufs beside fuse-overlayfs and the kernel's overlay, over the same branches.

``python -m layerfs.bench.peers union`` makes a lower tree once and then, in every round and for every program in random
order, mounts a fresh union over it and times on it, always in this order:

- *stat cold*, *stat warm*: all files in random order, the first time and again;
- *walk cold*, *walk warm*: every directory listed, every entry's status taken, after a remount and again;
- *read cold*, *read warm*: the large file from its beginning to its end, the first time through this mount and again;
- *write large*: a new file in blocks of 1 MiB, closed; *write small*: 4 KiB blocks into one file, closed;
- *create*, *unlink*: small new files, and their removal; *unlink lower*: files of the lower tree;
- *copy-up*: the first byte written to the large file.

"Cold" is what this mount has not seen: the backing's own caches are warm for all. *pyfuse3 alone* is no union, but hard
links to the lower tree seen through pyfuse3: what FUSE in Python costs without a union's work.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from layerfs.bench.peers import place
from layerfs.errors import EnvironmentUnfit

OURS: Final = "layerfs-aufs"
FLOOR: Final = "pyfuse3 alone"
PROGRAMS: Final = (OURS, "fuse-overlayfs", "kernel overlay", FLOOR)
MIB: Final = 1 << 20

_BLOCK: Final = bytes(MIB)
_DIRECTORIES: Final = 20
_SMALL_WRITES: Final = 4096


class Bench:
    """The lower tree, and unions over it.

    Args:
        scratch: where all of it lies.
        files: how many files the lower tree has, in 20 directories.
        large: bytes of the large file.
    """

    def __init__(self, scratch: Path, files: int, large: int) -> None:
        self._scratch = scratch
        self._files = files
        self._large = large
        self._lower = scratch / "lower"
        self._names = [f"d{number % _DIRECTORIES}/f{number}" for number in range(files)]
        for number in range(_DIRECTORIES):
            (self._lower / f"d{number}").mkdir(parents=True)
        for name in self._names:
            (self._lower / name).write_bytes(b"x" * 100)
        with open(self._lower / "large", "wb") as file:
            file.writelines(os.urandom(MIB) for _ in range(large // MIB))
        self._target = scratch / "target"
        self._target.mkdir()
        self._served: subprocess.Popen[bytes] | None = None
        os.sync()

    @contextmanager
    def mounted(self, program: str) -> Iterator[Path]:
        """A fresh union over the lower tree."""
        fresh = self._scratch / "fresh"
        (fresh / "upper").mkdir(parents=True)
        (fresh / "work").mkdir()
        try:
            self._mount(program)
            try:
                yield self._target
            finally:
                _run("umount", str(self._target))
                if self._served is not None:
                    self._served.wait()
        finally:
            shutil.rmtree(fresh)

    def _mount(self, program: str) -> None:
        fresh = self._scratch / "fresh"
        options = f"lowerdir={self._lower},upperdir={fresh / 'upper'},workdir={fresh / 'work'}"
        if program == "kernel overlay":
            _run("mount", "-t", "overlay", "overlay", "-o", options, str(self._target))
        elif program == FLOOR:
            self._serve(fresh / "links")
        else:
            _run(_find(program), "-o", options, str(self._target))

    def _serve(self, links: Path) -> None:
        _run("cp", "-al", str(self._lower), str(links))
        module = "layerfs.bench.peers.passthrough"
        self._served = subprocess.Popen([sys.executable, "-m", module, str(links), str(self._target)])
        while not self._target.is_mount():
            if self._served.poll() is not None:
                raise EnvironmentUnfit(f"{module} could not serve; what it said stands above")
            time.sleep(0.01)

    def sample(self, program: str) -> dict[str, float]:
        """One round on one program: the rows, and what was measured (µs per operation, or s)."""
        order = random.sample(self._names, len(self._names))
        found: dict[str, float] = {}
        with self.mounted(program) as root:
            paths = [f"{root}/{name}" for name in order]
            for row in ("stat cold", "stat warm"):
                found[row] = _timed(lambda: _stat_all(paths)) / len(paths) * 1e6
        with self.mounted(program) as root:
            for row in ("walk cold", "walk warm"):
                found[row] = _timed(lambda: _walk(str(root))) / len(order) * 1e6
            for row in ("read cold", "read warm"):
                found[row] = _timed(lambda: _read(root / "large"))
            found["write large"] = _timed(lambda: _write(root / "new", _BLOCK, self._large // MIB))
            small = _timed(lambda: _write(root / "small", _BLOCK[:4096], _SMALL_WRITES))
            found["write small"] = small / _SMALL_WRITES * 1e6
            made = [f"{root}/d0/new{number}" for number in range(self._files // 10)]
            found["create"] = _timed(lambda: _create(made)) / len(made) * 1e6
            found["unlink"] = _timed(lambda: _unlink(made)) / len(made) * 1e6
            gone = [f"{root}/{name}" for name in order[: len(made)]]
            found["unlink lower"] = _timed(lambda: _unlink(gone)) / len(gone) * 1e6
            if program != FLOOR:
                found["copy-up"] = _timed(lambda: _change_first_byte(root / "large"))
        return found


def _run(*command: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentUnfit(f"{command[0]}: {done.stderr.strip()}")


def _find(program: str) -> str:
    path = shutil.which(program, path=os.pathsep.join([os.path.dirname(sys.executable), *os.get_exec_path()]))
    if path is None:
        raise EnvironmentUnfit(f"{program} is not installed; install the package of that name")
    return path


def _timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _stat_all(paths: list[str]) -> None:
    for path in paths:
        os.stat(path)


def _walk(root: str) -> None:
    todo = [root]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)


def _read(path: Path) -> None:
    block = bytearray(128 << 10)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def _write(path: Path, block: bytes, count: int) -> None:
    with open(path, "wb", buffering=0) as file:
        file.writelines(block for _ in range(count))


def _create(paths: list[str]) -> None:
    for path in paths:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def _unlink(paths: list[str]) -> None:
    for path in paths:
        os.unlink(path)


def _change_first_byte(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, b"!", 0)
    os.close(fd)


def measure(bench: Bench, rounds: int) -> dict[tuple[str, str], list[float]]:
    """What every sample took, by row and program."""
    samples: dict[tuple[str, str], list[float]] = {}
    for _ in track(range(rounds), "Rounds", console=Console(stderr=True), transient=True):
        for program in random.sample(PROGRAMS, len(PROGRAMS)):
            for row, value in bench.sample(program).items():
                samples.setdefault((row, program), []).append(value)
    return samples


def render(samples: dict[tuple[str, str], list[float]]) -> Table:
    """Medians, and ours as a multiple of each peer's."""
    table = Table("", title="Medians of one run; below 1 layerfs-aufs is faster")
    for program in PROGRAMS:
        table.add_column(program, justify="right")
    for peer in PROGRAMS[1:]:
        table.add_column(f"takes … of {peer}", justify="right")
    for row in dict.fromkeys(row for row, _ in samples):
        middles = [statistics.median(samples[row, program]) for program in PROGRAMS if (row, program) in samples]
        unit = "s" if row in ("read cold", "read warm", "write large", "copy-up") else "µs"
        shown = [f"{middle:.3f} {unit}" if unit == "s" else f"{middle:.1f} {unit}" for middle in middles]
        nothing = [""] * (len(PROGRAMS) - len(middles))
        table.add_row(row, *shown, *nothing, *(f"{middles[0] / middle:.2f} x" for middle in middles[1:]))
    return table


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Samples of each program.")
@click.option("--files", default=10_000, show_default=True, help="Files of the lower tree.")
@click.option("--large", default=512, show_default=True, help="MiB of the large file.")
@place.option
def main(rounds: int, files: int, large: int, scratch: Path | None) -> None:
    """Time layerfs-aufs, fuse-overlayfs, the kernel's overlay and a bare pyfuse3 on the same branches."""
    if os.geteuid() != 0:
        raise EnvironmentUnfit("mounting overlay takes root; run it as root")
    for program in PROGRAMS[:2]:
        _find(program)
    with place.place(scratch) as work:
        Console(width=120).print(render(measure(Bench(work, files, large * MIB), rounds)))
