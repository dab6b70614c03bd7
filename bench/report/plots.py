"""The kinds of pictures: lines with intervals, dots in rows, a map of ratios, a ramp of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from xml.etree.ElementTree import Element

from layerfs.bench.report import axes, svg
from layerfs.bench.report.axes import Format, Scale
from layerfs.bench.statistics import Interval

WIDTH = 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 12.0, 22.0, 34.0
_LEGEND_LINE, _ROW, _ASIDE = 17.0, 18.0, 3.0


class Point(NamedTuple):
    x: float
    y: Interval


@dataclass(frozen=True)
class Line:
    """One course.

    Attributes:
        target: whose colour it has.
        theirs: from elsewhere: drawn thin and dashed, without intervals and marks.
        steps: level until the next point.
    """

    target: str
    points: Sequence[Point]
    theirs: bool = False
    steps: bool = False
    marks: bool = True


@dataclass(frozen=True)
class Axis:
    """What an axis shows, with its unit, as ``title`` says it."""

    title: str
    format: Format
    log: bool = False
    base: int = 10
    most: int = 6
    values: Sequence[float] = ()
    """To be seen in any case."""
    ticks: Sequence[float] = ()
    """Instead of those that the scale would choose."""


@dataclass(frozen=True)
class Mark:
    """A vertical line with a word beside it."""

    x: float
    words: str
    change: bool = False


def lines(title: str, x: Axis, y: Axis, courses: Sequence[Line], marks: Sequence[Mark] = ()) -> Element:
    """Courses over a common axis; the axes' titles stand at their ends, where a phone has room for them."""
    targets = list(dict.fromkeys(course.target for course in courses))
    legend, legend_height = _legend(targets, 36, theirs=any(course.theirs for course in courses))
    top = 36 + legend_height + _TOP
    height = top + 190 + _BOTTOM
    xs = axes.scale(
        [p.x for c in courses for p in c.points] + [*x.values], _LEFT, WIDTH - _RIGHT, x.format, log=x.log, base=x.base
    )
    bounds = [
        bound for c in courses for p in c.points for bound in ((p.y.middle,) if c.theirs else (p.y.low, p.y.high))
    ]
    ys = axes.scale([*bounds, *y.values], height - _BOTTOM, top, y.format, log=y.log, base=y.base)
    parts = [svg.text(14, 24, title, class_="title"), *legend, svg.text(14, top - 9, y.title, class_="dim small")]
    parts += _grid(xs, ys, x, y)
    for mark in marks:
        place = xs.place(mark.x)
        parts.append(svg.line(place, top, place, height - _BOTTOM, "change" if mark.change else "limit"))
        near_end = place + svg.width_of(mark.words, 11) > WIDTH - 4
        parts.append(
            svg.text(
                place + (-4 if near_end else 4),
                top + 10 + 12 * (list(marks).index(mark) % 3),
                mark.words,
                anchor="end" if near_end else None,
                class_="dim small",
            )
        )
    ours = [course for course in courses if not course.theirs]
    for course in [*(course for course in courses if course.theirs), *ours]:
        aside = (ours.index(course) - (len(ours) - 1) / 2) * _ASIDE if course.marks and course in ours else 0.0
        parts += _course(course, xs, ys, aside, x.format, y.format)
    return svg.picture(WIDTH, height, title, *parts)


def _grid(xs: Scale, ys: Scale, x: Axis, y: Axis) -> list[Element]:
    parts = []
    for value in y.ticks or ys.ticks(y.most):
        place = ys.place(value)
        parts.append(svg.line(_LEFT, place, WIDTH - _RIGHT, place, "grid"))
        parts.append(svg.text(_LEFT - 6, place + 4, y.format(value), anchor="end", class_="small"))
    bottom = max(ys.start, ys.end)
    parts.append(svg.line(_LEFT, bottom, WIDTH - _RIGHT, bottom, "axis"))
    for value in x.ticks or xs.ticks(x.most):
        place = xs.place(value)
        parts.append(svg.line(place, bottom, place, bottom + 4, "axis"))
        parts.append(svg.text(place, bottom + 16, x.format(value), anchor="middle", class_="small"))
    parts.append(svg.text(WIDTH - _RIGHT, bottom + 30, x.title, anchor="end", class_="dim small"))
    return parts


