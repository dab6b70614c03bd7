"""Commands that serve a store to container engines."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerfs.cli.common import Command, open_store, settings
from layerfs.errors import EnvironmentUnfit

if TYPE_CHECKING:
    from layerfs.serve.requests import Requests
    from layerfs.store import Store


_SWITCH = 0.0005
"""Seconds that a thread may keep others from running Python: requests do not wait for a removal in the background."""


@click.group()
def serve() -> None:
    """Serve a store to container engines."""


def _options(socket: str, engines: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What the servers have in common."""
    options = [
        click.option(
            "--socket",
            type=click.Path(path_type=Path),
            default=Path(socket),
            show_default=True,
            metavar="PATH",
            help="Where to listen; systemd's socket, if it gives one, goes before.",
        ),
        click.option(
            "--sync",
            type=click.Choice(["later", "commit"]),
            default="later",
            show_default=True,
            help="When data is written out: before a commit is answered, or about a second later.",
        ),
        click.option("--metrics", metavar="HOST:PORT", help="Serve metrics for Prometheus there."),
        click.option("--print-config", is_flag=True, help=f"Print configuration for {engines}, and end."),
        click.option("--print-unit", is_flag=True, help="Print units for systemd, and end."),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@serve.command(
    cls=Command,
    examples=(
        "serve containerd --root /var/lib/layerfs --driver overlay2",
        "serve containerd --print-config >> /etc/containerd/config.toml",
    ),
)
@_options("/run/layerfs/containerd.sock", "containerd, BuildKit and Docker 29")
def containerd(socket: Path, sync: str, metrics: str | None, print_config: bool, print_unit: bool) -> None:
    """Serve a store to containerd as a snapshotter.

    Runs until SIGTERM or Ctrl-C, then finishes the requests under way, for 40 s at most; containers go on without it.
    The store belongs to containerd: what it does not know, its garbage collection removes.
    """
    socket = Path(os.path.abspath(socket))
    if print_config:
        from layerfs.serve import setup

        click.echo(setup.engine_config(socket, settings().place()), nl=False)
    if print_unit:
        _print_unit("containerd", socket, sync, metrics)
    if not print_config and not print_unit:
        _serve("containerd", socket, sync, metrics)


@serve.command(
    cls=Command,
    examples=(
        "serve docker --root /var/lib/layerfs-docker --driver btrfs",
        "serve docker --print-config > /etc/docker/daemon.json",
    ),
)
@_options("/run/docker/plugins/layerfs.sock", "Docker 20.10 to 26")
def docker(socket: Path, sync: str, metrics: str | None, print_config: bool, print_unit: bool) -> None:
    """Serve a store to Docker 20.10 to 26 as a graph driver.

    Docker finds the driver by the name of its socket. Runs until SIGTERM or Ctrl-C, then finishes the requests under
    way, for 40 s at most. The store belongs to Docker.
    """
    socket = Path(os.path.abspath(socket))
    if print_config:
        from layerfs.serve import setup

        click.echo(setup.docker_config(socket), nl=False)
    if print_unit:
        _print_unit("docker", socket, sync, metrics)
    if not print_config and not print_unit:
        _serve("docker", socket, sync, metrics)


def _print_unit(engine: str, socket: Path, sync: str, metrics: str | None) -> None:
    from layerfs.serve import setup

    chosen = settings()
    options = {
        "--root": str(chosen.place()),
        "--driver": chosen.driver,
        "--socket": str(socket),
        "--sync": sync,
        "--metrics": metrics,
    }
    command = [os.path.abspath(sys.argv[0]), "serve", engine]
    for name, value in options.items():
        command += [] if value is None else [name, value]
    click.echo(setup.units(engine, command, socket), nl=False)


def _serve(engine: str, socket: Path, sync: str, metrics: str | None) -> None:
    if os.geteuid() != 0:
        raise EnvironmentUnfit(f"serving {engine} takes root, for its mounts are seen by all; run it as root")
    run, requests = _loaded(engine, metrics)
    # Times are left to systemd's journal where that keeps the log.
    form = "%(message)s" if "JOURNAL_STREAM" in os.environ else "%(asctime)s %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=form)
    sys.setswitchinterval(_SWITCH)
    with open_store(create=True, sync=sync, background=True) as store:
        gc.collect()
        gc.freeze()  # all that was imported stays as it is, and would be gone through for cycles again and again
        run(store, socket, requests)


def _loaded(engine: str, metrics: str | None) -> tuple[Callable[[Store, Path, Requests], Any], Requests]:
    """What serves the engine, and what counts its requests. Raises `EnvironmentUnfit` for lack of a package."""
    try:
        from layerfs.serve.requests import Requests, serve_metrics

        if engine == "docker":
            from layerfs.serve.docker import serve as run
        else:
            from layerfs.serve.containerd import serve as run
        requests = Requests(metrics=metrics is not None)
        if metrics is not None:
            serve_metrics(metrics)
    except ImportError as error:
        raise EnvironmentUnfit(f"serving {engine}: {error}; pip install 'layerfs[serve]'") from error
    return run, requests
