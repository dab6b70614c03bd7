"""Commands for images: in, out, and what is there."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerfs.cli.common import Command, json_option, open_store
from layerfs.cli.layers import byte_sink
from layerfs.cli.output import (
    ago,
    byte_progress,
    image_progress,
    print_json,
    print_table,
    refuse_terminal,
    size_text,
)
from layerfs.errors import InvalidArgument

if TYPE_CHECKING:
    from layerfs.images import Image

_STANDARD = Path("-")


@click.command(
    "import",
    cls=Command,
    examples=(
        "import debian.oci",
        "import debian.tar --name debian:12",
        "import images.oci --platform linux/arm64",
        "import - <debian.tar",
        "import --from docker:/var/lib/docker",
        "import --from containers-storage:/var/lib/containers/storage --name localhost/my-app:latest",
    ),
)
@click.argument("source", type=click.Path(path_type=Path), required=False)
@click.option("--from", "store_of", metavar="KIND:DIR", help="Import from the data directory of another program.")
@click.option("--name", metavar="NAME", help="The image's name in the store [default: the one in the SOURCE].")
@click.option("--platform", metavar="OS/ARCH", help="Which image of several platforms [default: this machine's].")
@json_option
def import_image(
    source: Path | None, store_of: str | None, name: str | None, platform: str | None, as_json: bool
) -> None:
    """Import images from an OCI layout or Docker archive.

    Prints their names. SOURCE is an OCI layout (folder or tar) or a tar of "docker save"; "-" reads a tar from the
    standard input. Instead of it, --from takes all images of Docker (docker:DIR; its drivers overlay2 and vfs) or of
    podman and buildah (containers-storage:DIR; overlay and vfs), and writes nothing there. Layers that the store has
    already are not stored again. Every digest is verified.
    """
    kind = None
    if store_of is not None:
        kind, colon, directory = store_of.partition(":")
        if source is not None or not colon or not directory:
            raise InvalidArgument("--from takes docker:DIR or containers-storage:DIR, and no SOURCE goes with it")
        source = Path(directory)
    if source is None:
        raise InvalidArgument("name a SOURCE, or another program's data directory with --from")
    with open_store(create=True) as store, _readable(source) as file, image_progress() as progress:
        found = store.images.import_(file, kind=kind, name=name, platform=platform, progress=progress)
    if as_json:
        print_json([image_facts(image) for image in found])
        return
    for image in found:
        click.echo(image.name)


@click.command(
    cls=Command,
    examples=(
        "export my-app my-app.oci",
        "export my-app my-app.tar --compression zstd",
        "export my-app - | ctr images import -",
    ),
)
@click.argument("name")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--compression",
    type=click.Choice(["gzip", "zstd", "none"]),
    default="gzip",
    show_default=True,
    help="Of layers that are not kept as they were imported.",
)
def export(name: str, dest: Path, compression: str) -> None:
    """Export an image or committed layer as an OCI layout.

    DEST becomes a folder, or a tar if it ends in .tar; "-" writes a tar to the standard output. SOURCE_DATE_EPOCH in
    the environment makes it reproducible.
    """
    with open_store() as store, _writable(dest) as place, image_progress() as progress:
        store.images.export(name, place, compression=compression, progress=progress)


@click.command(cls=Command, examples=("images", "images --json"))
@json_option
def images(as_json: bool) -> None:
    """List the images of the store."""
    with open_store() as store:
        found = list(store.images.list())
    if as_json:
        print_json([image_facts(image) for image in found])
        return
    rows = [(i.name, i.platform, str(len(i.layers)), size_text(i.size), ago(i.created), i.digest) for i in found]
    print_table(("name", "platform", "layers", "size", "imported", "digest"), rows)


def image_facts(image: Image) -> dict[str, Any]:
    """An image as JSON takes it; times as RFC 3339 in UTC."""
    return {**asdict(image), "created": image.created.isoformat()}


@contextmanager
def _readable(source: Path) -> Iterator[Path]:
    """The source, or what the standard input has: the parts of an image are read in another order than they come."""
    if source != _STANDARD:
        yield source
        return
    with tempfile.NamedTemporaryFile(prefix="standard-input-") as file:
        with byte_progress("the standard input") as progress:
            while data := sys.stdin.buffer.read(1 << 20):
                file.write(data)
                progress(len(data))
        file.flush()
        yield Path(file.name)


@contextmanager
def _writable(dest: Path) -> Iterator[Path]:
    """The target, or a tar that is passed on when it is whole: lengths stand in it before what they are of."""
    if dest != _STANDARD:
        yield dest
        return
    refuse_terminal("name a DEST")
    with tempfile.TemporaryDirectory(prefix="layerfs-export-") as place:
        whole = Path(place) / "image.tar"
        yield whole
        with open(whole, "rb") as file, byte_sink(None) as out:
            shutil.copyfileobj(file, out)
