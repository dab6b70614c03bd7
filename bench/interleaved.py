"""Two sides measured in one job, round by round in turn: figures of two jobs do not compare.

A side is a version of layerfs, which is a Python environment with layerfs installed in it, or a kernel, which this
layerfs is measured on. Each round is a process or a guest of its own, in random order; the base runs twice where the
machine's noise is to be known.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import layerfs.guest
from layerfs.bench import calibration
from layerfs.bench.cli import guest_request
from layerfs.bench.compare import fewest
from layerfs.bench.interrupts import Interrupts
from layerfs.bench.recorded import Key, Recorded, Subject, read, together
from layerfs.errors import EnvironmentUnfit, InvalidArgument, LayerfsError, OutOfSpace

_SEEDS = 2**31  # as many as `layerfs bench --seed` takes
BASE, AGAIN, HEAD = "base", "base again", "head"


class BenchmarkFailed(LayerfsError):
    """A version could not be built, or its measurement ended with an error."""

    exit_code = 4


Side = Callable[[Sequence[str], Path], tuple[int, str]]
"""Runs layerfs with these words, the run file going to this directory; answers with its exit code and what it said."""


@dataclass(frozen=True)
class Measured:
    """Both sides, and the calibration's thresholds if there was one; the base has twice the samples then."""

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
            code, said = _run(words, os.environ, os.killpg)  # a shell's commands end no sooner than they are told to
        except OSError as error:
            raise BenchmarkFailed(f"building the {side}: {words[0]!r}: {error.strerror}") from error
        if code:
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise BenchmarkFailed(f"building the {side} with {command!r} ended with {code}: {last}")
        _program(place)
        yield place