def _course(course: Line, xs: Scale, ys: Scale, aside: float, x: Format, y: Format) -> list[Element]:
    """``aside``: moved so far to the right, so that equal values do not hide each other."""
    number = svg.colour(course.target)
    points = sorted(course.points, key=lambda point: point.x)
    across = [xs.place(p.x) + aside for p in points]
    places = [(at, ys.place(p.y.middle)) for at, p in zip(across, points, strict=True)]
    if course.steps:
        places = [at for a, b in zip(places, [*places[1:], places[-1]], strict=True) for at in (a, (b[0], a[1]))]
    if course.theirs:
        return [svg.path(places, f"theirs d{number}")]
    parts = []
    if len(points) > 1:
        upper = [(at, ys.place(p.y.high)) for at, p in zip(across, points, strict=True)]
        lower = [(at, ys.place(p.y.low)) for at, p in zip(across, points, strict=True)]
        if upper != lower:
            parts.append(svg.path([*upper, *reversed(lower)], f"ribbon f{number}", closed=True))
        variant = " variant" if svg.is_hollow(course.target) else ""
        parts.append(svg.path(places, f"line d{number}{variant}"))
    if course.marks:
        for at, p in zip(across, points, strict=True):
            parts.append(svg.line(at, ys.place(p.y.low), at, ys.place(p.y.high), f"whisker d{number}"))
            words = f"{course.target}, {x(p.x)}: {y(p.y.middle)} ({y(p.y.low)} to {y(p.y.high)})"
            parts.append(svg.marker(course.target, at, ys.place(p.y.middle), words, 3.5))
    return parts


def _legend(targets: Sequence[str], top: float, *, theirs: bool = False) -> tuple[list[Element], float]:
    x, y, parts = 18.0, top + 8, []
    entries = [*targets, *(["the article's, dashed"] if theirs else [])]
    for entry in entries:
        name = svg.clean(entry, 40)
        width = svg.width_of(name) + 22
        if x + width > WIDTH and x > 18:
            x, y = 18.0, y + _LEGEND_LINE
        if entry in targets:
            parts.append(svg.marker(entry, x, y, "", 4))
        else:
            parts.append(svg.line(x - 5, y, x + 5, y, "theirs d0"))
        parts.append(svg.text(x + 9, y + 4, name))
        x += width
    return parts, y + 10 - top


@dataclass(frozen=True)
class Row:
    """One dot.

    Attributes:
        group: the heading that it stands below; rows of one heading follow each other.
        name: what stands before it; "" for the target's own.
    """

    group: str
    target: str
    value: Interval
    name: str = ""


def dots(title: str, x: Axis, rows: Sequence[Row], marks: Sequence[Mark] = ()) -> Element:
    """A row for each figure, with its interval and its value in words."""
    left, right = max([70.0, *(svg.width_of(_called(row)) + 22 for row in rows)]), 66.0
    groups = list(dict.fromkeys(row.group for row in rows))
    headed = any(groups)
    top = 40.0
    height = top + len(rows) * _ROW + (len(groups) * 24 if headed else 6) + 40
    bottom = height - 36
    values = [bound for row in rows for bound in (row.value.low, row.value.middle, row.value.high)]
    xs = axes.scale([*values, *x.values], left, WIDTH - right, x.format, log=x.log, base=x.base)
    parts = [svg.text(14, 24, title, class_="title")]
    end = 0.0
    for value in x.ticks or xs.ticks(min(x.most, 4)):
        place, words = xs.place(value), x.format(value)
        parts.append(svg.line(place, top, place, bottom, "grid"))
        half = svg.width_of(words, 11) / 2
        if place - half > end:  # where the grid is narrow, some lines have no words
            parts.append(svg.text(place, bottom + 14, words, anchor="middle", class_="small"))
            end = place + half + 6
    for mark in marks:
        place = xs.place(mark.x)
        parts += [svg.line(place, top, place, bottom, "limit")]
        parts += [svg.text(place + 4, top + 6, mark.words, class_="dim small")]
    parts.append(svg.text(WIDTH - 8, bottom + 30, x.title, anchor="end", class_="dim small"))
    y = top
    for group in groups:
        if headed:
            y += 20
            parts.append(svg.text(14, y - 2, group, class_="strong small"))
            y += 4
        for row in (row for row in rows if row.group == group):
            parts += _row(row, xs, y + _ROW / 2, x.format)
            y += _ROW
    return svg.picture(WIDTH, height, title, *parts)


