"""What commands print: names made safe, tables, JSON, progress.

Results go to the standard output, progress to the standard error and only on a terminal. rich is imported only where
a terminal is there to show it, which keeps every script's call quick.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from layerfs.errors import InvalidArgument

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

# Lone surrogates stand for bytes that are no UTF-8 (PEP 383); control and bidirectional marks fool a terminal.
_UNSAFE = re.compile(r"[\\\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": r"\n", "\t": r"\t", "\r": r"\r", "\\": r"\\"}


def printable(text: str | bytes) -> str:
    r"""A name from outside on one line, safe on a terminal; ``printf %b`` undoes the escapes (``\n``, ``\x1b``)."""
    return _UNSAFE.sub(_escape, os.fsdecode(text))


def one_line(text: str) -> str:
    """An error's text on one line, safe on a terminal; backslashes are left alone."""
    return re.sub(_UNSAFE.pattern.replace(r"\\", "", 1), _escape, " ".join(text.splitlines()))


def print_json(value: Any) -> None:
    """One JSON document; names that are no UTF-8 come as lone surrogates, as Python's `os.fsdecode` gives them."""
    click.echo(json.dumps(value, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: with rich on a terminal, where long cells are folded; in aligned plain columns elsewhere."""
    safe = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(header, safe)
        return
    lines = [[title.upper() for title in header], *safe]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def size_text(size: int) -> str:
    """Bytes for people: ``1.5 GiB``."""
    from layerfs.sizes import format_size

    return format_size(size)


def ago(moment: datetime) -> str:
    """A time for people: ``3 minutes ago``."""
    import humanize

    return humanize.naturaltime(datetime.now(UTC) - moment)


def refuse_terminal(instead: str) -> None:
    """Raise `InvalidArgument` where a tar would go to a terminal; ``instead`` says what to do."""
    if sys.stdout.isatty():
        raise InvalidArgument(f"a tar is no use on a terminal; {instead}, or send the output to a program")


@contextmanager
def byte_progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on the standard error for ``total`` bytes; the callable takes the number of further bytes done."""
    if not sys.stderr.isatty():
        yield lambda _further: None
        return
    with _bar() as bar:
        task = bar.add_task(printable(what), total=total)
        yield lambda further: bar.advance(task, further)


@contextmanager
def image_progress() -> Iterator[Callable[[int, int, str], None]]:
    """The same for work whose total and present step are told with each call, from any thread."""
    with _told_progress(_bar) as progress:
        yield progress


@contextmanager
def step_progress() -> Iterator[Callable[[int, int, str], None]]:
    """The same, counting things and not bytes."""
    with _told_progress(_steps) as progress:
        yield progress


@contextmanager
def _told_progress(make: Callable[[], Progress]) -> Iterator[Callable[[int, int, str], None]]:
    if not sys.stderr.isatty():
        yield lambda _done, _total, _what: None
        return
    with make() as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=printable(what))


def _bar() -> Progress:
    from rich.progress import DownloadColumn, TransferSpeedColumn

    return _progress(DownloadColumn(binary_units=True), TransferSpeedColumn())


def _steps() -> Progress:
    from rich.progress import MofNCompleteColumn

    return _progress(MofNCompleteColumn())


def _progress(*columns: ProgressColumn) -> Progress:
    from rich import progress
    from rich.console import Console

    text = progress.TextColumn("{task.description}", markup=False)
    return progress.Progress(text, progress.BarColumn(), *columns, console=Console(stderr=True), transient=True)


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    if character in _SHORT:
        return _SHORT[character]
    return (
        "".join(f"\\x{byte:02x}" for byte in os.fsencode(character)) if _is_byte(character) else _codepoint(character)
    )


def _is_byte(character: str) -> bool:
    return ord(character) < 0x80 or 0xDC80 <= ord(character) <= 0xDCFF


def _codepoint(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))


def _print_rich(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
