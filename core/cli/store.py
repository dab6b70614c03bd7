"""Commands for the store as a whole: drivers, making it, checking it, cleaning it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from layerfs.cli.common import Command, json_option, open_store, pairs, settings
from layerfs.cli.output import print_json, print_table, printable, step_progress
from layerfs.errors import Damaged, InvalidArgument, LayerfsError

if TYPE_CHECKING:
    from layerfs.backing import BackingSpec
    from layerfs.check import Finding


@click.command(cls=Command, examples=("drivers", "drivers --root /srv/layers", "drivers --json"))
@json_option
def drivers(as_json: bool) -> None:
    """Say which storage drivers work on this machine.

    Where one does not, the remedy is the one thing to do about it. Each is tried for real.
    """
    from layerfs import registry
    from layerfs.driver import Probe
    from layerfs.kernel import userns

    root = settings().place()
    userns.enter()
    found = []
    for name in registry.names():
        summary = ""
        filesystems: tuple[str, ...] = ()
        try:
            driver = registry.load(name)
            summary, filesystems = driver.summary, driver.needs.filesystems
            probe = driver.probe(root)
        except LayerfsError as error:
            probe = Probe(usable=False, reason=str(error))
        found.append({"name": name, "summary": summary, "filesystems": list(filesystems), **asdict(probe)})
    if as_json:
        print_json(found)
        return
    rows = [
        (
            d["name"],
            "yes" if d["usable"] else "no",
            d["summary"],
            ", ".join(d["filesystems"]) or "any",
            d["reason"],
            d["remedy"] or "-",
        )
        for d in found
    ]
    print_table(("name", "usable", "a layer is", "file system", "reason", "remedy"), rows)


@click.command(
    cls=Command,
    examples=(
        "init --driver overlay2",
        "init --driver btrfs --backing btrfs:20G",
        "init --driver overlay2 --backing ext4 --device /dev/sdb1",
        "init --driver devicemapper --backing thinpool --device /dev/sdb1 --metadata-device /dev/sdb2",
    ),
)
@click.option(
    "--backing",
    metavar="FS[:SIZE[:MOST]]",
    help="Keep the data on a file system or pool of its own: dir, btrfs, ext4, xfs, xfs-noreflink, thinpool, zfs. "
    "A thin pool grows by itself, to MOST if that is given.",
)
@click.option("--device", metavar="DEVICE", help="Make that file system on this device, not on a sparse file.")
@click.option("--metadata-device", metavar="DEVICE", help="Keep a thin pool's metadata on this device.")
@click.option("--force", is_flag=True, help="Even if the device holds data, which is lost then.")
@click.option(
    "--option", "options", multiple=True, metavar="KEY=VALUE", help="A setting of the driver; may be repeated."
)
def init(
    backing: str | None, device: str | None, metadata_device: str | None, force: bool, options: tuple[str, ...]
) -> None:
    """Make a store, and print where it is.

    The store remembers its driver and options. A store that is there already is left as it is, if it fits. Without
    --backing the data lives in the store's directory, or on a sparse file where the driver needs another file system
    (its size is the most that it may grow to, but for a thin pool, which becomes larger when it is nearly full).
    """
    spec = _backing_spec(backing, device, metadata_device)
    with open_store(create=True, options=pairs(options, "--option"), backing=spec, force=force) as store:
        click.echo(os.fsencode(store.root))


@click.command(cls=Command, examples=("check", "check --repair", "check --json"))
@click.option("--repair", is_flag=True, help="Put right what can be put right without losing data.")
@json_option
def check(repair: bool, as_json: bool) -> None:
    """Find damaged, orphaned and half-made layers.

    Committed layers are verified against their diff IDs. Ends with 0 if all is well or was repaired, with 8 if
    problems remain.
    """
    with open_store() as store, step_progress() as progress:
        found = store.check(repair=repair, progress=progress)
        layers = sum(1 for _ in store.list())
    if as_json:
        print_json([asdict(one) for one in found])
    elif not found:
        click.echo(f"{layers} {'layer' if layers == 1 else 'layers'} checked, nothing is wrong")
    else:
        print_table(("problem", "of", "what", "outcome"), [(f.kind, f.name, f.what, _outcome(f)) for f in found])
    left = sum(not one.repaired for one in found)
    if left:
        remedy = "" if repair else "; `layerfs check --repair` puts right what it can"
        raise Damaged(f"{left} {'problem' if left == 1 else 'problems'} found{remedy}")


def _outcome(finding: Finding) -> str:
    if finding.repaired:
        return "repaired"
    return "can be repaired" if finding.repairable else "cannot be repaired"


@click.command(cls=Command, examples=("gc", "gc --json"))
@json_option
def gc(as_json: bool) -> None:
    """Remove what nothing needs any more.

    That is what interrupted work left, and layers that came with an image when no image has them any more. Prints
    what it did.
    """
    with open_store() as store:
        done = store.collect_garbage()
    if as_json:
        print_json(done)
        return
    for line in done:
        click.echo(printable(line))


@click.command(cls=Command, examples=("grow 200G", "grow 200G --root /srv/layers", "grow"))
@click.argument("size", required=False)
def grow(size: str | None) -> None:
    """Make the store's own file system or pool larger.

    Prints its size. SIZE is what it is to have then, and no less than it has; of a device, all is used. Layers can be
    in use, but for ext4 without CAP_SYS_RESOURCE, and for zfs-fuse.
    """
    from layerfs.sizes import format_size, parse_size

    with open_store() as store:
        if size is None and store.backing.spec.device is None:
            raise InvalidArgument("say how large it is to be, as in `layerfs grow 200G`; a device tells that itself")
        store.backing.grow(parse_size(size) if size else 0)
        click.echo(format_size(store.space().total))


@click.command(
    cls=Command,
    examples=("migrate --to btrfs /srv/new", "migrate --to overlay2 --root /srv/old /srv/new"),
)
@click.option("--to", required=True, metavar="NAME", help="The driver of the new store.")
@click.option("--backing", metavar="FS[:SIZE[:MOST]]", help="What the new store's data lives on, as for init.")
@click.argument("dest", type=click.Path(path_type=Path))
def migrate(to: str, backing: str | None, dest: Path) -> None:
    """Copy the store to DEST, on another driver.

    Layers of every kind, their labels, and images; every diff ID is verified. The old store stays as it is. If it is
    interrupted, the same command goes on. Writable layers should not be in use meanwhile.
    """
    from layerfs.migration import check_apart
    from layerfs.migration import migrate as copy
    from layerfs.store import Store

    place = Path(os.path.abspath(dest))
    check_apart(settings().place(), place)
    spec = _backing_spec(backing, None, None)
    with open_store() as source, Store(place, to, backing=spec) as target, step_progress() as progress:
        copy(source, target, progress)
        click.echo(os.fsencode(target.root))


def _backing_spec(backing: str | None, device: str | None, metadata_device: str | None) -> BackingSpec | None:
    """``FS[:SIZE[:MOST]]`` and the devices as the store takes them."""
    from layerfs.backing import BackingSpec
    from layerfs.sizes import parse_size

    if backing is None:
        if device is not None or metadata_device is not None:
            raise InvalidArgument("--device needs --backing to say which file system to make on it")
        return None
    filesystem, _, sizes = backing.partition(":")
    size, _, most = sizes.partition(":")
    return BackingSpec(
        filesystem,
        parse_size(size) if size else None,
        device,
        metadata_device=metadata_device,
        largest=parse_size(most) if most else None,
    )
