"""The documents of an OCI image: index, manifest and configuration, parsed from hostile bytes and made.

After the OCI image spec 1.1 and Docker's "Image Manifest V 2, Schema 2". Nothing of a document is believed before its
type is checked, and every digest in it has passed `layerfs.digest.checked`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from layerfs import digest
from layerfs.errors import BadLayer
from layerfs.platforms import Platform

LONGEST: Final = 4 << 20
"""Bytes of one document: what the distribution spec lets registries limit manifests to."""

INDEX: Final = "application/vnd.oci.image.index.v1+json"
MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
CONFIG: Final = "application/vnd.oci.image.config.v1+json"
LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
LAYER_TYPES: Final = {"none": LAYER, "gzip": f"{LAYER}+gzip", "zstd": f"{LAYER}+zstd"}
"""The media type of a layer by its compression, as `layerfs.compression` names it."""

REF_NAME: Final = "org.opencontainers.image.ref.name"
FULL_NAME: Final = "io.containerd.image.name"
"""The annotation in which Docker and containerd keep an image's whole name, beside the tag in `REF_NAME`."""

_DOCKER: Final = "application/vnd.docker"
_INDEXES: Final = {INDEX, f"{_DOCKER}.distribution.manifest.list.v2+json"}
_MANIFESTS: Final = {MANIFEST, f"{_DOCKER}.distribution.manifest.v2+json"}
_CONFIGS: Final = {CONFIG, f"{_DOCKER}.container.image.v1+json"}
_LAYERS: Final = {
    *LAYER_TYPES.values(),
    f"{_DOCKER}.image.rootfs.diff.tar",
    f"{_DOCKER}.image.rootfs.diff.tar.gzip",
    f"{_DOCKER}.image.rootfs.diff.tar.zstd",
}
_FOREIGN: Final = (
    f"{_DOCKER}.image.rootfs.foreign.diff.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
)
_LARGEST: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a document says of another blob.

    Attributes:
        media_type: one of this module's, or unknown.
        digest: ``sha256:…``, checked.
        size: bytes.
        platform: what an index says that it is for, or None.
        annotations: the author's own facts.
    """

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_index(self) -> bool:
        return self.media_type in _INDEXES

    @property
    def is_attestation(self) -> bool:
        """True for what BuildKit puts beside images to tell how they were made."""
        return "vnd.docker.reference.type" in self.annotations or (
            self.platform is not None and self.platform.os == self.platform.architecture == "unknown"
        )

    def document(self) -> dict[str, Any]:
        """It as JSON, in a canonical form."""
        made: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.platform is not None:
            made["platform"] = {"architecture": self.platform.architecture, "os": self.platform.os}
            if self.platform.variant:
                made["platform"]["variant"] = self.platform.variant
        if self.annotations:
            made["annotations"] = dict(self.annotations)
        return made


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image's list of blobs; ``layers`` from the bottom up."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Config:
    """What matters here of an image's configuration.

    Attributes:
        diff_ids: of its layers, from the bottom up.
        platform: what it runs on.
        document: all of it.
    """

    diff_ids: tuple[str, ...]
    platform: Platform
    document: Mapping[str, Any]


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises `BadLayer`, naming it by ``what``, for anything else, however deep or long."""
    document = _json(data, what)
    if not isinstance(document, dict):
        raise BadLayer(f"{what} is no JSON object")
    return document


def parse_json_list(data: bytes, what: str) -> list[Any]:
    """A JSON list; else as `parse_json`."""
    document = _json(data, what)
    if not isinstance(document, list):
        raise BadLayer(f"{what} is no JSON list")
    return document


