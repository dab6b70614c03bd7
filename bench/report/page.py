"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any
from xml.etree.ElementTree import Element

from layerfs.bench.report import axes, svg
from layerfs.bench.report.claims import SIGNS, VERDICTS, Claim, counted
from layerfs.bench.report.data import Machine, RunFile
from layerfs.bench.report.panels import Panel
from layerfs.bench.report.svg import clean, element


def render(
    sections: Sequence[tuple[Machine, Sequence[Panel]]], claims: Sequence[Claim], table: Mapping[int, Element]
) -> str:
    """The whole page.

    Args:
        sections: each machine with its panels.
        table: the figures as a table, by the number of the section.
    """
    runs = [run for machine, _ in sections for run in machine.runs]
    body = [element("h1", "Container layers: what each storage driver costs"), _lead(runs)]
    if claims:
        body += scoreboard(claims)
    for number, (machine, panels) in enumerate(sections):
        if len(sections) > 1:
            body.append(element("h2", f"Machine {number + 1}: {_short(machine)}"))
        body += _section(machine, panels)
        if number in table:
            body.append(
                element(
                    "details",
                    element("summary", "All figures"),
                    element("div", table[number], class_="scroll"),
                )
            )
    body.append(
        element("footer", "Made by layerfs report from raw samples; nothing on this page comes from elsewhere.")
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", "layerfs: storage drivers for container layers, measured"),
        element(
            "style",
            svg.VARIABLES + svg.PICTURE + resources.files("layerfs.bench.report").joinpath("page.css").read_text(),
        ),
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head.insert(1, Element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}))
    page = element("html", head, element("body", element("main", *body)), lang="en")
    return "<!DOCTYPE html>\n" + ElementTree.tostring(page, encoding="unicode", method="html") + "\n"


def scoreboard(claims: Sequence[Claim]) -> list[Element]:
    """Each claim with its verdict, and both sides' figures."""
    tally = [
        element("span", element("b", str(count)), f" {SIGNS[verdict]} {verdict}") for verdict, count in counted(claims)
    ]
    rows = []
    for claim in claims:
        figures = [element("div", f"theirs: {clean(claim.theirs)}")] if claim.theirs else []
        figures += [element("div", f"ours: {ours_words(claim)}")] if claim.ours else []
        rows.append(
            element(
                "li",
                element("div", f"{SIGNS[claim.verdict]} {claim.verdict}", class_="say"),
                element(
                    "div",
                    clean(claim.claim, 600),
                    element("small", clean(claim.reason, 900)),
                    element("small", " · ".join(part for part in (claim.identity, clean(claim.source, 200)) if part)),
                ),
                element("div", *figures, class_="figure"),
                class_=f"v{VERDICTS.index(claim.verdict)}",
            )
        )
    return [
        element("h2", "What others have claimed, tested"),
        element("p", *tally, class_="tally"),
        element("ul", *rows, class_="claims"),
    ]


def ours_words(claim: Claim) -> str:
    """``1.20× (1.10× to 1.31×)``."""
    ours = claim.ours
    return f"{axes.times(ours.middle)} ({axes.times(ours.low)} to {axes.times(ours.high)})" if ours else ""


def facts(machine: Machine) -> list[tuple[str, str]]:
    """What the figures stand on, for people."""
    run = machine.newest
    found: list[tuple[str, object]] = [
        ("processor", f"{_get(run, 'cpus')} × {_get(run, 'processor')}"),
        ("memory", _memory(run)),
        ("kernel", _get(run, "kernel")),
        ("guest", _get(run, "guest", "kind") or "none: measured on the host"),
        ("scratch stores on", _words(run.facts.get("storage"), "filesystem", "model", "disk", "scheduler")),
        ("layerfs", _words(run.facts.get("versions"), "layerfs", "fio")),
    ]
    targets = run.facts.get("targets")
    for name, about in targets.items() if isinstance(targets, Mapping) else ():
        options = about.get("options") if isinstance(about, Mapping) else None
        backing = _words(about.get("backing"), "filesystem", "model", "disk") if isinstance(about, Mapping) else ""
        found.append((f"{name} stands on", f"{backing}{f' with {options}' if options else ''}"))
    return [(clean(name, 60), clean(str(value), 160)) for name, value in found if value]


def _section(machine: Machine, panels: Sequence[Panel]) -> list[Element]:
    about = [element("div", element("dt", name), element("dd", value)) for name, value in facts(machine)]
    body = [
        element("p", _machine_line(machine), class_="dim"),
        element("details", element("summary", "The machine"), element("dl", *about, class_="facts")),
    ]
    warnings = list(dict.fromkeys(f"{clean(w, 400)}" for run in machine.runs for w in run.warnings))
    if warnings:
        body += [element("p", "Doubts that the runs have about themselves:")]
        body += [element("ul", *(element("li", warning) for warning in warnings[:12]), class_="notes")]
    for panel in panels:
        if panel.pictures:
            body.append(element("h2", panel.title, id=f"{panel.name}"))
            body.append(element("p", panel.note, class_="dim"))
            cards = [
                element("figure", picture, class_="card wide" if name == "heat" else "card")
                for name, picture in panel.pictures.items()
            ]
            body.append(element("div", *cards, class_="cards"))
    missing = [panel for panel in panels if panel.wanted]
    if missing:
        body.append(element("h2", "What these runs do not hold"))
        body.append(
            element(
                "ul",
                *(element("li", f"{panel.title}: ", element("code", panel.wanted)) for panel in missing),
                class_="notes",
            )
        )
    return body


def _lead(runs: Sequence[RunFile]) -> Element:
    figures = sum(len(figure.seconds) for run in runs for figure in run.figures)
    first, last = min(run.started for run in runs), max(run.started for run in runs)
    span = f"{first:%Y-%m-%d}" if first.date() == last.date() else f"{first:%Y-%m-%d} to {last:%Y-%m-%d}"
    names = ", ".join(clean(run.name, 60) for run in runs[:6]) + (" …" if len(runs) > 6 else "")
    return element(
        "p",
        f"{figures:,} samples of {span} ({names}). Figures are medians with 95 % bootstrap intervals; every sample was "
        "taken on a layer fresh for it, drivers in turns and in random order.",
        class_="dim",
    )


def _machine_line(machine: Machine) -> str:
    known = dict(facts(machine))
    words = [known.get(name, "") for name in ("processor", "memory", "kernel", "scratch stores on")]
    guest = known.get("guest", "")
    return "Measured on " + "; ".join(
        [word for word in words if word] + ([f"guest {guest}"] if "none" not in guest else [])
    )


def _short(machine: Machine) -> str:
    run = machine.newest
    guest = _get(run, "guest", "kind")
    return clean(f"{'guest ' + guest + ', ' if guest else ''}{_get(run, 'kernel')}"[:80])


def _get(run: RunFile, *names: str) -> str:
    value: Any = run.facts
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return "" if value is None else str(value)


def _memory(run: RunFile) -> str:
    memory = run.facts.get("memory")
    if not isinstance(memory, Mapping):
        return ""
    sizes = {name: axes.size(v) for name, v in memory.items() if isinstance(v, int | float) and 0 < v < 1 << 60}
    words = f"{sizes.get('total', '?')}iB"
    return words + (f", limited to {sizes['limit']}iB" if "limit" in sizes else "")


def _words(facts: object, *names: str) -> str:
    if not isinstance(facts, Mapping):
        return ""
    return ", ".join(str(facts[name]) for name in names if facts.get(name))
