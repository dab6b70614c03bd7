"""What a workload is: its parameters, its set-up on a fresh layer, what it clocks and counts.

A new workload is a new file in ``bench/workloads/`` with one subclass of `Workload`; nothing else has to know of it.
A workload is told a layer and never which driver is below it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import itertools
import pkgutil
import statistics
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from layerfs.bench import content
from layerfs.bench.caches import CacheState
from layerfs.bench.content import Base
from layerfs.bench.target import Layer
from layerfs.errors import InvalidArgument
from layerfs.sizes import format_size


@dataclass(frozen=True, slots=True)
class Timing:
    """One clocked step of a sample.

    Attributes:
        step: what was clocked, in a word or two.
        seconds: how long the whole step took; where the step was repeated, the median of the repetitions.
        bytes: moved in that time; 0 where the figure to read is a latency or a rate of operations.
        operations: done in that time; 0 where the figure to read is a latency or a throughput.
        latencies: seconds of single operations and how often each occurred, as far as they were recorded.
        processor: seconds of processor time, in the kernel and outside, that the process which did it used; 0 where
            nobody knows. It does not grow with waiting, and so tells more work from a busy machine.
        course: seconds from the step's beginning at which each of its operations was done, where that is of interest.
    """

    step: str
    seconds: float
    bytes: int = 0
    operations: int = 0
    latencies: Mapping[float, int] = field(default_factory=dict)
    processor: float = 0.0
    course: Sequence[float] = ()


def repeated(timings: Sequence[Timing]) -> Timing:
    """A step that was done several times, as one `Timing`: the median repetition, with all of them as latencies.

    Where the repetitions have latencies of their own, those are kept.
    """
    first = timings[0]
    if len(timings) == 1:
        return first
    latencies: Counter[float] = Counter()
    for timing in timings:
        latencies.update(timing.latencies or {timing.seconds: 1})
    return dataclasses.replace(
        first,
        seconds=statistics.median(timing.seconds for timing in timings),
        processor=statistics.median(timing.processor for timing in timings),
        latencies=latencies,
    )


class Stopwatch:
    """Clocks steps that follow each other in this process, by the wall and by processor time."""

    def __init__(self) -> None:
        self._restart()

    def lap(self, step: str, **figures: Any) -> Timing:
        """What has passed since the last lap, as the `Timing` of ``step``; ``figures`` are its other fields."""
        seconds, processor = time.perf_counter() - self._wall, time.process_time() - self._processor
        self._restart()
        return Timing(step, seconds, processor=processor, **figures)

    @property
    def so_far(self) -> float:
        """Seconds since the last lap."""
        return time.perf_counter() - self._wall

    def _restart(self) -> None:
        self._processor, self._wall = time.process_time(), time.perf_counter()


@dataclass(frozen=True)
class Workload(ABC):
    """One kind of work. The fields of a subclass, all with defaults, are its parameters.

    A sample is ``set_up``, then the cache state of `reads` is established and checked, then ``measure``, ``counters``,
    ``tear_down``; the layer is made before and taken away after by the runner. Only ``measure`` is clocked, and it
    clocks itself. Data that was dirty when it begins has been written back.

    Attributes:
        size: bytes that the run's large file has (``--size``), or each of many small ones (see `alike`).
        seed: of every random choice in the workload.
        swept: names of the parameters of which the run measures several values.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for ``--list``."""
    sweep: ClassVar[Mapping[str, Sequence[object]]] = {}
    """Parameters of which one run measures several values."""
    programs: ClassVar[Sequence[str]] = ()
    """Programs that it runs, each from the package of the same name."""
    full_sweep: ClassVar[Mapping[str, Sequence[object]]] = {}
    """More values, and more parameters, for the profile full."""
    mounted: ClassVar[bool] = True
    """False where the workload wants its layer unmounted (`Layer.path` is not there then)."""
    about_layers: ClassVar[bool] = False
    """True where making, mounting or transferring layers is the work: targets without layers are passed over."""

    sized: ClassVar[bool] = True
    """False where ``--size`` has no meaning: of several sizes it is then measured once."""
    too_small: ClassVar[str] = ""
    """Why files below `content.SMALL` are nothing for it; "" where they are."""

    size: int
    seed: int
    swept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size < content.SMALLEST:
            raise InvalidArgument(f"--size {format_size(self.size)} is too small to measure; give at least 4K")

    @property
    def misfit(self) -> str:
        """Why these parameters do not go together; "" where they do."""
        return self.too_small if self.size < content.SMALL else ""

    @property
    def alike(self) -> int:
        """Files of ``size`` that a sample works on, one after the other; figures are those of one of them."""
        return content.alike(self.size)

    @classmethod
    def hindrance(cls) -> str:
        """Why it cannot be measured on this host; "" where it can."""
        return ""

    @property
    @abstractmethod
    def base(self) -> Base:
        """The committed layer that a sample's layer stands on.

        There always is one, as a container has: alone, a union driver's layer would be a plain directory.
        """

    @property
    def writes(self) -> int:
        """The most bytes that one sample adds to the backing."""
        return self.size * self.alike

    @property
    def layers_at_once(self) -> int:
        """How many layers it has mounted at a time."""
        return 1

    @property
    def state(self) -> CacheState:
        """The cache state that `reads` shall be in when ``measure`` begins; a parameter where it may be another."""
        return CacheState.ANY

    @property
    def reads(self) -> Sequence[str]:
        """The files, relative to the layer's root, whose cache state matters."""
        return ()

    def prepare(self, shared: Path) -> None:  # noqa: B027 - most workloads need nothing
        """Make what all samples share and no driver keeps, in the directory ``shared``; called once a run."""

    def set_up(self, layer: Layer) -> None:  # noqa: B027
        """Bring a fresh layer into the state that the measurement starts from."""

    @abstractmethod
    def measure(self, layer: Layer) -> list[Timing]:
        """Do the work and clock it."""

    def counters(self, layer: Layer) -> dict[str, int]:  # noqa: ARG002
        """Figures that do not depend on the machine's mood (bytes copied, blocks allocated), taken after `measure`.

        The lower, the better: the gate takes more of any of them as a regression.
        """
        return {}

    def tear_down(self, layer: Layer) -> None:  # noqa: B027
        """Take away what `measure` left beside the layer itself; called also when it failed."""

    @classmethod
    def defaults(cls) -> dict[str, object]:
        """The parameters by name as they are where none is given, without size and seed, which belong to the run."""
        return {f.name: f.default for f in dataclasses.fields(cls) if f.name not in ("size", "seed", "swept")}

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters by name."""
        return {name: getattr(self, name) for name in self.defaults()}

    @property
    def variant(self) -> list[str]:
        """The values of swept parameters, for people; a size or a block as ``4K``."""
        values = [(name, getattr(self, name)) for name in self.swept]
        return [_shown(name, value) for name, value in values]

    @property
    def label(self) -> str:
        """The name with the values of swept parameters: ``seqread-lower cold``."""
        return " ".join([self.name, *self.variant])


@functools.cache
def discover() -> Mapping[str, type[Workload]]:
    """Every workload in ``bench/workloads/``, by name."""
    package = importlib.import_module("layerfs.bench.workloads")
    found: dict[str, type[Workload]] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__, package.__name__ + ".")):
        for member in vars(importlib.import_module(module)).values():
            if inspect.isclass(member) and issubclass(member, Workload) and member.__module__ == module:
                found[member.name] = member
    return found


def chosen(
    names: Sequence[str],
    sizes: Sequence[int],
    seed: int,
    *,
    full: bool = False,
    left_out: Callable[[Workload], None] = lambda _work: None,
) -> list[Workload]:
    """The workloads of these names (all for none), with each combination of sizes and their swept parameters.

    Args:
        left_out: called with each combination that does not go together (see `Workload.misfit`).

    Raises `InvalidArgument` for a name that is not there.
    """
    known = discover()
    for name in names:
        if name not in known:
            raise InvalidArgument(f"there is no workload {name!r}; there are {', '.join(known)}")
    kinds = [known[name] for name in dict.fromkeys(names or known)]
    made = [variant for kind in kinds for variant in _variants(kind, sizes, seed, full=full)]
    for work in made:
        if work.misfit:
            left_out(work)
    return [work for work in made if not work.misfit]


def _variants(kind: type[Workload], sizes: Sequence[int], seed: int, *, full: bool) -> list[Workload]:
    sizes = sizes if kind.sized else [max(sizes)]
    sweep = {**({"size": sizes} if len(sizes) > 1 else {}), **kind.sweep, **(kind.full_sweep if full else {})}
    made = []
    for values in itertools.product(*sweep.values()):
        given: dict[str, Any] = {"size": sizes[0], **dict(zip(sweep, values, strict=True))}
        made.append(kind(seed=seed, swept=tuple(sweep), **given))
    return made


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    return _short(value) if name in ("size", "block", "memory") else str(value)


def _short(value: int) -> str:
    return format_size(value).replace(".0", "").replace(" ", "").removesuffix("iB").removesuffix("Bytes")
