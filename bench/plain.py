"""Plain I/O on a sample's files: by fio on large ones, and by the same system calls from here on small ones.

fio's clock tells whole milliseconds, of which a small file takes less than one, and one of 16M a few.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layerfs.bench import fio
from layerfs.bench.content import Supply
from layerfs.bench.workload import Stopwatch, Timing, repeated

FIO_FROM = 64 << 20
"""Bytes of the smallest file that fio measures."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is done with each file, from its opening to its closing.

    Attributes:
        mode: ``write``, ``read``, ``randread`` or ``randwrite``; in random order no block comes twice.
        block, size: bytes of one operation, and of a file; a block is no larger than the file.
        seed: of offsets and of the data written.
        part: bytes of each file that are read or written in random order, at least a block; None for all.
        new: the file is made; otherwise it is there.
        fsync: as the end of it.
    """

    mode: str
    block: int
    size: int
    seed: int
    part: int | None = None
    new: bool = False
    fsync: bool = False


def run(step: str, files: Sequence[Path], job: Job) -> Timing:
    """Do the job on one file after the other; the figures are those of one file.

    Raises `OSError`, and what `layerfs.bench.fio.run` raises.
    """
    do = _by_fio if job.size >= FIO_FROM else _by_calls
    return repeated([do(step, file, job) for file in files])


def _by_fio(step: str, file: Path, job: Job) -> Timing:
    options: dict[str, object] = {} if job.part is None else {"io_size": max(job.part, job.block)}
    if "write" in job.mode:
        options["end_fsync"] = int(job.fsync)
        options |= {} if job.new else {"overwrite": 1, "allow_file_create": 0}
    done = fio.run(file, job.mode, job.block, job.size, seed=job.seed, **options)
    moved, operations = (0, done.operations) if "rand" in job.mode else (done.bytes, 0)
    return Timing(step, done.seconds, moved, operations, done.latencies, done.processor)


def _by_calls(step: str, file: Path, job: Job) -> Timing:
    source, at_random = random.Random(job.seed), "rand" in job.mode  # noqa: S311
    block = min(job.block, job.size)
    offsets: Sequence[int] = range(0, job.size, block)
    if at_random:
        whole = range(job.size // block)
        amount = job.size if job.part is None else job.part
        offsets = [block * number for number in source.sample(whole, min(len(whole), max(amount // block, 1)))]
    writes = "write" in job.mode
    if writes:
        operate, data = os.pwritev, Supply(job.size, block, job.seed, file.name)
        parts = [data.at(offset) for offset in offsets]
    else:
        operate, buffer = os.preadv, memoryview(bytearray(block))
        parts = [buffer[: job.size - offset] for offset in offsets]  # the last of a file may be shorter
    flags = (os.O_WRONLY | (os.O_CREAT if job.new else 0)) if writes else os.O_RDONLY
    times: list[float] = []
    clock = Stopwatch()
    descriptor = os.open(file, flags | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fadvise(
            descriptor, 0, 0, os.POSIX_FADV_RANDOM if at_random else os.POSIX_FADV_SEQUENTIAL
        )  # as fio does
        for offset, piece in zip(offsets, parts, strict=True):
            begin = time.perf_counter()
            operate(descriptor, [piece], offset)
            times.append(time.perf_counter() - begin)
        if job.fsync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if at_random:
        return clock.lap(step, operations=len(offsets), latencies=Counter(times))
    return clock.lap(step, bytes=job.size)
