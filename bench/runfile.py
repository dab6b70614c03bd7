"""A run as a file: pytest-benchmark's JSON, so that its tools open it, with layerfs's own fields in ``extra_info``.

One benchmark in the file is one step of one workload on one target; its ``stats.data`` are the raw samples in seconds.
Its group is the workload with the step, so that ``pytest-benchmark compare`` sets the drivers side by side.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

from layerfs.bench import calibration, fingerprint
from layerfs.bench.results import Run, Series
from layerfs.bench.statistics import Interval, median, ratio
from layerfs.errors import InvalidArgument, refused
from layerfs.sizes import format_size

FORMAT = 1
"""Of the fields under ``extra_info``; a change that an older reader would misread adds one."""

# The version of pytest-benchmark whose format this is; its reader checks only that the field is there.
_PYTEST_BENCHMARK = "5.1.0"


def document(run: Run, more: Mapping[str, object] = MappingProxyType({})) -> dict[str, object]:
    """The run as pytest-benchmark's document; ``layerfs`` beside its own fields has what concerns the whole run.

    Args:
        more: further fields of that.
    """
    return {
        "machine_info": fingerprint.machine_info(),
        "commit_info": fingerprint.commit_info(),
        "benchmarks": _benchmarks(run),
        "datetime": run.started.isoformat(),
        "version": _PYTEST_BENCHMARK,
        "layerfs": {
            "format": FORMAT,
            "size": run.size,
            "seed": run.seed,
            "targets": list(run.targets),
            "fingerprint": run.fingerprint,
            "warnings": list(run.warnings),
            "failures": [asdict(failure) for failure in run.failures],
            "calibration": calibration.entries(calibration.measured(run)),
            **more,
        },
    }


def check(file: Path) -> None:
    """Raise `InvalidArgument` where no such file could be written; to be asked before minutes of measuring."""
    if file.is_dir():
        raise InvalidArgument(f"{str(file)!r} is a directory; name a file in it")
    there = next(place for place in file.absolute().parents if place.exists())
    if not there.is_dir():
        raise InvalidArgument(f"{str(file)!r} cannot be written: {str(there)!r} is no directory")
    probe = there / _unfinished(file).name
    try:  # access(2) allows root everything, also in /proc and other places that take no files
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InvalidArgument(
            f"{str(file)!r} cannot be written: {error.strerror} in {str(there)!r}; name another place"
        ) from error


def write(contents: dict[str, object], file: Path) -> None:
    """Write a run's `document`, whole or not at all. Raises a `LayerfsError` naming the file."""
    unfinished = _unfinished(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_text(json.dumps(contents, indent=1) + "\n")
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise refused(f"writing the run file {str(file)!r}", error) from error


def _unfinished(file: Path) -> Path:
    return file.with_name(f".{file.name}.{os.getpid()}")


def default_name(targets: Sequence[str], size: int, started: datetime) -> str:
    """``20260131-142205-overlay2,btrfs-1G.json``, in local time."""
    amount = format_size(size).replace(".0", "").replace(" ", "").removesuffix("iB")
    return f"{started.astimezone():%Y%m%d-%H%M%S}-{','.join(targets)}-{amount}.json"


def _benchmarks(run: Run) -> list[dict[str, object]]:
    """Each is compared with the run's first target that did the same."""
    first: dict[tuple[str, str], Series] = {}
    return [_benchmark(s, first.setdefault((s.workload.label, s.step), s)) for s in run.series()]


def _benchmark(series: Series, first: Series) -> dict[str, object]:
    work = series.workload
    parameters = {"target": series.target, "size": work.size, **work.parameters}
    variant = "-".join([series.target, *work.variant])
    name = f"{work.name}[{variant}]"
    return {
        "group": f"{work.label}: {series.step}",
        "name": f"{name} {series.step}",
        "fullname": f"{work.name}/{series.step}[{variant}]",
        "params": parameters,
        "param": variant,
        "extra_info": {**_extra(series), **_against(series, first)},
        "options": {"disable_gc": False, "timer": "perf_counter", "min_rounds": len(series.samples), "warmup": False},
        "stats": _stats(series.seconds),
    }


def _extra(series: Series) -> dict[str, object]:
    return {
        "workload": series.workload.name,
        "label": series.workload.label,
        "step": series.step,
        "target": series.target,
        "speed": {"unit": series.unit, **_interval(median(series.speeds))},
        "bytes": [timing.bytes for timing in series.timings],
        "operations": [timing.operations for timing in series.timings],
        "latencies": [[[seconds, number] for seconds, number in sorted(t.latencies.items())] for t in series.timings],
        **({"courses": courses} if (courses := [[round(at, 6) for at in t.course] for t in series.timings])[0] else {}),
        "processor": series.processor,
        "rounds": [sample.round for sample in series.samples],
        "counters": series.counters,
        "cache": [
            {"asked": c.asked, "how": c.how, "resident": c.resident, "as_asked": c.as_asked}
            for c in (sample.cache for sample in series.samples)
            if c
        ],
    }


def _against(series: Series, first: Series) -> dict[str, object]:
    """The ratio of medians of the times, with its interval."""
    if series is first:
        return {}
    return {"against": {"target": first.target, "times": _interval(ratio(series.seconds, first.seconds))}}


def _interval(interval: Interval) -> dict[str, float]:
    return {"low": interval.low, "median": interval.middle, "high": interval.high}


def _stats(data: Sequence[float]) -> dict[str, object]:
    """The statistics that pytest-benchmark has, of seconds."""
    mean, middle, total = statistics.mean(data), statistics.median(data), sum(data)
    deviation = statistics.stdev(data) if len(data) > 1 else 0.0
    lower, _, upper = statistics.quantiles(data, n=4, method="inclusive") if len(data) > 1 else [data[0]] * 3
    fence = 1.5 * (upper - lower)
    inner = [value for value in data if lower - fence <= value <= upper + fence]
    beyond = sum(abs(value - mean) > deviation for value in data)
    return {
        "min": min(data),
        "max": max(data),
        "mean": mean,
        "stddev": deviation,
        "rounds": len(data),
        "median": middle,
        "iqr": upper - lower,
        "q1": lower,
        "q3": upper,
        "iqr_outliers": len(data) - len(inner),
        "stddev_outliers": beyond,
        "outliers": f"{beyond};{len(data) - len(inner)}",
        "ld15iqr": min(inner),
        "hd15iqr": max(inner),
        "ops": len(data) / total if total else 0,
        "total": total,
        "data": list(data),
        "iterations": 1,
    }
