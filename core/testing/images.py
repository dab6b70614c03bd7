"""Small images made by hand, in every form that a store can import; for tests."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

OCI = "application/vnd.oci.image"

Members = Mapping[str, bytes | None]
"""Names and contents of a layer's files; None makes a directory."""


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def to_json(document: object) -> bytes:
    return json.dumps(document).encode()


def tar_of(members: Members, *, links: Mapping[str, str] | None = None) -> bytes:
    """A tar of these files; ``links`` are symbolic."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.mtime = 1_700_000_000
            if content is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return out.getvalue()


def compress(data: bytes, kind: str) -> bytes:
    """``data`` as gzip, zstd or (``none``) as it is."""
    if kind == "gzip":
        return gzip.compress(data, mtime=0)
    if kind == "zstd":
        return zstandard.compress(data)
    return data


@dataclass
class MadeImage:
    """An image as bytes. Change a field (or `extra`) before writing it to make a broken one.

    Attributes:
        diffs: the layers' tars, from the bottom up.
        kinds: how each is compressed.
        extra: fields that replace those of the manifest.
    """

    diffs: Sequence[bytes]
    kinds: Sequence[str] = ()
    config: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    platform: tuple[str, str] = ("linux", "amd64")

    def __post_init__(self) -> None:
        self.kinds = self.kinds or ["gzip"] * len(self.diffs)
        self.config = {
            "architecture": self.platform[1],
            "os": self.platform[0],
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": [sha256(diff) for diff in self.diffs]},
            "history": [{"created_by": f"step {number}"} for number, _ in enumerate(self.diffs)],
        } | self.config

    @property
    def blobs(self) -> list[bytes]:
        return [compress(diff, kind) for diff, kind in zip(self.diffs, self.kinds, strict=True)]

    @property
    def manifest(self) -> dict[str, Any]:
        config = to_json(self.config)
        suffix = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}
        return {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": descriptor(f"{OCI}.config.v1+json", config),
            "layers": [
                descriptor(f"{OCI}.layer.v1.tar{suffix[kind]}", blob)
                for kind, blob in zip(self.kinds, self.blobs, strict=True)
            ],
        } | self.extra


def descriptor(media_type: str, data: bytes, **more: object) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": sha256(data), "size": len(data)} | more


class MadeLayout:
    """An OCI layout folder that tests fill as they like."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_bytes(b'{"imageLayoutVersion":"1.0.0"}')
        self.write_index()

    def write_index(self) -> None:
        (self.path / "index.json").write_bytes(to_json({"schemaVersion": 2, "manifests": self.entries}))

    def blob(self, data: bytes) -> Path:
        path = self.path / "blobs/sha256" / sha256(data)[7:]
        path.write_bytes(data)
        return path

    def document(self, media_type: str, document: object, **more: object) -> dict[str, Any]:
        """Write a document as a blob; its descriptor."""
        data = to_json(document)
        self.blob(data)
        return descriptor(media_type, data, **more)

    def put(self, image: MadeImage, **more: object) -> dict[str, Any]:
        """Write an image's blobs; the descriptor of its manifest, with ``more`` in it."""
        for blob in image.blobs:
            self.blob(blob)
        self.blob(to_json(image.config))
        return self.document(f"{OCI}.manifest.v1+json", image.manifest, **more)

    def add(self, image: MadeImage, name: str | None = None, **more: object) -> dict[str, Any]:
        """Write an image and show it in the index."""
        if name is not None:
            more["annotations"] = {"org.opencontainers.image.ref.name": name}
        entry = self.put(image, **more)
        self.entries.append(entry)
        self.write_index()
        return entry

    def to_tar(self, path: Path) -> Path:
        """The layout as a tar."""
        with tarfile.open(path, "w") as tar:
            for item in sorted(self.path.rglob("*")):
                tar.add(item, item.relative_to(self.path).as_posix(), recursive=False)
        return path


def docker_archive(path: Path, images: Mapping[str, MadeImage], *, shared: bool = True) -> Path:
    """A tar as ``docker save`` wrote it before version 25: ``ID/layer.tar``, and a link where a layer is shared."""
    files: dict[str, bytes] = {}
    links: dict[str, str] = {}
    listing = []
    homes: dict[str, str] = {}
    for number, (name, image) in enumerate(images.items()):
        layers = []
        for level, (diff, kind) in enumerate(zip(image.diffs, image.kinds, strict=True)):
            layer = f"{number}{level}".rjust(64, "0") + "/layer.tar"
            diff_id = sha256(diff)
            if shared and diff_id in homes:
                links[layer] = f"../{homes[diff_id]}"
            else:
                files[layer] = compress(diff, kind)
                homes[diff_id] = layer
            layers.append(layer)
        config = to_json(image.config)
        files[f"{sha256(config)[7:]}.json"] = config
        listing.append({"Config": f"{sha256(config)[7:]}.json", "RepoTags": [name] if name else None, "Layers": layers})
    files["manifest.json"] = to_json(listing)
    path.write_bytes(tar_of(files, links=links))
    return path
