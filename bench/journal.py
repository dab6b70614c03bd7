"""Samples as they are taken, one JSON line each, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from layerfs.bench.caches import CacheState, Reached
from layerfs.bench.results import Sample
from layerfs.bench.workload import Timing, Workload
from layerfs.errors import InvalidArgument, refused


class Journal:
    """The file of one run.

    Args:
        file: it is made with the first sample, and gone after `finish`.
        plan: what tells this run from others; samples of another plan are not taken over.
    """

    def __init__(self, file: Path, plan: Mapping[str, object]) -> None:
        self._file = file
        self._plan = json.loads(json.dumps(plan))

    def samples(self, workloads: Iterable[Workload]) -> list[Sample]:
        """Those of the earlier run. Raises `InvalidArgument` where the file belongs to another plan."""
        try:
            lines = self._file.read_text().splitlines()
        except FileNotFoundError:
            return []
        by_label = {work.label: work for work in workloads}
        found = []
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except ValueError:  # the machine went down while it was written
                break
            if number == 0 and entry != self._plan:
                raise InvalidArgument(
                    f"{str(self._file)!r} holds a stopped run with other options; repeat those, or remove the file"
                )
            if number:
                found.append(_sample(entry, by_label[entry["workload"]]))
        return found

    def add(self, sample: Sample) -> None:
        try:
            new = not self._file.exists()
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a") as out:
                if new:
                    out.write(json.dumps(self._plan) + "\n")
                out.write(json.dumps(_entry(sample)) + "\n")
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            raise refused(f"writing {str(self._file)!r}", error) from error

    def finish(self) -> None:
        """The run is complete and kept elsewhere."""
        with contextlib.suppress(FileNotFoundError):
            self._file.unlink()


def _entry(sample: Sample) -> dict[str, object]:
    return {
        "target": sample.target,
        "workload": sample.workload.label,
        "round": sample.round,
        "timings": [[*astuple(t)[:4], list(t.latencies.items()), *astuple(t)[5:]] for t in sample.timings],
        "counters": dict(sample.counters),
        "cache": [sample.cache.asked, sample.cache.how, sample.cache.resident] if sample.cache else None,
    }


def _sample(entry: dict[str, Any], work: Workload) -> Sample:
    timings = [
        Timing(step, seconds, size, count, dict(many), *further)
        for step, seconds, size, count, many, *further in entry["timings"]
    ]
    cache = entry["cache"]
    reached = Reached(CacheState(cache[0]), cache[1], cache[2]) if cache else None
    return Sample(entry["target"], work, entry["round"], timings, entry["counters"], reached)
