"""The images of an OCI layout: their names, their platforms, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from layerfs import oci, platforms
from layerfs.errors import BadLayer, InvalidArgument
from layerfs.layout import Layout
from layerfs.platforms import Platform
from layerfs.sourceimage import Candidate, SourceImage

_DEEPEST = 8  # index in index
_MOST = 1000  # descriptors looked at for one image


def find(layout: Layout) -> list[Candidate]:
    """Every image of a layout. Manifests of one name are one image for several platforms. Raises `BadLayer`."""
    groups: dict[str, list[oci.Descriptor]] = {}
    for item in oci.parse_index(layout.index(), f"{layout.name}: index.json"):
        name = oci.name_of(item.annotations)
        groups.setdefault(name, []).append(item)
    named = {item.digest for name, items in groups.items() if name for item in items}
    # What has a name elsewhere in the index needs no second one.
    groups[""] = [item for item in groups.get("", []) if item.digest not in named]
    return [
        Candidate((name,) if name else (), lambda wanted, items=items: _load(layout, items, wanted))  # type: ignore[misc]
        for name, items in groups.items()
        if any(not item.is_attestation for item in items)
    ]


def _manifests(layout: Layout, items: Sequence[oci.Descriptor]) -> list[oci.Descriptor]:
    """The manifests below these descriptors, with what indexes nest unfolded, each once."""
    seen: set[str] = set()

    def walk(items: Sequence[oci.Descriptor], depth: int) -> Iterator[oci.Descriptor]:
        for item in items:
            if item.digest in seen or item.is_attestation:
                continue
            seen.add(item.digest)
            if len(seen) > _MOST or depth > _DEEPEST:
                raise BadLayer(f"{layout.name}: the image's index is too large or nested too deeply")
            if item.is_index:
                yield from walk(oci.parse_index(layout.read(item, "the index"), f"the index {item.digest}"), depth + 1)
            else:
                yield item

    return list(walk(items, 0))


def _load(layout: Layout, items: Sequence[oci.Descriptor], wanted: Platform | None) -> SourceImage:
    manifests = _manifests(layout, items)
    if len(manifests) == 1 and wanted is None and manifests[0].platform is None:
        return _read(layout, manifests[0])  # as skopeo and umoci write it: there is nothing to choose
    there = [item.platform or _read(layout, item).parsed.platform for item in manifests]
    chosen = platforms.nearest(there, wanted or platforms.host())
    listing = ", ".join(sorted({str(item) for item in there})) or "nothing"
    if chosen is None:
        raise InvalidArgument(f"{layout.name} has no image for {wanted or platforms.host()}; there is {listing}")
    if len(items) > 1 and there.count(there[chosen]) > 1:
        raise InvalidArgument(f"{layout.name} has several images for {there[chosen]} that no names tell apart")
    return _read(layout, manifests[chosen])


def _read(layout: Layout, item: oci.Descriptor) -> SourceImage:
    manifest = layout.read(item, "the manifest")
    parsed = oci.parse_manifest(manifest, f"{layout.name}: the manifest {item.digest}")
    config = layout.read(parsed.config, "the configuration")
    return SourceImage(
        manifest,
        config,
        oci.parse_config(config, f"{layout.name}: the configuration {parsed.config.digest}"),
        parsed.layers,
        layout.open,
    )
