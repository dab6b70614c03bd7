"""The scoreboard of claims as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from layerfs.bench.report import page, svg
from layerfs.bench.report.claims import SIGNS, VERDICTS, Claim, counted

_WIDTH, _CLAIM, _FIGURES = 820.0, 168.0, 600.0  # the longest verdict fits into wide fonts, too
_FILLS = ("f3", "f5", "f2", "dim", "dim")  # green, orange, vermilion
_FILL = dict(zip(VERDICTS, _FILLS, strict=True))


def scoreboard(claims: Sequence[Claim]) -> Element:
    """A row for each claim: verdict, claim, their figure and ours."""
    parts = [svg.text(16, 28, "What others have claimed, tested", class_="title")]
    x = 16.0
    for verdict, count in counted(claims):
        words = f"{count} {SIGNS[verdict]} {verdict}"
        parts.append(svg.text(x, 50, words))
        x += svg.width_of(words) + 24
    y = 66.0
    for claim in claims:
        lines = svg.wrapped(svg.clean(claim.claim, 400), _FIGURES - _CLAIM - 16, 3)
        figures = [f"theirs: {claim.theirs}"] if claim.theirs else []
        figures += [f"ours: {page.ours_words(claim)}"] if claim.ours else []
        figures = [part for words in figures for part in svg.wrapped(words, _WIDTH - _FIGURES - 12, 2)]
        tall = max(len(lines), len(figures), 1) * 15 + 9
        parts.append(svg.line(16, y, _WIDTH - 16, y, "grid"))
        parts.append(
            svg.element("rect", x=16.0, y=y + 5, width=4.0, height=tall - 10, rx=2, class_=_FILL[claim.verdict])
        )
        parts.append(svg.text(28, y + 16, f"{SIGNS[claim.verdict]} {claim.verdict}", class_="strong"))
        parts += [svg.text(_CLAIM, y + 16 + 15 * number, words) for number, words in enumerate(lines)]
        parts += [svg.text(_FIGURES, y + 16 + 15 * n, words, class_="dim") for n, words in enumerate(figures)]
        y += tall
    return svg.picture(_WIDTH, y + 12, "Claims and verdicts", *parts)
