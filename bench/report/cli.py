"""The command ``layerfs report``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from layerfs.bench import recorded
from layerfs.bench.cli import PIPE_WIDTH
from layerfs.bench.report import board, claims, data, page, panels, svg, tables
from layerfs.bench.report.data import Machine
from layerfs.bench.report.panels import Panel
from layerfs.errors import refused

_file = click.Path(path_type=Path)
_found = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("report")
@click.argument("runs", type=_found, nargs=-1, required=True)
@click.option("-o", "--output", type=_file, help="Write one HTML page there.")
@click.option("--markdown", type=_file, help="Write Markdown there.")
@click.option("--csv", "csv_file", type=_file, help="Write a row for each figure there.")
@click.option("--svg", "pictures", type=_file, metavar="DIR", help="Write each picture as a file of its own there.")
@click.option("--claims", "verdicts", type=_found, help="Verdicts of `layerfs claims`, if not among the RUNS.")
def report(
    runs: tuple[Path, ...],
    output: Path | None,
    markdown: Path | None,
    csv_file: Path | None,
    pictures: Path | None,
    verdicts: Path | None,
) -> None:
    """Show what run files hold: as tables here, or as a page with pictures.

    Runs of one machine are put together, of each figure the newest; runs of several machines are shown apart. What the
    runs do not hold is left out, and the report says what would measure it. A file of verdicts among the runs, the last
    if there are several, gives the scoreboard. As a file to write, "-" is the standard output.

    \b
    Examples:
      layerfs report run.json
      layerfs report results/*.json -o report.html
      layerfs report run.json --claims verdicts.json --svg pictures
      layerfs report run.json --csv - | grep overlay2
    """
    given = [(recorded.document(file), file) for file in runs]
    machines = data.grouped(data.parse(document, file.name) for document, file in given if not claims.is_one(document))
    boards = [(document, str(file)) for document, file in given if claims.is_one(document)]
    judged = claims.read(verdicts) if verdicts else claims.parse(*boards[-1]) if boards else []
    sections = [(machine, panels.all_panels(machine)) for machine in machines]
    if output:
        _write(output, page.render(sections, judged, {n: tables.html(m) for n, m in enumerate(machines)}))
    if markdown:
        _write(markdown, tables.markdown(sections, judged))
    if csv_file:
        _write(csv_file, tables.as_csv(machines))
    if pictures:
        _write_pictures(pictures, sections, judged)
    if not (output or markdown or csv_file or pictures):
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(tables.terminal(sections, judged))


def _write_pictures(
    folder: Path, sections: Sequence[tuple[Machine, Sequence[Panel]]], judged: Sequence[claims.Claim]
) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused(f"making the directory {str(folder)!r}", error) from error
    if judged:
        _write(folder / "claims.svg", svg.standalone(board.scoreboard(judged)))
    for number, (_machine, shown) in enumerate(sections, 1):
        prefix = f"machine-{number}-" if len(sections) > 1 else ""
        for panel in shown:
            for name, picture in panel.pictures.items():
                _write(folder / f"{prefix}{name}.svg", svg.standalone(picture))


def _write(file: Path, text: str) -> None:
    try:
        with click.open_file(str(file), "w", encoding="utf-8", errors="replace") as out:
            out.write(text)
    except OSError as error:
        raise refused(f"writing {str(file)!r}", error) from error
    if str(file) != "-":
        click.echo(f"Written: {file}", err=True)
