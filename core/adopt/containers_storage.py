"""The store of podman, buildah and CRI-O (containers/storage), on its drivers overlay and vfs.

``DRIVER-images/images.json`` lists the images, and ``DRIVER-images/ID/`` has their documents.
``DRIVER-layers/layers.json`` lists the layers with their parents, and ``DRIVER-layers/ID.tar-split.gz`` has the rest of
their archives. The files are in ``overlay/ID/diff`` or ``vfs/dir/ID``.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from layerfs import digest, oci
from layerfs.adopt.files import Files
from layerfs.adopt.splitimage import split_image
from layerfs.adopt.tarsplit import Split
from layerfs.errors import BadLayer, InvalidArgument
from layerfs.platforms import Platform
from layerfs.sourceimage import Candidate, SourceImage

_TREES: Final = {"overlay": ("overlay", "{}", "diff"), "vfs": ("vfs", "dir", "{}")}
_NAME: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]*")
_PLAIN_KEY: Final = re.compile("[a-z0-9-]+")
_DEEPEST: Final = 1000

_Layers = Mapping[str, Mapping[str, Any]]


def find(files: Files) -> list[Candidate]:
    """Every image of a store. One without a name is called by its ID. Raises `BadLayer`, `InvalidArgument`."""
    drivers = [driver for driver in _TREES if files.has(f"{driver}-images", "images.json")]
    if not drivers:
        raise InvalidArgument(
            f"{files.name} is no store of podman or buildah that can be read: it has neither overlay-images nor "
            "vfs-images"
        )
    return [candidate for driver in drivers for candidate in _candidates(files, driver)]


def _candidates(files: Files, driver: str) -> list[Candidate]:
    layers = {layer["id"]: layer for layer in _listed(files, f"{driver}-layers", "layers.json")}
    found = []
    for image in _listed(files, f"{driver}-images", "images.json"):
        names = [str(name) for name in image.get("names") or () if "@" not in str(name)]
        found.append(Candidate(tuple(names or [image["id"]]), partial(_load, files, driver, image, layers)))
    return found


def _listed(files: Files, *place: str) -> list[dict[str, Any]]:
    """The objects of a list, each with an ID that can be a file's name. Raises `BadLayer`."""
    if not files.has(*place):
        return []
    items = oci.parse_json_list(files.read(*place), files.path(*place))
    for item in items:
        if not isinstance(item, dict) or not isinstance(item.get("id"), str) or not _NAME.fullmatch(item["id"]):
            raise BadLayer(f"{files.path(*place)}: an entry has no ID")
    return items


def _load(files: Files, driver: str, image: Mapping[str, Any], layers: _Layers, wanted: Platform | None) -> SourceImage:
    what = f"the image {image['id']}"
    manifest = oci.parse_manifest(_document(files, driver, image["id"], "manifest"), f"{what}: the manifest")
    config = _document(files, driver, image["id"], manifest.config.digest)
    if digest.of(config) != manifest.config.digest:
        raise BadLayer(f"{what}: its configuration is damaged: its digest is {digest.of(config)}")
    chain: list[str] = []
    name = image.get("layer") or ""
    while name:
        if name not in layers or len(chain) > _DEEPEST:
            raise BadLayer(f"{what}: its layer {str(name)[:100]!r} is missing from the list of layers")
        chain.append(name)
        name = layers[name].get("parent") or ""
    return split_image(config, [_layer(files, driver, name) for name in reversed(chain)], what, wanted)


def _document(files: Files, driver: str, identity: str, key: str) -> bytes:
    # A key that is no plain word is written in base64.
    name = key if _PLAIN_KEY.fullmatch(key) else "=" + base64.b64encode(key.encode()).decode()
    return files.read(f"{driver}-images", identity, name, longest=oci.LONGEST)


def _layer(files: Files, driver: str, name: str) -> Split:
    tree = [part.format(name) for part in _TREES[driver]]
    return Split(
        partial(files.open, f"{driver}-layers", f"{name}.tar-split.gz"),
        partial(files.directory, *tree),
        f"the layer {name}",
    )
