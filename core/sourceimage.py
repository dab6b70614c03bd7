"""One image of a source outside the store, ready to be imported: the form that all kinds of source are brought into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from layerfs import oci
from layerfs.errors import BadLayer
from layerfs.platforms import Platform


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image whose documents have been read and checked.

    Attributes:
        manifest: the manifest's bytes; where the source has none, made from what it has.
        config: the configuration's bytes.
        parsed: what the configuration says.
        layers: from the bottom up, one for each diff ID.
        open: gives a layer's blob, not verified; may be called from any thread.
    """

    manifest: bytes
    config: bytes
    parsed: oci.Config
    layers: tuple[oci.Descriptor, ...]
    open: Callable[[oci.Descriptor], BinaryIO]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.parsed.diff_ids):
            raise BadLayer(
                f"the image's manifest has {len(self.layers)} layers, "
                f"but its configuration has {len(self.parsed.diff_ids)} diff IDs"
            )


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image of a source, not yet read.

    Attributes:
        names: what the source calls it; empty where it has no name.
        load: reads it, for the given platform or, where that is None, for the host's. Raises `BadLayer`, and
            `InvalidArgument` where there is none for the platform.
    """

    names: tuple[str, ...]
    load: Callable[[Platform | None], SourceImage]
