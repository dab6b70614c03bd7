"""An image whose layers are kept split, in the form in which images are imported."""

from __future__ import annotations

from collections.abc import Sequence

from layerfs import oci
from layerfs.adopt.tarsplit import Split
from layerfs.digest import of
from layerfs.errors import BadLayer, InvalidArgument
from layerfs.platforms import Platform
from layerfs.sourceimage import SourceImage


def split_image(config: bytes, splits: Sequence[Split], what: str, wanted: Platform | None) -> SourceImage:
    """The image with this configuration and these layers, bottom up.

    Its manifest is made anew: the one it may have had names compressed blobs, which nobody has kept.
    Raises `BadLayer`, and `InvalidArgument` where it is not for the platform ``wanted``.
    """
    parsed = oci.parse_config(config, f"{what}: the configuration")
    if wanted is not None and parsed.platform.distance(wanted) is None:
        raise InvalidArgument(f"{what} is not for {wanted}, but for {parsed.platform}")
    if len(splits) != len(parsed.diff_ids):
        raise BadLayer(f"{what} has {len(splits)} layers, but its configuration has {len(parsed.diff_ids)} diff IDs")
    layers = tuple(
        oci.Descriptor(oci.LAYER, diff_id, split.size()) for diff_id, split in zip(parsed.diff_ids, splits, strict=True)
    )
    by_digest = {layer.digest: split for layer, split in zip(layers, splits, strict=True)}
    manifest = oci.make_manifest(oci.Descriptor(oci.CONFIG, of(config), len(config)), layers, {})
    return SourceImage(manifest, config, parsed, layers, lambda layer: by_digest[layer.digest].open())
