"""Two versions of layerfs measured in one job, round by round in turn: figures of two jobs do not compare.

A version is a Python environment with layerfs installed in it. Each runs as a process of its own, one round at a time
and in random order; the base runs twice where the machine's noise is to be known.
"""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from layerfs.bench import calibration
from layerfs.bench.recorded import Key, Recorded, read, together
from layerfs.errors import EnvironmentUnfit, InvalidArgument, LayerfsError, OutOfSpace

BASE, AGAIN, HEAD = "base", "base again", "head"


class BenchmarkFailed(LayerfsError):
    """A version could not be built, or its measurement ended with an error."""

    exit_code = 4


@dataclass(frozen=True)
class Measured:
    """Both sides, and the calibration's thresholds if there was one."""

    base: Recorded
    head: Recorded
    thresholds: dict[Key, float]


@contextmanager
def built(command: str | None, given: Path | None, side: str) -> Iterator[Path]:
    """A version's environment: the one ``given``, or the one that ``command`` makes, which is gone afterwards.

    Args:
        command: split like a shell's words but run without one; ``{}`` in it is the directory to make.

    Raises `BenchmarkFailed` where the command fails, `InvalidArgument` where there is no layerfs afterwards.
    """
    if command is None:
        assert given is not None
        _program(given)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="layerfs-gate-") as made:
        place = Path(made) / side
        words = [word.replace("{}", str(place)) for word in shlex.split(command)]
        if not words:
            raise InvalidArgument(f"--build-{side} is empty")
        try:
            done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        except OSError as error:
            raise BenchmarkFailed(f"building the {side}: {words[0]!r}: {error.strerror}") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise BenchmarkFailed(f"building the {side} with {command!r} ended with {done.returncode}: {last}")
        _program(place)
        yield place


def measure(
    base: Path,
    head: Path,
    options: Sequence[str],
    *,
    rounds: int,
    seed: int,
    calibrate: bool,
    keep: Path | None = None,
    progress: Callable[[str, float], None] = lambda _text, _part: None,
) -> Measured:
    """Measure both versions in turn.

    Args:
        options: of ``layerfs bench``, the same for both.
        keep: a directory for the run files of every round.

    Raises `BenchmarkFailed`, or `InvalidArgument`, `EnvironmentUnfit` or `OutOfSpace` where ``layerfs bench`` ended
    for such a reason.
    """
    arms = {BASE: base, HEAD: head, **({AGAIN: base} if calibrate else {})}
    order = random.Random(seed)  # noqa: S311
    found: dict[str, list[Recorded]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory(prefix="layerfs-gate-") as scratch:
        for number in range(rounds):
            for arm in order.sample(list(arms), len(arms)):
                done = sum(map(len, found.values()))
                progress(f"round {number + 1} of {rounds}: {arm}", done / (rounds * len(arms)))
                file = (keep or Path(scratch)) / f"{number:03}-{arm.replace(' ', '-')}.json"
                _bench(arms[arm], arm, [*options, f"--seed={seed + number}", f"--output={file}"])
                found[arm].append(read(file))
    sides = {arm: together(runs, arm) for arm, runs in found.items()}
    thresholds = _thresholds(sides[BASE], sides[AGAIN]) if calibrate else {}
    return Measured(sides[BASE], sides[HEAD], thresholds)


def _thresholds(base: Recorded, again: Recorded) -> dict[Key, float]:
    return {
        key: calibration.noise(*key, times, again.seconds[key]).threshold
        for key, times in base.seconds.items()
        if key in again.seconds
    }


def _bench(environment: Path, arm: str, options: Sequence[str]) -> None:
    command = [*_program(environment), "bench", "--no-native", "--rounds=1", *options]
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False, env=variables
    )
    if done.returncode == 0:
        return
    if done.returncode in (-2, 130):
        raise KeyboardInterrupt
    said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1].removeprefix("layerfs: ")
    kinds = {kind.exit_code: kind for kind in (InvalidArgument, EnvironmentUnfit, OutOfSpace)}
    raise kinds.get(done.returncode, BenchmarkFailed)(f"measuring the {arm}: {said}")


def _program(environment: Path) -> list[str]:
    python = environment / "bin" / "python"
    if not python.exists() or not (environment / "bin" / "layerfs").exists():
        raise InvalidArgument(f"{str(environment)!r} is no Python environment with layerfs (it has no bin/layerfs)")
    return [str(python.absolute()), "-m", "layerfs.cli"]
