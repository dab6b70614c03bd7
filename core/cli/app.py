"""The program itself: its commands by topic, what its exit codes mean, and how it ends."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click

from layerfs import signals
from layerfs.cli import images, layers, namespace, run, serve, shell, store
from layerfs.cli.common import Settings, store_options
from layerfs.cli.output import one_line
from layerfs.errors import told

EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 70, 130, 141  # sysexits.h; 128 + the signal's number

_TOPICS: dict[str, tuple[click.Command, ...]] = {
    "Store": (store.drivers, store.init, store.check, store.gc, store.grow, store.migrate),
    "Images": (images.import_image, images.export, images.images),
    "Layers": (
        layers.prepare,
        layers.view,
        layers.commit,
        layers.remove,
        layers.list_layers,
        layers.inspect,
        layers.usage,
    ),
    "Files": (layers.mount, layers.unmount, layers.changes, layers.diff, layers.apply, namespace.unshare),
    "Engines": (run.run, serve.serve),
}

# Imported only when they are called, because what they need is slow to import; with their lines for the help.
_BENCHMARK = {
    "bench": ("layerfs.bench.cli:bench", "Measure drivers on this machine and compare them."),
    "report": ("layerfs.bench.report.cli:report", "Show its runs, with pictures."),
    "claims": ("layerfs.bench.claims.cli:claims", "Test what others have claimed of drivers."),
    "advise": ("layerfs.bench.advise.cli:advise", "Say which driver suits a work, by what was measured."),
    "compare": ("layerfs.bench.gate:compare_command", "Compare two runs."),
    "gate": ("layerfs.bench.gate:gate", "Fail where a new version is slower or does more."),
    "history": ("layerfs.bench.history:history_command", "Show how the figures went over many runs."),
}
_OTHER = {"guest": ("layerfs.cli.guest:guest", "Run a command in a guest kernel.")}
_LATE = {**_BENCHMARK, **_OTHER}

_EXIT_CODES = """\b
Exit codes:
    0  done
    1  failed in a way that has no code of its own
    2  the command line or a value in it is wrong
    3  this host lacks something; the message names it
    4  no such layer, image or store
    5  the name is taken
    6  the layer's state forbids it (children, in use, not active)
    7  layer data from outside is malformed or hostile
    8  data in the store is damaged
    9  no space left
   10  the kernel refused a call
   70  a fault in layerfs itself; LAYERFS_DEBUG=1 shows where
  124  the time given to a guest was over; else "layerfs guest" and "layerfs run" end as their command did
  130  interrupted (Ctrl-C, SIGTERM, SIGHUP), and cleaned up
