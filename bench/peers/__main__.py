"""``python -m layerfs.bench.peers [COMPARISON]``: comparisons with other programs, one of them or all in turn."""

import sys

import click

from layerfs.bench.peers import apply_diff, containerd, docker, union
from layerfs.cli import app


@click.group(
    invoke_without_command=True,
    commands={
        "apply-diff": apply_diff.main,
        "union": union.main,
        "containerd": containerd.main,
        "docker": docker.main,
    },
)
@click.pass_context
def main(context: click.Context) -> None:
    """Compare layerfs with other programs: with all of them, or as one COMMAND says."""
    if context.invoked_subcommand is None:
        for comparison in main.commands.values():
            context.invoke(comparison)


if __name__ == "__main__":
    sys.exit(app.main(main))
