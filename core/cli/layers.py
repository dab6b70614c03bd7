"""Commands for layers: their life from prepare to commit, and their files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import click

from layerfs.cli.common import Command, json_option, labels_option, open_store, pairs
from layerfs.cli.namespace import require_lasting_mounts
from layerfs.cli.output import (
    ago,
    byte_progress,
    one_line,
    print_json,
    print_table,
    printable,
    refuse_terminal,
    size_text,
)
from layerfs.driver import ChangeKind, Mount
from layerfs.epoch import source_date_epoch
from layerfs.errors import InvalidArgument, LayerfsError, NotFound, refused
from layerfs.layer import Kind, Layer

_LETTERS = {ChangeKind.ADDED: "A", ChangeKind.MODIFIED: "M", ChangeKind.DELETED: "D"}


@click.command(
    cls=Command,
    examples=("prepare work --parent debian:12", "prepare 'a key/with: anything' --size 10G", "prepare empty"),
)
@click.argument("key")
@click.option(
    "--parent", default="", metavar="NAME", help="A committed layer or an image [default: none, start empty]."
)
@click.option("--size", metavar="SIZE", help="The most bytes that it may hold, like 10G.")
@labels_option
@json_option
def prepare(key: str, parent: str, size: str | None, labels: tuple[str, ...], as_json: bool) -> None:
    """Make a writable layer.

    Prints nothing; with --json the mounts that show the layer, for a program that mounts them itself.
    """
    from layerfs.sizes import parse_size

    limit = parse_size(size) if size else None
    with open_store(create=True) as store:
        _tell_mounts(store.prepare(key, parent, labels=pairs(labels, "--label"), size=limit), as_json)


@click.command(cls=Command, examples=("view look --parent debian:12",))
@click.argument("key")
@click.option("--parent", required=True, metavar="NAME", help="A committed layer or an image.")
@labels_option
@json_option
def view(key: str, parent: str, labels: tuple[str, ...], as_json: bool) -> None:
    """Make a read-only look at a committed layer.

    Prints nothing; with --json the mounts that show the layer, for a program that mounts them itself.
    """
    with open_store() as store:
        _tell_mounts(store.view(key, parent, labels=pairs(labels, "--label")), as_json)


@click.command(cls=Command, examples=("commit work my-app", "commit work my-app --no-digest"))
@click.argument("key")
@click.argument("name")
@labels_option
@click.option("--no-digest", is_flag=True, help="Do not read the layer for its diff ID now.")
def commit(key: str, name: str, labels: tuple[str, ...], no_digest: bool) -> None:
    """Finish a writable layer under a NAME.

    Prints its diff ID. It is immutable then and may have children. What layerfs has mounted of it is taken down first.
    """
    with open_store() as store:
        layer = store.commit(name, key, labels=pairs(labels, "--label"), digest=not no_digest)
    if layer.diff_id:
        click.echo(layer.diff_id)


@click.command("rm", cls=Command, examples=("rm work", "rm my-app debian:12"))
@click.argument("keys", nargs=-1, required=True, metavar="KEY…")
def remove(keys: tuple[str, ...]) -> None:
    """Remove layers or images.

    Where a layer and an image have the name, it is the layer. The layers of an image go with it where nothing else
    needs them. Goes on after a failure, and ends with the first failure's exit code then.
    """
    failures: list[LayerfsError] = []
    with open_store() as store:
        for key in keys:
            try:
                try:
                    store.remove(key)
                except NotFound:
                    store.images.remove(key)
            except LayerfsError as error:
                failures.append(error)
    for failure in failures[1:]:
        click.echo(f"layerfs: {one_line(str(failure))}", err=True)
    if failures:
        raise failures[0]


@click.command("layers", cls=Command, examples=("layers", "layers 'kind==active'", "layers --json"))
@click.argument("filters", nargs=-1, metavar="[FILTER…]")
@json_option
def list_layers(filters: tuple[str, ...], as_json: bool) -> None:
    """List layers.

    All, or those that any FILTER fits. A filter is containerd's: kind==active, parent==NAME, labels.team==web,
    name~=^web; several fields of one filter stand with commas between and must all fit.
    """
    with open_store() as store:
        found = list(store.list(*filters))
    if as_json:
        print_json([layer_facts(layer) for layer in found])
        return
    rows = [(layer.key, layer.kind, layer.parent or "-", ago(layer.updated), layer.diff_id or "-") for layer in found]
    print_table(("key", "kind", "parent", "updated", "diff ID"), rows)


@click.command(cls=Command, examples=("inspect my-app", "inspect debian:12"))
@click.argument("name")
def inspect(name: str) -> None:
    """Print all facts about a layer or image as JSON.

    A layer's mounts are those for looking at it; "prepare" prints those for writing.
    """
    from layerfs.cli.images import image_facts

    with open_store() as store:
        try:
            layer = store.stat(name)
        except NotFound:
            print_json({"type": "image", **image_facts(store.images.get(name))})
            return
        mounts = store.mounts(name, read_only=True) if layer.kind is not Kind.COMMITTED else []
    print_json({"type": "layer", **layer_facts(layer), "mounts": [asdict(mount) for mount in mounts]})


@click.command(cls=Command, examples=("usage", "usage work", "usage --json"))
@click.argument("key", required=False)
@json_option
def usage(key: str | None, as_json: bool) -> None:
    """Show what layers occupy, each without its parents."""
    with open_store() as store:
        keys = [key] if key is not None else [layer.key for layer in store.list()]
        found = [(name, store.usage(name)) for name in keys]
    if as_json:
        print_json([{"key": name, **asdict(used)} for name, used in found])
        return
    rows = [(name, size_text(u.size), "-" if u.inodes < 0 else f"{u.inodes:,}") for name, u in found]
    print_table(("key", "size", "inodes"), rows)


@click.command(cls=Command, examples=("mount work", "mount work /mnt", 'ls "$(layerfs mount look)"'))
@click.argument("key")
@click.argument("target", required=False, type=click.Path(path_type=Path))
def mount(key: str, target: Path | None) -> None:
    """Mount a layer and print where.

    At TARGET, or at a place in the store. Without root, run it inside "layerfs unshare".
    """
    require_lasting_mounts(key)
    with open_store() as store:
        click.echo(os.fsencode(store.mount(key, target and target.absolute())))


@click.command(cls=Command, examples=("unmount work", "unmount /mnt"))
@click.argument("mounted", metavar="KEY|TARGET")
def unmount(mounted: str) -> None:
    """Unmount a layer, named by its key or its place."""
    with open_store() as store:
        store.unmount(mounted)


@click.command(cls=Command, examples=("changes work", "changes work --json", "changes work | grep ^D"))
@click.argument("key")
@json_option
def changes(key: str, as_json: bool) -> None:
    r"""List the paths that a layer changes.

    It adds (A), modifies (M) or deletes (D) them against its parent. Paths start at the layer's root; "/" is the root
    itself. Odd characters are escaped, as printf %b undoes them.
    """
    with open_store() as store:
        if as_json:
            print_json([{"kind": c.kind, "path": "/" + os.fsdecode(c.path)} for c in store.changes(key)])
            return
        for change in store.changes(key):
            click.echo(f"{_LETTERS[change.kind]} {printable(b'/' + change.path)}")


@click.command(cls=Command, examples=("diff work -o work.tar", "diff work | tar -tv"))
@click.argument("key")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write there, not to the output.")
def diff(key: str, output: Path | None) -> None:
    """Write a layer's changes as an OCI layer tar.

    The tar is not compressed. The same files give the same bytes on every driver. SOURCE_DATE_EPOCH in the
    environment sets the latest time that a file may have.
    """
    if output is None:
        refuse_terminal("give -o FILE")
    epoch = source_date_epoch()
    with open_store() as store, byte_sink(output) as out:
        store.diff(key, out, source_date_epoch=epoch, digest=False)


@click.command(cls=Command, examples=("apply work layer.tar.gz", "curl -s URL | layerfs apply work -"))
@click.argument("key")
@click.argument("file", metavar="FILE|-")
@click.option("--devices", is_flag=True, help="Make device nodes of every kind, not only those that containers have.")
def apply(key: str, file: str, devices: bool) -> None:
    """Apply an OCI layer tar to a writable layer.

    Prints the diff ID. The tar may be plain, gzip or zstd; "-" reads the standard input. If anything is wrong with it,
    the layer stays as it was.
    """
    with (
        _source(file) as (stream, size),
        open_store() as store,
        byte_progress(f"applying to {key}", size) as progress,
    ):
        applied = store.apply(key, stream, devices=devices, progress=progress)
    for what in applied.skipped:
        click.echo(f"layerfs: left out {printable(str(what))}", err=True)
    click.echo(applied.diff_id)


def layer_facts(layer: Layer) -> dict[str, Any]:
    """A layer as JSON takes it; times as RFC 3339 in UTC."""
    facts = {name: getattr(layer, name) for name in ("key", "kind", "parent", "diff_id", "chain_id", "size_limit")}
    times = {"created": layer.created.isoformat(), "updated": layer.updated.isoformat()}
    return {**facts, **times, "labels": dict(layer.labels)}


@contextmanager
def byte_sink(output: Path | None) -> Iterator[BinaryIO]:
    """The standard output, or a file that is there whole at the end or not at all."""
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if output.exists() and not output.is_file():  # /dev/null, a named pipe
        with _open(output, "wb") as out:
            yield out
        return
    output = Path(os.path.realpath(output))  # a link stays one, above all /dev/stdout
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with _open(partial, "xb") as out:
            yield out
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _source(file: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """A file or the standard input, and its size where it has one."""
    if file == "-":
        yield sys.stdin.buffer, None
        return
    with _open(Path(file), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        yield stream, size or None


def _open(path: Path, mode: str) -> BinaryIO:
    try:
        return open(path, mode)  # type: ignore[return-value]
    except FileNotFoundError as error:
        raise NotFound(f"opening {str(path)!r}: {error.strerror}") from error
    except IsADirectoryError as error:
        raise InvalidArgument(f"opening {str(path)!r}: {error.strerror}") from error
    except OSError as error:
        raise refused(f"opening {str(path)!r}", error, "check who may use the file") from error


def _tell_mounts(mounts: list[Mount], as_json: bool) -> None:
    if as_json:
        print_json([asdict(mount) for mount in mounts])
