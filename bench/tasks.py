"""Tasks that do one thing at the same time, each in a process of its own.

Threads of this process would wait for each other's turn in the interpreter, and not for the driver.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import IO

from layerfs.bench import task
from layerfs.bench.workload import Stopwatch, Timing
from layerfs.errors import LayerfsError


class Tasks:
    """Processes that wait for their work; see `ready`."""

    def __init__(self, work: str, processes: Sequence[Popen[str]]) -> None:
        self._work = work
        self._processes = processes

    def do(self, step: str) -> Timing:
        """Have all of them work, and say as ``step`` how long it took until the last one was done."""
        clock = Stopwatch()
        for one in self._processes:
            _tell(one, "")
        answers = [self._answer(one) for one in self._processes]
        timing = clock.lap(step, operations=sum(int(done) for done, _ in answers))
        return dataclasses.replace(timing, processor=timing.processor + sum(float(used) for _, used in answers))

    def wait(self) -> None:
        """Until all are ready."""
        for one in self._processes:
            self._answer(one)

    def _answer(self, one: Popen[str]) -> list[str]:
        line = _stream(one.stdout).readline()
        if not line:
            raise LayerfsError(f"{self._work} in a task of its own: {' '.join(_stream(one.stderr).read().split())}")
        return line.split()


@contextmanager
def ready(work: str, root: Path, shares: Sequence[Sequence[str]]) -> Iterator[Tasks]:
    """A process for each share of files below ``root``, all ready to begin.

    They are in sessions of their own, for a terminal's Ctrl-C is this process's alone; they end with their input.

    Args:
        work: what they do, as `layerfs.bench.task` names it.
    """
    command = [sys.executable, "-I", "-S", task.__file__, work, str(root)]
    with ExitStack() as stack:
        processes = []
        for share in shares:
            one = Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True)
            stack.enter_context(one)
            stack.callback(one.kill)  # before it is waited for; nothing that it does is of use any more
            processes.append(one)
            _tell(one, "\t".join(share))
        tasks = Tasks(work, processes)
        tasks.wait()
        yield tasks


def _tell(one: Popen[str], line: str) -> None:
    _stream(one.stdin).write(f"{line}\n")
    _stream(one.stdin).flush()


def _stream(given: IO[str] | None) -> IO[str]:
    assert given is not None  # all three are pipes
    return given