"""


class _Interrupted(Exception):
    """Ctrl-C, or another signal to end."""


class Program(click.Group):
    """Shows its commands by topic, and imports the late ones only when they are called."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            raise click.exceptions.Exit(_end_quietly()) from None
        except KeyboardInterrupt:
            _deafen()  # a command with handlers of its own (bench) has put ours back
            raise _Interrupted from None  # click would put an empty line on the standard error
        return result

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *_LATE]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _LATE:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = _LATE[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        _complete_options(ctx, command, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        benchmark, other = ([(name, text) for name, (_, text) in late.items()] for late in (_BENCHMARK, _OTHER))
        topics = {title: [(str(c.name), c.get_short_help_str(64)) for c in group] for title, group in _TOPICS.items()}
        shells = [(str(shell.completion.name), shell.completion.get_short_help_str(64))]
        for title, rows in {**topics, "Benchmark": benchmark, "Other": [*other, *shells]}.items():
            with formatter.section(title):
                formatter.write_dl(rows, col_max=12)


def _complete_options(context: click.Context, command: click.Command, name: str) -> None:
    """Give a late command the shared options that it does not have, and the values from before its name."""
    has = {option for parameter in command.params for option in parameter.opts}
    command.params += [option for option in store_options() if not has.intersection(option.opts)]
    before = context.find_object(Settings)
    if before is not None and before.driver is not None:
        wanted = [p for p in command.params if "--driver" in p.opts and p.expose_value]
        values = {str(p.name): [before.driver] if p.multiple else before.driver for p in wanted}
        context.default_map = {**(context.default_map or {}), name: values}


def _version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from importlib import metadata

        try:
            version = metadata.version("layerfs")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        click.echo(f"layerfs {version}")
        context.exit()


@click.group(
    cls=Program,
    epilog=_EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=store_options(environment=True),
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def cli() -> None:
    """Keep container layers on interchangeable storage drivers.

    \b
    A store is one directory with one driver. The way of a layer:
      import (an image)   its layers are committed: finished, read-only
      prepare             a writable layer on top of one of them
      mount               its files, to be changed with any program
      commit              finish it; it may have children then
      export              as an image for skopeo, podman, docker

    --root and --driver may stand before or after the command's name. Without root, layerfs works in a user namespace
    of its own; "layerfs unshare" is a shell in it.
    """


for _commands in _TOPICS.values():
    for _command in _commands:
        cli.add_command(_command)
cli.add_command(shell.completion)


def main(command: click.Command | None = None) -> int:
    """Run the command line of this process and return its exit code. Errors are one line on the standard error.

    Args:
        command: instead of the program's own (a module that is run with ``python -m``).

    The process is to end then: it ignores signals to end from there on.
    """
    _replace_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # as much of a table as the locale can show
    with _termination_as_interrupt():
        try:
            code = (command or cli).main(prog_name=None if command else "layerfs", standalone_mode=False)
        except click.exceptions.Exit as end:
            return end.exit_code
        except click.ClickException as error:
            return _complain(_usage(error), error.exit_code)
        except (_Interrupted, click.Abort, KeyboardInterrupt):
            _end_interrupted()
        except Exception as error:
            if signals.is_interruption(error):
                _end_interrupted()
            if (known := told(error)) is not None:
                return _complain(str(known), known.exit_code)
            text = f"{type(error).__name__}: {error} (a fault in layerfs; LAYERFS_DEBUG=1 shows where)"
            return _complain(text, EXIT_INTERNAL)
    return code if isinstance(code, int) else 0


def _replace_closed_streams() -> None:
    """Let no file that is opened later take the number of a standard stream that is closed (``>&-``).

    A closed output acts like a pipe whose reader has gone, so that what cannot be said is no success.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(null, True)
    os.close(null)
    if sys.stdout is None:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _end_interrupted() -> NoReturn:
    """End the process here: CPython would end it by SIGINT after all, had the interruption hit it inside an exec().

    Dataclasses are made by one, so it takes no more than Ctrl-C while a module is imported (run_eval_code_obj in
    Python/pythonrun.c notes such an exception as unhandled, whoever catches it later).
    """
    with contextlib.suppress(OSError):  # a terminal that has gone
        _complain("interrupted", EXIT_INTERRUPTED)
        sys.stdout.flush()
    os._exit(EXIT_INTERRUPTED)


def _usage(error: click.ClickException) -> str:
    """The message, and where the help is."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f"; try {context.command_path!r} --help" if context else ""
    return error.format_message().rstrip(".") + hint


def _complain(text: str, code: int) -> int:
    if os.environ.get("LAYERFS_DEBUG"):
        import traceback

        traceback.print_exc()
    click.echo(f"layerfs: {one_line(text)}", err=True)
    return code


def _end_quietly() -> int:
    """The reader has gone (``| head``): nothing more can be said, not even by the interpreter's last flush."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_BROKEN_PIPE


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Signals to end act like Ctrl-C, once: then cleaning up is not cut short, nor the exit code of the process."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        _deafen()
        raise KeyboardInterrupt

    for number in signals.ending():
        signal.signal(number, interrupt)
    try:
        with signals.not_lost(interrupt):
            yield
    finally:
        _deafen()


def _deafen() -> None:
    for number in signals.ending():
        signal.signal(number, signal.SIG_IGN)
