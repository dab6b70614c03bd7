"""The images in the tars that ``docker save`` writes, and others who write the same (skopeo, podman, buildah).

``manifest.json`` lists them: the configuration, the names and the layers by their paths in the tar. Those are
``ID/layer.tar`` (a link where two images share a layer), ``DIFFID.tar`` (skopeo) or ``blobs/sha256/…`` (Docker 25),
mostly without compression. Such a tar has no OCI manifest, so one is made that says the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from layerfs import digest, oci
from layerfs.archive import Archive
from layerfs.compression import detect
from layerfs.errors import BadLayer, InvalidArgument
from layerfs.platforms import Platform
from layerfs.sourceimage import Candidate, SourceImage

MANIFEST: Final = "manifest.json"
_CONFIG_NAME: Final = re.compile(r"(?:.*/)?([0-9a-f]{64})(?:\.json)?")


def is_docker_archive(archive: Archive) -> bool:
    """Whether the archive is of this kind. Raises `BadLayer` for the form without a manifest, from before 2016."""
    if MANIFEST in archive:
        return True
    if "repositories" in archive:
        raise BadLayer("the archive is of the form that Docker wrote before version 1.10, without manifest.json")
    return False


def find(archive: Archive, name: str) -> list[Candidate]:
    """Every image of the archive; ``name`` is the archive's, for error texts. Raises `BadLayer`."""
    what = f"{name}: {MANIFEST}"
    with archive.open(MANIFEST) as file:
        images = oci.parse_json_list(file.read(oci.LONGEST + 1), what)
    return [_candidate(archive, image, what) for image in images]


def _candidate(archive: Archive, image: object, what: str) -> Candidate:
    if not isinstance(image, dict):
        raise BadLayer(f"{what}: an image has to be an object")
    config = oci.text_of(image, "Config", what)
    names = _strings(image, "RepoTags", what)
    return Candidate(tuple(names), partial(_load, archive, config, _strings(image, "Layers", what), what))


def _strings(image: dict[str, Any], key: str, what: str) -> list[str]:
    items = oci.list_of(image, key, what, optional=True)
    if not all(isinstance(item, str) for item in items):
        raise BadLayer(f"{what}: {key!r} has to be a list of strings")
    return items


def _load(
    archive: Archive, config_name: str, layer_names: Sequence[str], what: str, wanted: Platform | None
) -> SourceImage:
    with archive.open(config_name) as file:
        config = file.read(oci.LONGEST + 1)
    config_digest = digest.of(config)
    if (match := _CONFIG_NAME.fullmatch(config_name)) and match[1] != digest.encoded(config_digest):
        raise BadLayer(f"{what}: the configuration {config_name} is damaged: its digest is {config_digest}")
    parsed = oci.parse_config(config, f"{what}: the configuration {config_name[:100]}")
    if wanted is not None and parsed.platform.distance(wanted) is None:
        raise InvalidArgument(f"{what} has no image for {wanted}; there is {parsed.platform}")
    if len(parsed.diff_ids) != len(layer_names):
        raise BadLayer(f"{what}: {len(layer_names)} layers, but the configuration has {len(parsed.diff_ids)} diff IDs")
    layers = tuple(_describe(archive, *pair) for pair in zip(layer_names, parsed.diff_ids, strict=True))
    names = {layer.digest: name for layer, name in zip(layers, layer_names, strict=True)}
    manifest = oci.make_manifest(oci.Descriptor(oci.CONFIG, config_digest, len(config)), layers, {})
    return SourceImage(manifest, config, parsed, layers, lambda layer: archive.open(names[layer.digest]))


def _describe(archive: Archive, name: str, diff_id: str) -> oci.Descriptor:
    """The descriptor of a layer. A plain one is believed to be what the configuration says; unpacking proves it."""
    with archive.open(name) as file:
        compression = detect(file.peek(16)[:16])
        found = diff_id
        if compression != "none":
            found = f"{digest.ALGORITHM}:{hashlib.file_digest(file, digest.ALGORITHM).hexdigest()}"
    return oci.Descriptor(oci.LAYER_TYPES[compression], found, archive.size(name) or 0)
