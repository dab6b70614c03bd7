"""Where a comparison works: a file system of its own, the same for all that are compared.

What happens to lie below a machine's temporary directory can decide everything. An ext4 without a journal, for one,
passes over every inode that was freed in the last minutes when it makes a file (``recently_deleted`` in the kernel's
``fs/ext4/ialloc.c``), so that who comes after another's removal looks slow.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import click

from layerfs.backing import Backing, BackingSpec
from layerfs.bench.scratch import destroy, take_away

_SIZE: Final = 24 << 30  # bytes, of which only what is written is taken


def option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--scratch DIR``, given to the command as ``scratch``."""
    return click.option(
        "--scratch",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="Work in this directory, not on a fresh ext4 on a sparse file.",
    )(command)


@contextmanager
def place(scratch: Path | None) -> Iterator[Path]:
    """A directory that is gone afterwards; its path is short, because those of sockets have to be."""
    work = Path(tempfile.mkdtemp(dir=scratch or "/var/tmp", prefix="peers-"))  # noqa: S108
    with ExitStack() as leaving:
        leaving.callback(take_away, work)
        if scratch:
            yield work
            return
        backing = Backing.create(work, BackingSpec("ext4", size=_SIZE))
        leaving.callback(destroy, backing)
        backing.up()
        yield backing.path
