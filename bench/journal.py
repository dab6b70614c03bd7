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

    def samples(self, workloads: Iterable[Workload], circumstances: Mapping[str, object]) -> list[Sample]:
        """Those of the earlier run; a line that was cut off while it was written is taken out of the file.

        Args:
            circumstances: what the earlier run must have in common with this one beside its plan.

        Raises `InvalidArgument` where the file belongs to another plan, or the run was in other circumstances.
        """
        self._plan |= json.loads(json.dumps(circumstances))
        try:
            data = self._file.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise refused(f"reading {str(self._file)!r}", error) from error
        by_label = {work.label: work for work in workloads}
        found: list[Sample] = []
        whole = 0
        for line in data.splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:  # the machine went down while it was written
                break
            if not line.endswith(b"\n"):
                break
            if whole == 0:
                self._compare(entry)
            else:
                found.append(_sample(entry, by_label[entry["workload"]]))
            whole += len(line)
        if whole < len(data):
            os.truncate(self._file, whole)
        return found

    def _compare(self, earlier: object) -> None:
        """Refuse a run that had another plan, and say what was different."""
        if not isinstance(earlier, dict):
            raise InvalidArgument(
                f"{str(self._file)!r} holds no stopped run; remove the file, or name another --output"
            )
        names = [name for name in {**earlier, **self._plan} if earlier.get(name) != self._plan.get(name)]
        if names:
            what = "; ".join(_difference(name, earlier.get(name), self._plan.get(name)) for name in names)
            raise InvalidArgument(
                f"{str(self._file)!r} holds a stopped run that this one cannot go on with: {what}; repeat it as it "
                "was, or remove the file"
            )

    def add(self, sample: Sample) -> None:
        try:
            new = not self._file.exists() or self._file.stat().st_size == 0
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


def _difference(name: str, earlier: object, now: object) -> str:
    if isinstance(earlier, dict | list) and isinstance(now, dict | list):
        return f"other {name}"
    return f"{name} was {earlier!r} and is {now!r}"


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
