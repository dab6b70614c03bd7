"""The command ``layerfs guest``."""

from __future__ import annotations

from pathlib import Path

import click

from layerfs.errors import InvalidArgument
from layerfs.guest import KINDS, Request, run
from layerfs.sizes import parse_size


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  layerfs guest -- uname -a
  layerfs guest --memory 4G --disk 10G -- layerfs drivers
  layerfs guest --kind qemu --cpus 2 --timeout 600 -- pytest tests/test_zfs.py
""",
)
@click.option("--kind", type=click.Choice(KINDS), default="uml", show_default=True, help="The kind of guest.")
@click.option("--memory", default="2G", show_default=True, help="How much memory the guest has.")
@click.option("--cpus", type=click.IntRange(1), default=1, show_default=True, help="How many processors; uml has one.")
@click.option("--scratch", default="64G", show_default=True, help="The size of its own disk, a sparse file.")
@click.option("--disk", "disks", multiple=True, metavar="SIZE", help="A further, empty disk; may be repeated.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), help="Seconds after which the guest is ended.")
@click.option(
    "--kernel", metavar="IMAGE", help="The kernel image to boot, with its modules where its package has them."
)
@click.option(
    "--write",
    "writable",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="A directory of the host that may be changed; may be repeated [default: the working directory].",
)
@click.argument("command", nargs=-1, required=True, metavar="[--] COMMAND…")
def guest(
    kind: str,
    memory: str,
    cpus: int,
    scratch: str,
    disks: tuple[str, ...],
    timeout: float | None,
    kernel: str | None,
    writable: tuple[Path, ...],
    command: tuple[str, ...],
) -> int:
    """Run a command in a guest kernel.

    For what this machine's kernel lacks. The command sees this machine's files and runs in the same directory, as root
    of the guest; what it writes there comes back, all else that it writes goes with the guest. Ends with the command's
    exit code, or 124 after --timeout.

    \b
    uml    User-Mode Linux: up in two seconds, one processor, slow system calls
    qemu   a distribution's kernel in QEMU, with KVM where there is one
    """
    here = Path.cwd()
    if not writable and here != Path("/"):
        writable = (here,)
    if any(path.resolve() == Path("/") for path in writable):
        raise InvalidArgument("--write /: a guest must not change the whole host; name a directory")
    request = Request(
        command=command,
        kind=kind,
        memory=parse_size(memory),
        cpus=cpus,
        scratch=parse_size(scratch),
        disks=tuple(parse_size(size) for size in disks),
        timeout=timeout,
        kernel=kernel,
        directory=here,
        writable=writable,
        progress=lambda what: click.echo(f"layerfs: {what} …", err=True),
    )
    return run(request)
