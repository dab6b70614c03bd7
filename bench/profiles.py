"""How much one run measures: a look, the usual, or everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MIB = 1 << 20


@dataclass(frozen=True)
class Profile:
    """Defaults that single options override.

    Attributes:
        sizes: of the large file, in bytes; below 1M, of each of many (see `layerfs.bench.content.alike`).
        workloads: their names; empty for all.
        precision: half of each interval, as a part of the median, at which enough samples have been taken.
        seconds: to spend on each target at most, once every workload has its fewest rounds; None for no limit.
        sweeps: whether parameters take all values that are worth a look, or only the telling ones.
        resumes: whether a run that was stopped goes on with the same command.
    """

    sizes: Sequence[int]
    workloads: Sequence[str]
    precision: float
    seconds: float | None
    sweeps: bool = False
    resumes: bool = False


PROFILES: Mapping[str, Profile] = {
    "smoke": Profile(
        (32 * _MIB,), ("copyup-first-write", "append-many", "frag-read", "cache-share", "layer-lifecycle"), 0.1, 15
    ),
    "default": Profile(
        (256 * _MIB,),
        (
            *("seqwrite-new", "rewrite-upper", "seqread-lower", "randread", "randwrite"),
            *("copyup-first-write", "layer-lifecycle", "diff-apply", "cache-share"),
            *("append-many", "tree-walk", "change-tree", "deep-layers", "build-steps", "start-stop-density"),
        ),
        0.05,
        60,
    ),
    "guest": Profile(
        (256 * _MIB,), ("seqwrite-new", "seqread-lower", "copyup-first-write", "layer-lifecycle", "diff-apply"), 0.1, 20
    ),
    "full": Profile(
        (4096, 65536, *(size * _MIB for size in (1, 8, 16, 32, 64, 256, 512, 1024))),
        (),
        0.03,
        None,
        sweeps=True,
        resumes=True,
    ),
}
