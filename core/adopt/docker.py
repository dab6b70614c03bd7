"""Docker's data root with its own image store (not containerd's), on the storage drivers overlay2 and vfs.

``image/DRIVER/repositories.json`` has the names, ``image/DRIVER/imagedb/content/sha256/ID`` the configurations, and
``image/DRIVER/layerdb/sha256/CHAINID/`` for each layer ``cache-id``, by which the driver calls it, and the rest of its
archive. The files are in ``overlay2/CACHEID/diff`` or ``vfs/dir/CACHEID``.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Final

from layerfs import digest, oci
from layerfs.adopt.files import Files
from layerfs.adopt.splitimage import split_image
from layerfs.adopt.tarsplit import Split
from layerfs.errors import BadLayer, InvalidArgument
from layerfs.platforms import Platform
from layerfs.sourceimage import Candidate, SourceImage

_TREES: Final = {"overlay2": ("overlay2", "{}", "diff"), "vfs": ("vfs", "dir", "{}")}
_ID: Final = re.compile("[0-9a-f]{64}")
_CACHE_ID: Final = re.compile("[0-9a-f]{64}(-init)?")


def find(files: Files) -> list[Candidate]:
    """Every image of a data root. One without a name is called by its ID. Raises `BadLayer`, `InvalidArgument`."""
    drivers = [driver for driver in _TREES if files.has("image", driver, "imagedb", "content", "sha256")]
    if not drivers:
        others = [name for name in files.names("image") if name not in _TREES]
        has = f"its driver is {others[0]}; only overlay2 and vfs can be read" if others else "it has no image/overlay2"
        raise InvalidArgument(f"{files.name} is no data root of Docker that can be read: {has}")
    return [candidate for driver in drivers for candidate in _candidates(files, driver)]


def _candidates(files: Files, driver: str) -> list[Candidate]:
    names = _names(files, driver)
    found = []
    for name in files.names("image", driver, "imagedb", "content", "sha256"):
        if _ID.fullmatch(name):  # else what a Docker that was killed has left of its writing
            identity = f"sha256:{name}"
            found.append(Candidate(tuple(names.get(identity, [identity])), partial(_load, files, driver, identity)))
    return found


def _names(files: Files, driver: str) -> dict[str, list[str]]:
    """The names of each image by its ID; references by digest are none that people gave."""
    place = ("image", driver, "repositories.json")
    if not files.has(*place):
        return {}
    what = files.path(*place)
    repositories = oci.parse_json(files.read(*place), what).get("Repositories")
    found: dict[str, list[str]] = {}
    for references in (repositories if isinstance(repositories, dict) else {}).values():
        if not isinstance(references, dict):
            raise BadLayer(f"{what}: a repository has to be an object")
        for name, identity in references.items():
            if "@" not in name:
                found.setdefault(str(identity), []).append(name)
    return found


def _load(files: Files, driver: str, identity: str, wanted: Platform | None) -> SourceImage:
    place = ("image", driver, "imagedb", "content", "sha256", digest.encoded(identity))
    config = files.read(*place, longest=oci.LONGEST)
    if digest.of(config) != identity:
        raise BadLayer(f"{files.path(*place)} is damaged: its digest is {digest.of(config)}")
    what = f"Docker's image {identity}"
    chain = digest.chain_ids(oci.parse_config(config, what).diff_ids)
    return split_image(config, [_layer(files, driver, chain_id) for chain_id in chain], what, wanted)


def _layer(files: Files, driver: str, chain_id: str) -> Split:
    place = ("image", driver, "layerdb", "sha256", digest.encoded(chain_id))
    name = files.text(*place, "cache-id")
    if not _CACHE_ID.fullmatch(name):
        raise BadLayer(f"{files.path(*place, 'cache-id')} names no directory of a layer")
    tree = [part.format(name) for part in _TREES[driver]]
    return Split(
        partial(files.open, *place, "tar-split.json.gz"), partial(files.directory, *tree), f"Docker's layer {chain_id}"
    )
