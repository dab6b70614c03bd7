"""Completion for the shells that click knows."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(
    epilog="""\b
Examples:
  layerfs completion bash > ~/.local/share/bash-completion/completions/layerfs
  layerfs completion zsh > ~/.zfunc/_layerfs
  layerfs completion fish > ~/.config/fish/completions/layerfs.fish
"""
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes layerfs in a shell."""
    kind = get_completion_class(shell)
    if kind is not None:
        click.echo(kind(context.find_root().command, {}, "layerfs", "_LAYERFS_COMPLETE").source())
