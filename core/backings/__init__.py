"""The kinds of backing, one module each; `layerfs.backing` picks one by the name in the spec.

Another kind is another module with a class that follows `layerfs.backings.kind.Kind`, and a line in `KINDS`.
"""

from __future__ import annotations

from importlib import import_module

from layerfs.backings.kind import Kind
from layerfs.errors import InvalidArgument

KINDS = {
    "dir": "layerfs.backings.directory:Directory",
    "btrfs": "layerfs.backings.filesystem:FileSystem",
    "ext4": "layerfs.backings.filesystem:FileSystem",
    "thinpool": "layerfs.backings.thinpool:ThinPool",
    "xfs": "layerfs.backings.filesystem:FileSystem",
    "xfs-noreflink": "layerfs.backings.filesystem:FileSystem",
    "zfs": "layerfs.backings.zpool:Zpool",
}
"""Where the class is; a module is imported only when a backing of its kind is used."""


def kind_of(name: str) -> type[Kind]:
    """The class for a name in `BackingSpec.filesystem`. Raises `InvalidArgument` where there is none."""
    if name not in KINDS:
        raise InvalidArgument(f"no backing of kind {name!r}; there are {', '.join(KINDS)}")
    module, _, attribute = KINDS[name].partition(":")
    found: type[Kind] = getattr(import_module(module), attribute)
    return found
