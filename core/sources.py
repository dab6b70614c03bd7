"""Opens what images are imported from, whatever kind it is: an OCI layout's folder or tar, or a docker archive."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from layerfs import docker_archive, oci_images
from layerfs.archive import Archive
from layerfs.errors import BadLayer, InvalidArgument, NotFound
from layerfs.layout import ArchiveLayout, FolderLayout, is_layout
from layerfs.sourceimage import Candidate

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")


@contextlib.contextmanager
def opened(path: Path, scratch: Path) -> Iterator[list[Candidate]]:
    """The images of a source, readable within the context; ``scratch`` is where a compressed tar is unpacked to.

    Raises `NotFound`, and `BadLayer` where it is nothing that images come in.
    """
    if path.is_dir():
        if not is_layout(lambda name: (path / name).exists()):
            raise BadLayer(f"{path} is no OCI layout: it lacks oci-layout or index.json")
        yield oci_images.find(FolderLayout(path))
    elif path.is_file():
        with Archive(path, scratch) as archive:
            yield _in_archive(archive, str(path))
    elif path.exists():
        raise InvalidArgument(f"{path} is neither a folder nor a regular file; save the image to a file first")
    else:
        raise NotFound(f"{path} does not exist")


def _in_archive(archive: Archive, name: str) -> list[Candidate]:
    if is_layout(archive.__contains__):
        return oci_images.find(ArchiveLayout(archive, name))
    if docker_archive.is_docker_archive(archive):
        return docker_archive.find(archive, name)
    raise BadLayer(f"{name} is no image: it has neither oci-layout and index.json nor manifest.json")


def default_name(path: Path) -> str:
    """What an image without a name is called: as its folder or file, without the ending of a tar."""
    name = os.fsencode(path.resolve().name).decode(errors="replace")
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name or "image"
