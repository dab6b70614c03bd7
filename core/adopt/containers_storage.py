"""The store of podman, buildah and CRI-O (containers/storage), on its drivers overlay and vfs.

``DRIVER-images/images.json`` lists the images, and ``DRIVER-images/ID/`` has their documents.
``DRIVER-layers/layers.json`` lists the layers with their parents, and ``DRIVER-layers/ID.tar-split.gz`` has the rest of
their archives. The files are in ``overlay/ID/diff`` or ``vfs/dir/ID``.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from layerfs import digest, oci, platforms
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
    images = _listed(files, f"{driver}-images", "images.json")
    loaders = {manifest: partial(_load, files, driver, image, layers) for image in images for manifest in _own(image)}
    found = []
    for image in images:
        load: Callable[[Platform | None], SourceImage] = partial(_load, files, driver, image, layers)
        if (index := _index(files, driver, image)) is not None:
            there = [(item.platform, loaders[item.digest]) for item in index if item.digest in loaders]
            if not there:  # a list of images that are elsewhere
                continue
            load = partial(_load_nearest, there, f"the list of images {image['id']}")
        names = [str(name) for name in image.get("names") or () if "@" not in str(name)]
        found.append(Candidate(tuple(names or [image["id"]]), load))
    return found


def _own(image: Mapping[str, Any]) -> set[str]:
    """The digests by which an image that has layers is listed."""
    documents = image.get("big-data-digests") or {}
    return {str(image.get("digest")), str(documents.get("manifest"))} if image.get("layer") else set()


def _index(files: Files, driver: str, image: Mapping[str, Any]) -> list[oci.Descriptor] | None:
    """The images that a list (``podman manifest create``) has; None for what is an image itself. Raises `BadLayer`."""
    if image.get("layer"):
        return None
    data = _document(files, driver, image["id"], "manifest")
    what = f"the list of images {image['id']}"
    if "manifests" not in oci.parse_json(data, what):
        return None
    return [item for item in oci.parse_index(data, what) if not item.is_attestation]


def _load_nearest(
    there: Sequence[tuple[Platform | None, Callable[[Platform | None], SourceImage]]],
    what: str,
    wanted: Platform | None,
) -> SourceImage:
    if len(there) == 1:  # there is nothing to choose
        return there[0][1](wanted)
    found = [platform or load(None).parsed.platform for platform, load in there]
    chosen = platforms.nearest(found, wanted or platforms.host())
    if chosen is None:
        listing = ", ".join(sorted(map(str, found)))
        raise InvalidArgument(f"{what} has no image here for {wanted or platforms.host()}; there is {listing}")
    return there[chosen][1](wanted)


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