def _called(row: Row) -> str:
    return svg.clean(row.name or row.target, 24)


def _row(row: Row, xs: Scale, y: float, form: Format) -> list[Element]:
    number = svg.colour(row.target)
    middle = xs.place(row.value.middle)
    words = f"{row.target}: {form(row.value.middle)} ({form(row.value.low)} to {form(row.value.high)})"
    stem = svg.line(xs.start, y, middle, y, f"d{number}")
    stem.attrib["stroke-opacity"] = "0.35"
    return [
        svg.text(xs.start - 8, y + 4, _called(row), anchor="end"),
        stem,
        svg.line(xs.place(row.value.low), y, xs.place(row.value.high), y, f"whisker d{number}"),
        svg.marker(row.target, middle, y, words),
        svg.text(WIDTH - 8, y + 4, form(row.value.middle), anchor="end", class_="small"),
    ]


class Cell(NamedTuple):
    """A ratio, above 1 for worse; None for no figure."""

    ratio: Interval | None


@dataclass(frozen=True)
class Band:
    """Rows of a map below one heading."""

    heading: str
    rows: Sequence[tuple[str, Sequence[Cell]]] = field(default_factory=tuple)


def heat(title: str, columns: Sequence[str], bands: Sequence[Band]) -> Element:
    """Ratios as numbers on colours: blue for less time, orange for more; a tilde where they may as well be 1."""
    label = min(190.0, 18 + max(svg.width_of(name, 11) for band in bands for name, _ in band.rows))
    widest = max((svg.width_of(word, 11) for column in columns for word in column.split()), default=0.0)
    cell = max(46.0, widest + 6, (WIDTH - label - 8) / max(1, len(columns)))
    width = label + cell * len(columns) + 8
    y = 44.0
    parts = [svg.text(14, 24, title, class_="title")]
    heads = [(column.partition(" ")[0], svg.wrapped(column.partition(" ")[2], cell, 2)) for column in columns]
    for place, (driver, options) in enumerate(heads):
        x = label + cell * place + cell / 2
        parts.append(svg.marker(columns[place], x, y - 2, columns[place]))
        name = svg.clean(driver, max(4, int(cell / 5.8)))
        parts.append(svg.text(x, y + 14, name, anchor="middle", class_="strong small"))
        for number, words in enumerate(options):
            parts.append(svg.text(x, y + 27 + 12 * number, words, anchor="middle", class_="dim small"))
    y += 18 + 12 * max(len(options) if options != [""] else 0 for _, options in heads)
    for band in bands:
        y += 20
        parts.append(svg.text(14, y, band.heading, class_="dim small"))
        y += 6
        for name, cells in band.rows:
            lines_ = svg.wrapped(name, (label - 18) * 1.08, 2)
            tall = 15.0 + 13 * (len(lines_) - 1) + 6
            for number, words in enumerate(lines_):
                parts.append(svg.text(label - 6, y + 14 + 13 * number, words, anchor="end", class_="small"))
            for place, one in enumerate(cells):
                parts += _cell(one, label + cell * place, y, cell - 2, tall - 2, f"{columns[place]}, {name}")
            y += tall
    return svg.picture(width, y + 12, title, *parts)


def _cell(cell: Cell, x: float, y: float, width: float, height: float, name: str) -> list[Element]:
    middle = x + width / 2
    if cell.ratio is None:
        return [svg.text(middle, y + height / 2 + 4, "–", anchor="middle", class_="dim")]
    ratio = cell.ratio
    reference = ratio.low == ratio.high == 1
    same = not ratio.tells
    strength = 0.0 if same or ratio.middle <= 0 else min(0.8, 0.1 + abs(math.log2(ratio.middle)) / 5)
    words = f"{name}: {axes.times(ratio.middle)} ({axes.times(ratio.low)} to {axes.times(ratio.high)})"
    ground = svg.element("rect", svg.element("title", words), x=x, y=y, width=width, height=height, rx=3)
    ground.attrib |= {"class": "worse" if ratio.middle > 1 else "better", "fill-opacity": f"{strength:.2f}"}
    text = "1×" if reference else ("~" if same else "") + axes.times(ratio.middle)
    return [
        ground,
        svg.text(middle, y + height / 2 + 4, text, anchor="middle", class_="dim small" if same else "small"),
    ]
