"""SVG and HTML as element trees, so that no text from a run file can ever act as markup; colours and styles."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from xml.etree.ElementTree import Element

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; the second is for dark pages.
_COLOURS = {
    "native": ("#555555", "#b8b8b8"),
    "overlay2": ("#0072b2", "#3d9fdf"),
    "aufs": ("#d55e00", "#f0702a"),
    "btrfs": ("#009e73", "#1fb98d"),
    "zfs": ("#cc79a7", "#dc8fba"),
    "devicemapper": ("#e69f00", "#f0b429"),
    "vfs": ("#56b4e9", "#8fd3ff"),
}
_OTHER = ("#8a7f00", "#f0e442")
"""Of drivers from other packages."""
_DRIVERS = list(_COLOURS)
_MARKERS = ("circle", "circle", "square", "triangle", "diamond", "down", "cross")

FONT = 12
"""Units of the pictures' text; they are 400 wide, so that a phone shows them at full size."""

_LIGHT = "--fg:#1b1f24;--dim:#5c6570;--bg:#ffffff;--card:#ffffff;--line:#d8dee4;--page:#f5f7f9"
_DARK = "--fg:#e6edf3;--dim:#9aa5b1;--bg:#12171e;--card:#161c24;--line:#2d3640;--page:#0d1117"


def _palette(place: int) -> str:
    pairs = [*_COLOURS.values(), _OTHER]
    return "".join(f";--d{number}:{pair[place]}" for number, pair in enumerate(pairs))


_BRIGHT = f"{_LIGHT}{_palette(0)};--worse:#d55e00;--better:#0072b2"
_DIM = f"{_DARK}{_palette(1)};--worse:#f0702a;--better:#3d9fdf"
_DARK_MODE = "@media (prefers-color-scheme:dark)"
VARIABLES = f":root{{color-scheme:light dark;{_BRIGHT}}}{_DARK_MODE}{{:root{{{_DIM}}}}}"
PICTURE = (
    "svg.picture{font:12px system-ui,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif;"
    "font-variant-numeric:tabular-nums}"
    ".picture text{fill:var(--fg)}.picture .dim{fill:var(--dim)}.picture .small{font-size:11px}"
    ".picture .title{font-size:14px;font-weight:600}.picture .strong{font-weight:600}"
    ".picture .grid{stroke:var(--line);stroke-width:1;fill:none}.picture .axis{stroke:var(--dim);stroke-width:1}"
    ".picture .limit{stroke:var(--dim);stroke-dasharray:2 3}"
    ".picture .line{fill:none;stroke-width:2;stroke-linejoin:round}"
    ".picture .variant{stroke-dasharray:7 3}"
    ".picture .theirs{fill:none;stroke-width:1.25;stroke-dasharray:4 3;opacity:.75}"
    ".picture .ribbon{stroke:none;fill-opacity:.16}.picture .whisker{stroke-width:1.5;fill:none}"
    ".picture .worse{fill:var(--worse)}.picture .better{fill:var(--better)}.picture .card{fill:var(--card)}"
    ".picture .ground{fill:var(--bg)}"
    ".picture .change{stroke:var(--worse);stroke-width:1.5;stroke-dasharray:5 3}"
    + "".join(
        f".picture .d{n}{{stroke:var(--d{n})}}.picture .f{n}{{fill:var(--d{n})}}" for n in range(len(_DRIVERS) + 1)
    )
)


def clean(text: str, most: int = 200) -> str:
    """Without what XML has no form for (control characters, lone surrogates), and not endlessly long."""
    text = re.sub("[^\t\n\r\x20-\x7e\xa0-\u200d\u2010-\u2027\u2030-\u2065\u2070-\ud7ff\ue000-\ufffd]", "?", text)
    return text if len(text) <= most else text[: most - 1] + "…"


def element(tag: str, *children: Element | str | None, **attributes: object) -> Element:
    """An element; ``class_`` and ``stroke_width`` stand for ``class`` and ``stroke-width``."""
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    made = Element(tag, {name: _value(value) for name, value in names.items()})
    last: Element | None = None
    for child in children:
        if isinstance(child, str):
            text = clean(child, 20_000)
            if last is None:
                made.text = (made.text or "") + text
            else:
                last.tail = (last.tail or "") + text
        elif child is not None:
            made.append(child)
            last = child
    return made


