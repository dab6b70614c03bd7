"""Commands that serve a store to container engines."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click

from layerfs.cli.common import Command, open_store, settings
from layerfs.errors import EnvironmentUnfit

_CONTAINERD_SOCKET = Path("/run/layerfs/containerd.sock")


@click.group()
def serve() -> None:
    """Serve a store to container engines."""


@serve.command(
    cls=Command,
    examples=(
        "serve containerd --root /var/lib/layerfs --driver overlay2",
        "serve containerd --print-config >> /etc/containerd/config.toml",
    ),
)
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    default=_CONTAINERD_SOCKET,
    show_default=True,
    metavar="PATH",
    help="Where to listen; systemd's socket, if it gives one, goes before.",
)
@click.option("--metrics", metavar="HOST:PORT", help="Serve metrics for Prometheus there.")
@click.option("--print-config", is_flag=True, help="Print configuration for containerd, BuildKit and Docker 29.")
@click.option("--print-unit", is_flag=True, help="Print units for systemd.")
def containerd(socket: Path, metrics: str | None, print_config: bool, print_unit: bool) -> None:
    """Serve a store to containerd as a snapshotter.

    Runs until SIGTERM or Ctrl-C, then finishes the requests under way; containers go on without it. The store belongs
    to containerd: what it does not know, its garbage collection removes.
    """
    socket = Path(os.path.abspath(socket))
    if print_config or print_unit:
        from layerfs.serve import setup

        root = settings().place()
        if print_config:
            click.echo(setup.engine_config(socket, root), nl=False)
        if print_unit:
            click.echo(setup.units(os.path.abspath(sys.argv[0]), socket, root), nl=False)
        return
    if os.geteuid() != 0:
        raise EnvironmentUnfit("serving containerd: its mounts take root; run it as root")
    try:
        from layerfs.serve import containerd as server
        from layerfs.serve.requests import Requests, serve_metrics
    except ImportError as error:
        raise EnvironmentUnfit(f"serving containerd: {error}; pip install 'layerfs[serve]'") from error
    _log_to_stderr()
    requests = Requests(metrics=metrics is not None)
    with open_store(create=True) as store:
        if metrics is not None:
            serve_metrics(metrics)
        server.serve(store, socket, requests)


def _log_to_stderr() -> None:
    """Times are left to systemd's journal where that keeps the log."""
    form = "%(message)s" if "JOURNAL_STREAM" in os.environ else "%(asctime)s %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=form)
