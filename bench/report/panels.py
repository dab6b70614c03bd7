"""The report's panels: each takes from a machine's figures what it shows, or says which run would give it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element

from layerfs.bench import history, statistics
from layerfs.bench.native import NATIVE
from layerfs.bench.report import article, axes, plots
from layerfs.bench.report.data import Figure, Machine
from layerfs.bench.report.plots import Axis, Band, Cell, Line, Mark, Point, Row
from layerfs.bench.statistics import Interval
from layerfs.bench.workload import discover

_MOST_PICTURES = 12
_SPEED = "speed, bytes a second; higher is better"


@dataclass(frozen=True)
class Panel:
    """A part of the report.

    Attributes:
        name: for file names and links.
        pictures: by a name for each; none where the run does not hold what is needed.
        note: what a reader should know of it.
        wanted: the command that would give the missing figures.
    """

    name: str
    title: str
    pictures: Mapping[str, Element] = field(default_factory=dict)
    note: str = ""
    wanted: str = ""


def all_panels(machine: Machine) -> list[Panel]:
    """In the order in which they are read."""
    makers = (heat_map, copy_up, size_sweep, memory_sweep, latencies, cache_sharing, density, course)
    return [make(machine) for make in makers]


def heat_map(machine: Machine) -> Panel:
    """Every driver against the bare directory."""
    columns = [target for target in machine.targets if target != NATIVE]
    against, among = [], []
    for name, by_target in representative(machine):
        figures = [by_target.get(target) for target in columns]
        if NATIVE in by_target:
            against.append((name, [_ratio(figure, by_target[NATIVE]) for figure in figures]))
        elif len([figure for figure in figures if figure]) > 1:
            fastest = min((figure for figure in figures if figure), key=lambda figure: figure.middle)
            among.append((name, [_ratio(figure, fastest) for figure in figures]))
    bands = [Band("time, as a multiple of the bare directory's", against)] if against else []
    bands += [Band("work on layers: time, as a multiple of the fastest driver's", among)] if among else []
    wanted = "layerfs bench --driver all"
    if not bands:
        return Panel("heat", "Drivers and workloads", wanted=wanted)
    shown = plots.heat("Time each driver takes", columns, bands)
    note = (
        "Less is better: 2.00× takes twice the time. ~ marks what the samples cannot tell from 1×. Of workloads "
        "measured at several sizes, the largest is shown."
    )
    return Panel("heat", "Drivers and workloads", {"heat": shown}, note, "" if against else wanted)


def copy_up(machine: Machine) -> Panel:
    """The first write to a file of a lower layer, step by step; and from what part on a whole copy is cheaper."""
    figures = [figure for figure in machine.of("copyup-first-write") if _is_usual(figure)]
    wanted = "layerfs bench --driver all --workload copyup-first-write,copyup-crossover"
    pictures: dict[str, Element] = {}
    if figures:
        size = max(figure.size for figure in figures)
        figures = [figure for figure in figures if figure.size == size]
        steps = [
            step for step in ("open", "first write", "fsync", "second write") if any(f.step == step for f in figures)
        ]
        rows = [Row(_STEPS[step], f.target, f.time) for step in steps for f in figures if f.step == step]
        title = f"Changing 4K of a lower layer's {axes.size(size)} file"
        pictures["copy-up"] = plots.dots(title, Axis("time", axes.seconds, log=True), rows)
        space = [
            Row(words, f.target, count)
            for words, counter in (
                ("a fresh layer", "bytes when fresh"),
                ("what the 4K change adds", "bytes copied up"),
            )
            for f in figures
            if f.step in steps[:1] and f.target != NATIVE and (count := f.counter(counter))
        ]
        if space:
            axis = Axis("space on the backing", axes.size, log=True, base=2, values=[4096])
            pictures["copied"] = plots.dots(f"Space that it takes ({axes.size(size)} file)", axis, space)
    words, crossover = _main(machine, machine.of("copyup-crossover"), "percent")
    percents = {figure.parameters.get("percent") for figure in crossover}
    if len(percents) > 2:
        pictures["crossover"] = plots.lines(
            _titled(f"Changing a part of a lower layer's {axes.size(crossover[0].size)} file", words),
            Axis("part of its 4K blocks that is changed", lambda v: f"{v:g} %", log=True),
            Axis("time with copy-up and fsync; lower is better", axes.seconds, log=True),
            _courses(crossover, lambda f: _real(f.parameters.get("percent")), lambda f: f.time),
        )
    note = "Copy-up happens within open(2), where no I/O tester looks; so every system call has a clock of its own."
    return Panel("copy-up", "Copy-up", pictures, note, wanted if not figures else "")


def _is_usual(figure: Figure) -> bool:
    """Whether its parameters are those of the workload where nothing else is asked for."""
    usual = {field.name: field.default for field in dataclasses.fields(discover()[figure.workload])}
    return all(
        figure.parameters.get(name, value) == value for name, value in usual.items() if name in figure.parameters
    )


def _variants(machine: Machine, figures: Sequence[Figure], *free: str) -> list[tuple[list[str], list[Figure]]]:
    """Figures that differ in nothing but ``free`` parameters (or ``size``) and the target; the most figures first.

    Of several with as many, the largest file first. With each, what sets it apart, for a picture shows one of them.
    """
    found: dict[tuple[object, ...], list[Figure]] = {}
    for figure in figures:
        fixed = tuple((n, v) for n, v in sorted(figure.parameters.items()) if n not in free)
        found.setdefault((None if "size" in free else figure.size, fixed), []).append(figure)
    ordered = sorted(found.values(), key=lambda some: (-len(some), -max(figure.size for figure in some)))
    return [(machine.words(some[0], *free), some) for some in ordered]


def _main(machine: Machine, figures: Sequence[Figure], *free: str) -> tuple[list[str], list[Figure]]:
    """The first of `_variants`."""
    return next(iter(_variants(machine, figures, *free)), ([], []))


def _titled(title: str, words: Sequence[str]) -> str:
    return f"{title} ({', '.join(words)})" if words else title


_STEPS = {
    "open": "open (a union copies the file up here)",
    "first write": "first write of 4K",
    "fsync": "fsync",
    "second write": "second write, with fsync",
}

# Workload, step, the cache's state, title, and the article's test.
_SWEPT: Sequence[tuple[str, str, str, str, str]] = (
    ("seqwrite-new", "write", "", "Write a new file in {block} blocks", "write"),
    ("rewrite-upper", "rewrite", "", "Overwrite it in {block} blocks", "rewrite"),
    ("seqread-lower", "read", "cold", "Read a lower file in {block} blocks, cold", ""),
    ("seqread-lower", "read", "warm", "Read a lower file in {block} blocks, warm", "read"),
    ("reread", "second read", "", "Read it a second time, {block} blocks", "reread"),
    ("randread", "read", "", "Read it in random {block} blocks, cold", "randread"),
    ("randwrite", "write", "", "Write it in random {block} blocks", "randwrite"),
)
_ENDED: Mapping[object, str] = {True: ", then fsync", False: ", no fsync"}


def size_sweep(machine: Machine) -> Panel:
    """Speed over the file's size, with the article's points, and where memory ends."""
    pictures: dict[str, Element] = {}
    marks, where = _limits(machine)
    for workload, step, state, title, test in _SWEPT:
        asked = [f for f in machine.of(workload, step) if f.bytes_rate and state in ("", f.parameters.get("state"))]
        shown = [one for one in _variants(machine, asked, "size") if len({f.size for f in one[1]}) > 1]
        for _, figures in shown:
            courses = _courses(figures, lambda f: float(f.size), lambda f: f.bytes_rate)
            for target in dict.fromkeys(figure.target for figure in figures):
                theirs = article.points().get((test, target), [])
                if theirs:
                    points = [Point(p.size, Interval(p.rate, p.rate, p.rate)) for p in theirs]
                    courses.append(Line(target, points, theirs=True))
            largest = max(point.x for course in courses for point in course.points)
            within = [mark for mark in marks if mark.x <= 4 * largest]
            axis = Axis("size of the file", axes.size, log=True, base=2, values=[mark.x for mark in within])
            first = figures[0]
            apart = machine.words(first, *(["state"] if state else [])) if len(shown) > 1 else []
            name = "-".join(["size", workload, *([state] if state else []), *map(_slug, apart)])
            told = title.format(block=axes.size(_real(first.parameters.get("block"))))
            told += _ENDED.get(first.parameters.get("fsync"), "")
            told = _titled(told, machine.words(first, "state", "block", "fsync"))
            pictures[name] = plots.lines(told, axis, Axis(_SPEED, axes.speed, log=True, most=5), courses, within)
    if not pictures:
        names = ",".join(dict.fromkeys(workload for workload, *_ in _SWEPT))
        wanted = f"layerfs bench --driver all --size 4K,64K,1M,16M,64M,256M,1G --workload {names}"
        return Panel("size", "Size of the file", wanted=wanted)
    note = (
        f"Bands are 95 % confidence intervals. Below 1M a sample takes many files, with their opening. "
        f"{where} The article's points (iozone, 2017) come from another machine, "
        "from its page cache and without fsync: compare the shapes, not the heights. Its Read column for aufs repeats "
        "its Re-write column and is left out."
    )
    return Panel("size", "Size of the file", pictures, note)


def memory_sweep(machine: Machine) -> Panel:
    """Speed over size under caps on memory."""
    pictures: dict[str, Element] = {}
    figures = machine.of("knee-sweep")
    caps = sorted({_real(figure.parameters.get("memory")) for figure in figures})
    for step in ("write", "read"):
        for cap in caps:
            some = [f for f in figures if f.step == step and _real(f.parameters.get("memory")) == cap and f.bytes_rate]
            _, some = _main(machine, some, "size")
            if len({figure.size for figure in some}) > 1 and cap > 0:
                pictures[f"memory-{step}-{axes.size(cap)}"] = plots.lines(
                    _titled(f"{step.capitalize()} with {axes.size(cap)} of memory", machine.words(some[0], "memory")),
                    Axis("size of the file", axes.size, log=True, base=2, values=[cap]),
                    Axis(_SPEED, axes.speed, log=True, most=5),
                    _courses(some, lambda f: float(f.size), lambda f: f.bytes_rate),
                    [Mark(cap, "memory")],
                )
    wanted = (
        "" if pictures else "layerfs bench --driver all --profile full --size 64M,256M,512M,1G --workload knee-sweep"
    )
    note = "If the knee moves with the memory, it is the page cache's and not the driver's."
    return Panel("memory", "Size and memory", pictures, note, wanted)


def latencies(machine: Machine) -> Panel:
    """How long single operations took, with the few slow ones in view."""
    pictures: dict[str, Element] = {}
    for name, by_target in representative(machine):
        courses = [Line(target, _percentiles(f.latencies), marks=False, steps=True) for target, f in by_target.items()]
        courses = [course for course in courses if len(course.points) > 2]
        if not courses or len(pictures) >= _MOST_PICTURES:
            continue
        rightmost = max(point.x for course in courses for point in course.points)
        ticks = [place for place in (math.log10(2), 1.0, 2.0, 3.0, 4.0, 5.0) if place <= rightmost]
        unit = f"latency of one operation in {name.split(':')[0]}"
        pictures["latency-" + _slug(name)] = plots.lines(
            name,
            Axis("operations that took no longer", _share, ticks=ticks),
            Axis(f"{unit}; lower is better", axes.seconds, log=True),
            courses,
        )
    wanted = "" if pictures else "layerfs bench --driver all --workload randread,randwrite,layer-lifecycle"
    note = "The further to the right, the rarer: 99 % means that one operation in a hundred took longer."
    return Panel("latency", "Latencies", pictures, note, wanted)


def cache_sharing(machine: Machine) -> Panel:
    """How many copies of one file the page cache holds for several readers."""
    words, figures = _main(machine, machine.of("cache-share", "first reader"), "readers")
    found = []
    for figure in figures:
        cached, readers = figure.counter("bytes cached"), _real(figure.parameters.get("readers"))
        size = min(figure.size, _real(figure.parameters.get("most")) or figure.size)
        if cached and readers and size:
            copies = Interval(*(getattr(cached, f) / size for f in ("low", "middle", "high")))
            found.append((figure, readers, copies, size))
    if not found:
        wanted = "layerfs bench --driver all --profile full --workload cache-share"
        return Panel("cache", "Page cache", wanted=wanted)
    title = _titled(f"Copies of one {axes.size(min(size for *_, size in found))} file in the page cache", words)
    if len({readers for _, readers, *_ in found}) > 1:
        targets = dict.fromkeys(figure.target for figure, *_ in found)
        courses = [Line(t, [Point(n, copies) for f, n, copies, _ in found if f.target == t]) for t in targets]
        ticks = sorted({readers for _, readers, *_ in found})
        readers_axis = Axis("layers that read it", axes.number, log=True, base=2, ticks=ticks)
        shown = plots.lines(title, readers_axis, Axis("copies; fewer are better", axes.number, values=[1]), courses)
    else:
        axis = Axis(f"copies, for {found[0][1]:.0f} layers that read it", axes.number, values=[1])
        shown = plots.dots(title, axis, [Row("", f.target, copies) for f, _, copies, _ in found])
    note = "One copy for all is what lets many containers of one image fit into memory. Counted with mincore(2)."
    return Panel("cache", "Page cache", {"cache": shown}, note)


def density(machine: Machine) -> Panel:
    """Many layers made and mounted one after the other, then taken down."""
    figures = [f for f in machine.of("start-stop-density") if f.parameters.get("tasks") == 1]
    words, figures = _main(machine, figures, "layers")
    if not figures:
        wanted = "layerfs bench --driver all --profile full --workload start-stop-density"
        return Panel("density", "Many layers", wanted=wanted)
    pictures: dict[str, Element] = {}
    counts = sorted({_real(figure.parameters.get("layers")) for figure in figures})
    most = [figure for figure in figures if _real(figure.parameters.get("layers")) == counts[-1]]
    ramps = [ramp for target in dict.fromkeys(f.target for f in most) if (ramp := _ramp(target, most))]
    if ramps:
        pictures["density"] = plots.lines(
            _titled(f"{counts[-1]:,.0f} layers up, and down again", words),
            Axis("time since the beginning", axes.seconds),
            Axis("layers mounted", axes.number),
            ramps,
        )
    ups = [figure for figure in figures if figure.step == "up"]
    if len(counts) > 1:
        pictures["density-rate"] = plots.lines(
            _titled("Layers made and mounted a second", words),
            Axis("layers mounted in the end", axes.number, log=True, ticks=counts),
            Axis("layers a second; higher is better", axes.number, log=True),
            _courses(ups, lambda f: _real(f.parameters.get("layers")), lambda f: f.rate),
        )
    elif not ramps:
        rows = [Row("", figure.target, figure.rate) for figure in ups]
        title = _titled("Layers made and mounted a second", [f"{counts[0]:,.0f} in all", *words])
        pictures["density-rate"] = plots.dots(title, Axis("layers a second", axes.number), rows)
    return Panel("density", "Many layers", pictures, "On one parent of 100 small files; each with a mount of its own.")


def course(machine: Machine) -> Panel:
    """What several runs measured, in the order of time."""
    found: dict[tuple[object, ...], list[history.Course]] = {}
    for one in history.courses(machine):
        if len(one.figures) >= history.FEWEST:
            found.setdefault(one.figures[0].what, []).append(one)
    if not found:
        wanted = f"layerfs bench, {history.FEWEST} times or more, and all its run files given to layerfs report"
        return Panel("history", "History", wanted=wanted)
    telling = sorted(found.values(), key=lambda courses: -max(_change(one) for one in courses))
    pictures: dict[str, Element] = {}
    for courses in telling[:_MOST_PICTURES]:
        first = courses[0]
        moments = sorted({run.started.timestamp() for one in courses for run in one.runs})
        place = {moment: number + 1.0 for number, moment in enumerate(moments)}
        shown = [
            Line(
                one.target,
                [Point(place[r.started.timestamp()], f.time) for r, f in zip(one.runs, one.figures, strict=True)],
            )
            for one in courses
        ]
        marks = {place[one.runs[n].started.timestamp()]: one.target for one in courses for n in one.changes}
        pictures["history-" + _slug(first.name)] = plots.lines(
            first.name,
            Axis("runs, the oldest first", axes.number),
            Axis("time; lower is better", axes.seconds, log=True),
            shown,
            [Mark(x - 0.5, target, change=True) for x, target in sorted(marks.items())],
        )
    note = "Dashed lines are change points (e-divisive means, p < 0.01). Those that changed most come first."
    return Panel("history", "History", pictures, note)


def representative(machine: Machine) -> list[tuple[str, dict[str, Figure]]]:
    """Each step of each workload by target: at the largest size; of many variants both ends and the commonest."""
    groups: dict[tuple[str, str], dict[tuple[object, ...], dict[str, Figure]]] = {}
    order = {target: number for number, target in enumerate(machine.targets)}
    for figure in sorted(machine.figures, key=lambda f: (f.workload, -f.size)):
        if figure.target not in order:
            continue
        variant = tuple(figure.parameters.get(name) for name in machine.varied.get(figure.workload, []))
        by_target = groups.setdefault((figure.workload, figure.step), {}).setdefault(variant, {})
        same_size = not by_target or next(iter(by_target.values())).size == figure.size
        if same_size:
            by_target.setdefault(figure.target, figure)
    found = []
    for (workload, step), variants in groups.items():
        keys = sorted(variants, key=lambda key: [(_real(v), str(v)) for v in key])
        if len(keys) > 3:
            middle = keys[len(keys) // 2]
            telling = max(keys[1:-1], key=lambda key: (len(variants[key]), key == middle))
            keys = [keys[0], telling, keys[-1]]
        for key in keys:
            words = machine.words(next(iter(variants[key].values())))
            by_target = dict(sorted(variants[key].items(), key=lambda item: order[item[0]]))
            found.append((f"{' '.join([workload, *words])}: {step}", by_target))
    return found


def _ratio(figure: Figure | None, reference: Figure) -> Cell:
    if figure is None:
        return Cell(None)
    if figure is reference:
        return Cell(Interval(1, 1, 1))
    if min(figure.seconds) <= 0 or min(reference.seconds) <= 0:
        return Cell(None)
    return Cell(statistics.ratio(figure.seconds, reference.seconds))


def _courses(figures: Iterable[Figure], x: object, y: object) -> list[Line]:
    points: dict[str, list[Point]] = {}
    for figure in figures:
        value = y(figure)  # type: ignore[operator]
        if value is not None:
            points.setdefault(figure.target, []).append(Point(x(figure), value))  # type: ignore[operator]
    return [Line(target, found) for target, found in points.items()]


def _percentiles(latencies: Mapping[float, int]) -> list[Point]:
    """Where x is how many nines: 1 for 90 %, 2 for 99 %."""
    total = sum(latencies.values())
    points: list[Point] = []
    seen = 0
    for latency in sorted(latencies):
        x = -math.log10(1 - seen / total)
        if latency > 0 and (not points or x - points[-1].x > 0.02 or latency > points[-1].y.middle * 1.5):
            points.append(Point(x, Interval(latency, latency, latency)))
        seen += latencies[latency]
    return [*points, Point(points[-1].x + 0.15, points[-1].y)] if points else []  # the slowest, to be seen


def _share(place: float) -> str:
    return f"{100 * (1 - 10**-place):.4g} %" if place else "0 %"


def _ramp(target: str, figures: Sequence[Figure]) -> Line | None:
    """Layers that are mounted, over time; of several samples, the one of the middle."""
    halves = {f.step: sorted((c for c in f.courses if c), key=lambda c: c[-1]) for f in figures if f.target == target}
    up, down = (halves.get(step) or [] for step in ("up", "down"))
    if not up or not down:
        return None
    rise, fall = up[len(up) // 2], down[len(down) // 2]
    points = [(0.0, 0), *((at, number + 1) for number, at in enumerate(rise))]
    points += [(rise[-1] + at, len(rise) - number - 1) for number, at in enumerate(fall)]
    every = max(1, len(points) // 100)
    kept = [
        point for number, point in enumerate(points) if number % every == 0 or number in (len(rise), len(points) - 1)
    ]
    return Line(target, [Point(x, Interval(y, y, y)) for x, y in kept], marks=False)


def _limits(machine: Machine) -> tuple[list[Mark], str]:
    """Where memory ends, and where the kernel makes writers wait for the disk."""
    facts = machine.newest.facts
    memory, vm = facts.get("memory"), facts.get("vm")
    if not isinstance(memory, Mapping) or not isinstance(vm, Mapping):
        return [], ""
    total = min(filter(None, (_real(memory.get("limit")), _real(memory.get("total")))), default=0.0)
    available = min(filter(None, (_real(memory.get("available")), total)), default=0.0)
    dirty = _real(vm.get("dirty_bytes")) or available * _real(vm.get("dirty_ratio")) / 100
    early = _real(vm.get("dirty_background_bytes")) or available * _real(vm.get("dirty_background_ratio")) / 100
    known = [(early, "write-back begins"), (dirty, "dirty limit"), (total, "memory")]
    marks = [Mark(x, words) for x, words in known if x > 0]
    return (
        marks,
        f"Here {', '.join(f'{m.words} at {axes.size(m.x)}' for m in marks)}; drawn where it is near." if marks else "",
    )


def _change(course: history.Course) -> float:
    """How far it went, as a logarithm."""
    if not course.changes:
        return 0.0
    times = [figure.middle for figure in course.figures if figure.middle > 0]
    return math.log(max(times) / min(times)) if times else 0.0


def _real(value: object) -> float:
    """A number, also one in words as the kernel's files have them; 0 for anything else."""
    try:
        found = float(value) if isinstance(value, str | int | float) else 0.0
    except ValueError:
        return 0.0
    return found if math.isfinite(found) else 0.0


def _slug(words: str) -> str:
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in words.lower()).split())[:60]