def _value(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else clean(str(value), 20_000)


def picture(width: float, height: float, title: str, *children: Element) -> Element:
    """A whole picture, of ``width`` by ``height`` units, without a size of its own."""
    made = element("svg", element("title", title), *children, class_="picture", role="img")
    made.attrib |= {"viewBox": f"0 0 {width:g} {height:g}", "aria-label": clean(title)}
    return made


def standalone(picture: Element) -> str:
    """The picture as a file: with its styles, a size, and a ground to stand on.

    Its colours stand in the rules themselves, because programs other than browsers know no variables.
    """
    width, height = picture.attrib["viewBox"].split()[2:]
    head = {"xmlns": "http://www.w3.org/2000/svg", "width": width, "height": height}
    made = Element("svg", {**head, **picture.attrib})
    made.append(element("style", f"{_coloured(_BRIGHT)}{_DARK_MODE}{{{_coloured(_DIM)}}}"))
    made.append(element("rect", width=width, height=height, rx=8, class_="ground"))
    made.extend(list(picture))
    return ElementTree.tostring(made, encoding="unicode") + "\n"


def _coloured(colours: str) -> str:
    """The pictures' rules with these values in the places of the variables."""
    values = dict(pair.split(":") for pair in colours.split(";"))
    return re.sub(r"var\((.+?)\)", lambda found: values[found[1]], PICTURE)


def text(x: float, y: float, words: str, *, anchor: str | None = None, class_: str | None = None) -> Element:
    return element("text", words, x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Element:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str, *, closed: bool = False) -> Element:
    steps = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("path", d=f"M{steps}{'Z' if closed else ''}", class_=class_)


def width_of(words: str, size: float = FONT) -> float:
    """About how wide text comes out."""
    return len(words) * size * 0.56


def wrapped(words: str, width: float, most: int = 3) -> list[str]:
    """In lines no wider than ``width``, the last one cut where there are more than ``most``."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if width_of(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    letters = max(4, int(width / FONT / 0.56))
    lines = [line if len(line) <= letters + 2 else line[: letters - 1] + "…" for line in lines]
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][: letters - 1] + "…"]


def colour(target: str) -> int:
    """The number of a target's colour: classes ``d``… draw with it, ``f``… fill with it."""
    driver = _driver(target)
    return _DRIVERS.index(driver) if driver in _COLOURS else len(_DRIVERS)


_ARM = ((1.2, 0.4), (0.4, 0.4), (0.4, 1.2))
_QUARTERS = ((1, 1, _ARM), (-1, 1, _ARM[::-1]), (-1, -1, _ARM), (1, -1, _ARM[::-1]))
"""A cross, one arm's corner mirrored."""


def is_hollow(target: str) -> bool:
    """The control, and a driver with options or a backing of its own: they share their colour with another target."""
    return _driver(target) != target or target == "native"


def _driver(target: str) -> str:
    """The first word of a target's name."""
    return target.partition(" ")[0]


def marker(target: str, x: float, y: float, words: str, size: float = 4) -> Element:
    """A target's mark, of a shape of its own so that colour is not all that tells it; ``words`` show on pointing."""
    number = colour(target)
    shape = (*_MARKERS, "diamond")[number]
    fill = "card" if is_hollow(target) else f"f{number}"
    about = element("title", words) if words else None
    r = size
    if shape == "circle":
        return element("circle", about, cx=x, cy=y, r=r, class_=f"{fill} d{number}", stroke_width=1.5)
    points = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.2), (1.15, 0.9), (-1.15, 0.9)],
        "down": [(0, 1.2), (1.15, -0.9), (-1.15, -0.9)],
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        "cross": [(a * x, b * y) for a, b, xs in _QUARTERS for x, y in xs],
    }[shape]
    made = path([(x + a * r, y + b * r) for a, b in points], f"{fill} d{number}", closed=True)
    if about is not None:
        made.append(about)
    return made