def measure(
    base: Side,
    head: Side,
    options: Sequence[str],
    workloads: Sequence[str],
    *,
    rounds: int,
    seed: int,
    calibrate: bool,
    untold: Callable[[Measured], Collection[str]] = lambda _measured: (),
    seconds: float = 0,
    keep: Path | None = None,
    progress: Callable[[str, float], None] = lambda _text, _part: None,
    ignoring: Collection[str] = (),
) -> Measured:
    """Measure both sides in turn.

    Args:
        options: of ``layerfs bench``, the same for both; ``workloads``: their names, none for its profile's.
        rounds: at least, and as many as so many figures need if there is time; then half as many again and again, of
            the workloads only that are ``untold``, until none is. Each look at the figures is a chance to err: hence
            the larger and larger steps. Of those rounds, one is begun as long as it will be done in ``seconds`` from
            the beginning.
        keep: a directory for the run files of every round.
        ignoring: facts of the machine in which the sides may differ, because that is what is compared.

    Where the base can be measured and the head cannot, everything failed in the head, for this reason.

    Raises `InvalidArgument` after the first round where so few could not tell any time from chance, and
    `BenchmarkFailed`, `InvalidArgument`, `EnvironmentUnfit` or `OutOfSpace` where ``layerfs bench`` ended for such a
    reason.
    """
    arms = {BASE: base, HEAD: head, **({AGAIN: base} if calibrate else {})}
    order = random.Random(seed)  # noqa: S311
    found: dict[str, list[Recorded]] = {arm: [] for arm in arms}
    number, least, began, failure = 0, rounds, time.monotonic(), ""
    with tempfile.TemporaryDirectory(prefix="layerfs-gate-") as scratch:
        folder = (keep or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            round_began = time.monotonic()
            for place, arm in enumerate(order.sample(list(arms), len(arms))):
                progress(f"round {number + 1} of {rounds}: {arm}", (number + place / len(arms)) / rounds)
                file = folder / f"{number:03}-{arm.replace(' ', '-')}.json"
                words = ["bench", "--no-native", "--rounds=1", *options, *(f"--workload={name}" for name in workloads)]
                words += [f"--seed={(seed + number) % _SEEDS}", f"--output={file}"]
                try:
                    _told(arm, *arms[arm](words, folder))
                except EnvironmentUnfit as error:
                    if arm != HEAD:
                        raise
                    failure = str(error)  # the host's own fault only if the base fails as well
                else:
                    found[arm].append(read(file))
            if failure:
                return _failed(found, failure, ignoring)
            number += 1
            now = time.monotonic()
            taken, last = now - began, now - round_began
            if number == 1:
                rounds = least = _enough(rounds, _together(found, ignoring), 2 if calibrate else 1, taken, seconds)
            late = taken + last > seconds
            if number < (least if late else rounds):
                continue
            measured = _together(found, ignoring)
            workloads = sorted(untold(measured))
            if not workloads or late:
                return measured
            rounds = number + max(1, number // 2)


def _enough(rounds: int, first: Measured, bases: int, taken: float, seconds: float) -> int:
    """How many rounds, by what the first one measured and ``taken``, the seconds that it took."""
    figures = len(set(first.base.seconds) & set(first.head.seconds))
    needed = fewest(figures, bases)
    if needed > rounds and taken * needed > seconds:
        raise InvalidArgument(
            f"after {rounds} rounds no test could tell any of {figures} times from chance; give --rounds {needed}, or "
            "name fewer drivers and workloads"
        )
    return max(needed, rounds)


def _together(found: Mapping[str, Sequence[Recorded]], ignoring: Collection[str]) -> Measured:
    sides = {arm: together(runs, arm).without(ignoring) for arm, runs in found.items()}
    thresholds = _thresholds(sides[BASE], sides[AGAIN]) if AGAIN in sides else {}
    base = together([sides[arm] for arm in (BASE, AGAIN) if arm in sides], BASE)
    return Measured(base, sides[HEAD], thresholds)


def _failed(found: Mapping[str, Sequence[Recorded]], reason: str, ignoring: Collection[str]) -> Measured:
    base = together([run for arm in (BASE, AGAIN) for run in found.get(arm, ())], BASE).without(ignoring)
    targets = {key.target for key in base.seconds}
    nothing = Recorded(HEAD, base.machine, {}, {}, failures={Subject("", target): reason for target in targets})
    return Measured(base, nothing, {})


def _thresholds(base: Recorded, again: Recorded) -> dict[Key, float]:
    return {
        key: calibration.noise(*key, times, again.seconds[key]).threshold
        for key, times in base.seconds.items()
        if key in again.seconds
    }


def in_environment(environment: Path) -> Side:
    """A version of layerfs."""

    def run(words: Sequence[str], _folder: Path) -> tuple[int, str]:
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        return _run([*_program(environment), *words], variables)

    return run


def _run(
    command: Sequence[str], variables: Mapping[str, str], tell: Callable[[int, int], None] = os.kill
) -> tuple[int, str]:
    """The command's exit code, and what it said on the standard error.

    It has a session of its own, so that only this process hears a terminal's Ctrl-C; then it is told to end, once, and
    waited for, because it has mounts and loop devices to take down.

    Args:
        tell: sends it a signal; `os.killpg` also to what it has started.
    """
    with (
        Interrupts() as interrupts,
        subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=variables,
            start_new_session=True,
        ) as process,
    ):
        try:
            with interrupts.allowed():
                said = process.communicate()[1]
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                tell(process.pid, signal.SIGTERM)
            process.communicate()
            raise
    return process.returncode, said


def on_kernel(kind: str, kernel: str, size: int, place: Path) -> Side:
    """This layerfs in a guest of such a kernel; a guest for each round.

    Args:
        size: bytes of the largest file; ``place``: the directory for the guests' disks.
    """

    def run(words: Sequence[str], folder: Path) -> tuple[int, str]:
        request = guest_request(
            words, kind, size, place, [folder], os.path.abspath(kernel) if "/" in kernel else kernel
        )
        with tempfile.TemporaryFile("w+", errors="replace") as said, open(os.devnull, "wb") as nothing:
            try:
                code = layerfs.guest.run(request, output=nothing.fileno(), errors=said.fileno())
            except (InvalidArgument, EnvironmentUnfit) as error:
                return error.exit_code, str(error)
            except LayerfsError as error:  # the guest itself ended
                return BenchmarkFailed.exit_code, str(error)
            said.seek(0)
            return code, said.read()

    return run


def _told(arm: str, code: int, said: str) -> None:
    """Raise what an exit code means."""
    if code == 0:
        return
    if code in (-2, 130):
        raise KeyboardInterrupt
    last = (said.strip().splitlines() or [f"it ended with {code}"])[-1].removeprefix("layerfs: ")
    kinds = {kind.exit_code: kind for kind in (InvalidArgument, EnvironmentUnfit, OutOfSpace)}
    raise kinds.get(code, BenchmarkFailed)(f"measuring the {arm}: {last}")


def _program(environment: Path) -> list[str]:
    python = environment / "bin" / "python"
    if not python.exists() or not (environment / "bin" / "layerfs").exists():
        raise InvalidArgument(f"{str(environment)!r} is no Python environment with layerfs (it has no bin/layerfs)")
    return [str(python.absolute()), "-m", "layerfs.cli"]
