"""Running a container by hand."""

from __future__ import annotations

import click

from layerfs.cli.common import Command, open_store


@click.command(
    cls=Command,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    examples=("run --rm -it debian:12", "run --name work debian:12 sh -c 'echo hello > /greeting'"),
)
@click.option("--rm", "remove", is_flag=True, help="Remove the container's layer when it has ended.")
@click.option("--interactive", "-i", is_flag=True, help="Pass the standard input on.")
@click.option("--terminal", "-t", is_flag=True, help="Give the container this terminal.")
@click.option("--name", default="", metavar="KEY", help="The key of the container's layer [default: run-…].")
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND…]")
def run(image: str, command: tuple[str, ...], name: str, remove: bool, interactive: bool, terminal: bool) -> int:
    """Run a command in a container, with runc.

    COMMAND is by default what the image says. Ends with the command's exit code; 127 is no such command, 126 one that
    cannot be run, 128 and a number a signal. What the container changed stays in its layer, which can be committed; it
    has no network. Takes root.
    """
    from layerfs import engine

    with open_store() as store:
        return engine.run(store, image, command, name=name, remove=remove, interactive=interactive, terminal=terminal)
