"""Working without root: a shell in a user namespace, where mounts last as long as the shell does."""

from __future__ import annotations

import os

import click

from layerfs.cli.common import DRIVER_VARIABLE, ROOT_VARIABLE, Command, settings
from layerfs.errors import EnvironmentUnfit, InvalidArgument


@click.command(
    cls=Command,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    examples=("unshare", "unshare -- sh -c 'layerfs mount work /mnt && ls /mnt'"),
)
@click.argument("command", nargs=-1, metavar="[--] [CMD…]")
def unshare(command: tuple[str, ...]) -> None:
    """Run a shell that can mount layers without root.

    Or the command CMD. It runs as root of a new user and mount namespace. What is mounted in it is seen only by it
    and what it starts, and goes when it ends; the store and its layers stay. For root, who can mount anyway, it just
    runs the command.
    """
    from layerfs.kernel import userns

    chosen = settings()
    # Inside, everybody looks like root: without this the default would be root's own store.
    environment = {**os.environ, ROOT_VARIABLE: str(chosen.place())}
    if chosen.driver:
        environment[DRIVER_VARIABLE] = chosen.driver
    arguments = command or (os.environ.get("SHELL") or "/bin/sh",)
    userns.enter()
    try:
        os.execvpe(arguments[0], arguments, environment)  # noqa: S606 - the user's own command, and no shell
    except OSError as error:
        raise InvalidArgument(f"running {arguments[0]!r}: {error.strerror}") from error


def require_lasting_mounts(key: str) -> None:
    """Raise `EnvironmentUnfit` where a mount would vanish with this very process."""
    if os.geteuid() != 0:
        raise EnvironmentUnfit(
            f"mounting {key!r}: without root a mount lasts only as long as the process that made it; "
            "run `layerfs unshare` first and mount in the shell that it starts"
        )
