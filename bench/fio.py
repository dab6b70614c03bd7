"""fio(1) for plain I/O loads: one job, its result as typed figures."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerfs.errors import LayerfsError, OutOfSpace

_END_SECONDS = 10

# What every job has. Space is not allocated ahead, since allocation on demand is part of what is measured; the cache
# is left as it was brought about; one thread, no fork. Data is random, and scrambled for each block, so that no file
# system can take two for one (fio's own choice, which mixes the time into the data; it costs no measurable time, where
# filling every buffer anew would take as long as the write into the page cache itself).
_COMMON: Mapping[str, object] = {
    "ioengine": "psync",
    "direct": 0,
    "fallocate": "none",
    "invalidate": 0,
    "thread": 1,
    "group_reporting": 1,
    "allow_mounted_write": 1,
    "scramble_buffers": 1,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one job did.

    Attributes:
        seconds: from its start to its end, with opening the file and a final fsync; within a millisecond, and closer
            where that is the time of its operations.
        bytes, operations: moved and done in that time.
        latencies: seconds of completion and how many operations took so long (fio's histogram, 1.6 % wide bins).
        processor: seconds of processor time, in and outside the kernel.
    """

    seconds: float
    bytes: int
    operations: int
    latencies: Mapping[float, int]
    processor: float


def version() -> str:
    """``fio-3.33``; "" where there is no fio."""
    if not shutil.which("fio"):
        return ""
    return subprocess.run(["fio", "--version"], capture_output=True, text=True, check=False).stdout.strip()


def run(file: Path, mode: str, block: int, size: int, *, seed: int, **options: object) -> Outcome:
    """Run one job on ``file`` and wait for it.

    Args:
        mode: ``write``, ``read``, ``randread`` or ``randwrite``.
        block, size: bytes of one operation and of the file.
        seed: of offsets and of the data written, of which a few bytes in each 512 depend on the time.
        options: further fio options (``end_fsync=1``); see fio(1).

    Raises `OutOfSpace` for a full backing, `LayerfsError` for what else fio says.
    """
    job = {
        **_COMMON,
        "filename": _escaped(file),
        "rw": mode,
        "bs": block,
        "size": size,
        "randseed": seed + 1,
        **options,
    }
    arguments = [
        "fio",
        "--output-format=json+",
        "--name=layerfs",
        *(f"--{name}={value}" for name, value in job.items()),
    ]
    answer = _answer(arguments)
    return _outcome(answer["jobs"][0], "read" if "read" in mode else "write")


def _answer(arguments: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Run fio in a session of its own: a terminal's Ctrl-C reaches layerfs alone, which then ends fio."""
    environment = {**os.environ, "LC_ALL": "C"}
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            out, errors = process.communicate()
        except BaseException:
            process.terminate()  # fio then gives back its shared memory
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
            process.kill()
            raise
    if process.returncode:
        reason = " ".join((errors or out).split())
        if "No space left" in reason or "quota exceeded" in reason:
            raise OutOfSpace(f"running fio: {reason}")
        raise LayerfsError(f"running fio: {reason}")
    answer: dict[str, list[dict[str, Any]]] = json.loads(out[out.index("{") :])
    return answer


def _outcome(job: dict[str, Any], direction: str) -> Outcome:
    figures: dict[str, Any] = job[direction]
    return Outcome(
        seconds=_seconds(figures),
        bytes=int(_number(figures["io_bytes"])),
        operations=int(_number(figures["total_ios"])),
        latencies=_latencies(figures),
        processor=(_number(job["usr_cpu"]) + _number(job["sys_cpu"])) / 100 * _number(job["job_runtime"]) / 1e3,
    )


def _seconds(figures: dict[str, Any]) -> float:
    """What the operations took together, as far as the run's time agrees, which fio rounds up to milliseconds.

    Operations take less than the run (a final fsync is none of them), or, of several jobs at once, more.
    """
    latest = max(_number(figures["runtime"]), 1) / 1e3
    operations = _number(figures["lat_ns"]["mean"]) * _number(figures["lat_ns"]["N"]) / 1e9
    return min(max(operations, latest - 1e-3) or latest, latest)


def _latencies(figures: dict[str, object]) -> dict[float, int]:
    completion = figures["clat_ns"]
    bins = completion.get("bins", {}) if isinstance(completion, dict) else {}
    return {int(nanoseconds) / 1e9: int(count) for nanoseconds, count in bins.items()}


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        raise LayerfsError(f"running fio: its answer has {value!r} where a number belongs")
    return float(value)


def _escaped(file: Path) -> str:
    """A colon would end the name for fio."""
    return str(file).replace("\\", "\\\\").replace(":", "\\:")