def _json(data: bytes, what: str) -> object:
    if len(data) > LONGEST:
        raise BadLayer(f"{what} is longer than {LONGEST} bytes")
    try:
        document: object = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
        dump(document)  # half a surrogate pair can be read but not written
    except RecursionError:
        raise BadLayer(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise BadLayer(f"{what} is no valid JSON: {error}") from error
    return document


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def text_of(document: Mapping[str, Any], key: str, what: str, default: str | None = None) -> str:
    """A string of a document; ``default`` where it is absent or null, None to insist on it."""
    value = document.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise BadLayer(f"{what}: {key!r} has to be a string")
    return value


def list_of(document: Mapping[str, Any], key: str, what: str, *, optional: bool = False) -> list[Any]:
    value = document.get(key)
    if value is None and optional:
        return []
    if not isinstance(value, list):
        raise BadLayer(f"{what}: {key!r} has to be a list")
    return value


def _object_of(document: Mapping[str, Any], key: str, what: str) -> dict[str, Any]:
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadLayer(f"{what}: {key!r} has to be an object")
    return value


def _annotations(document: Mapping[str, Any], what: str) -> dict[str, str]:
    found = _object_of(document, "annotations", what)
    if not all(isinstance(value, str) for value in found.values()):
        raise BadLayer(f"{what}: an annotation has to be a string")
    return found


def _platform(document: Mapping[str, Any], what: str) -> Platform:
    return Platform(*(text_of(document, key, what, "") for key in ("os", "architecture", "variant")))


def _descriptor(document: object, what: str) -> Descriptor:
    if not isinstance(document, dict):
        raise BadLayer(f"{what}: a descriptor has to be an object")
    size = document.get("size")
    if type(size) is not int or not 0 <= size <= _LARGEST:
        raise BadLayer(f"{what}: a descriptor's size has to be a number of bytes, not {repr(size)[:40]}")
    platform = _object_of(document, "platform", what)
    return Descriptor(
        text_of(document, "mediaType", what, ""),
        digest.checked(document.get("digest"), what),
        size,
        _platform(platform, what) if platform else None,
        _annotations(document, what),
    )


def _check_kind(document: Mapping[str, Any], allowed: set[str], what: str) -> None:
    """A document says what it is once, so that no two readers can take it for two things (CVE-2021-41190)."""
    if document.get("schemaVersion") != 2:
        raise BadLayer(f"{what} has the schema version {repr(document.get('schemaVersion'))[:40]}; only 2 is supported")
    kind = text_of(document, "mediaType", what, "")
    if kind and kind not in allowed:
        raise BadLayer(f"{what} says that it is of the type {kind[:100]!r}")
    if "manifests" in document and ("layers" in document or "config" in document):
        raise BadLayer(f"{what} is an index and a manifest at once")


def name_of(annotations: Mapping[str, str]) -> str:
    """The name of an image by its annotations in an index, as whole as they have it; ``""`` if it has none."""
    return annotations.get(FULL_NAME) or annotations.get(REF_NAME) or ""


def parse_index(data: bytes, what: str) -> tuple[Descriptor, ...]:
    """The descriptors of an index (or of Docker's manifest list). Raises `BadLayer`."""
    document = parse_json(data, what)
    _check_kind(document, _INDEXES, what)
    return tuple(_descriptor(item, what) for item in list_of(document, "manifests", what))


def parse_manifest(data: bytes, what: str) -> Manifest:
    """An image's manifest. Raises `BadLayer`, also for what is no image and for layers that are kept elsewhere."""
    document = parse_json(data, what)
    _check_kind(document, _MANIFESTS, what)
    config = _descriptor(document.get("config"), what)
    if config.media_type not in _CONFIGS:
        raise BadLayer(f"{what} is no container image: its configuration is of the type {config.media_type[:100]!r}")
    layers = tuple(_descriptor(item, what) for item in list_of(document, "layers", what, optional=True))
    for layer in layers:
        _check_layer(layer, what)
    return Manifest(config, layers, _annotations(document, what))


def _check_layer(layer: Descriptor, what: str) -> None:
    if layer.media_type.startswith(_FOREIGN):
        raise BadLayer(f"{what}: the layer {layer.digest} is foreign (kept outside the image); it cannot be imported")
    if layer.media_type not in _LAYERS:
        raise BadLayer(f"{what}: the layer {layer.digest} is of the unknown type {layer.media_type[:100]!r}")


def parse_config(data: bytes, what: str) -> Config:
    """An image's configuration. Raises `BadLayer`."""
    document = parse_json(data, what)
    rootfs = _object_of(document, "rootfs", what)
    if rootfs.get("type") != "layers":
        raise BadLayer(f"{what}: its rootfs is not of the type 'layers'")
    # Go writes an empty list as null.
    diff_ids = [digest.checked(item, f"{what}: rootfs") for item in list_of(rootfs, "diff_ids", what, optional=True)]
    history = list_of(document, "history", what, optional=True)
    if not all(isinstance(item, dict) for item in history):
        raise BadLayer(f"{what}: an entry of 'history' has to be an object")
    return Config(tuple(diff_ids), _platform(document, what), document)


def dump(document: object) -> bytes:
    """Canonical JSON: equal documents give equal bytes."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def make_manifest(config: Descriptor, layers: Sequence[Descriptor], annotations: Mapping[str, str]) -> bytes:
    """An image's manifest."""
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config.document(),
        "layers": [layer.document() for layer in layers],
    }
    if annotations:
        document["annotations"] = dict(annotations)
    return dump(document)


def make_index(manifests: Sequence[Descriptor]) -> bytes:
    """An index of images."""
    return dump(
        {"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor.document() for descriptor in manifests]}
    )


def extend_config(base: Mapping[str, Any], diff_ids: Sequence[str], created: Sequence[str]) -> bytes:
    """The configuration ``base`` with more layers on top.

    Args:
        base: of the image below; `minimal_config` where there is none.
        diff_ids: of the new layers, from the bottom up.
        created: when each of them was made, as RFC 3339.
    """
    document = dict(base)
    below = _object_of(base, "rootfs", "the configuration").get("diff_ids") or []
    document["rootfs"] = {"type": "layers", "diff_ids": [*below, *diff_ids]}
    history = base.get("history") or []
    # A history that does not tell of every layer would shift what it says of ours to others.
    if len([entry for entry in history if not entry.get("empty_layer")]) == len(below):
        document["history"] = [*history, *({"created": time, "created_by": "layerfs commit"} for time in created)]
    if created:
        document["created"] = created[-1]
    return dump(document)


def minimal_config(platform: Platform) -> dict[str, Any]:
    """The configuration of an image without layers, for ``platform``."""
    document: dict[str, Any] = {
        "architecture": platform.architecture,
        "os": platform.os,
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": []},
    }
    if platform.variant:
        document["variant"] = platform.variant
    return document
