"""The tars of ``docker save``, old and new, as Docker and skopeo write them, and hostile ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from layerfs import oci, platforms, sources
from layerfs.errors import BadLayer, InvalidArgument
from layerfs.sourceimage import SourceImage
from layerfs.testing.images import MadeImage, docker_archive, sha256, tar_of, to_json

BASE = tar_of({"etc": None, "etc/a": b"one"})
TOP = tar_of({"etc/b": b"two"})


def load(path: Path, position: int = 0) -> tuple[SourceImage, list[bytes]]:
    with sources.opened(path, path.parent) as candidates:
        image = candidates[position].load(None)
        blobs = []
        for layer in image.layers:
            with image.open(layer) as file:
                blobs.append(file.read())
    return image, blobs


def refusal(path: Path) -> str:
    with pytest.raises(BadLayer) as caught:
        load(path)
    return str(caught.value)


def archive(path: Path, listing: Any, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    path.write_bytes(tar_of(files | {"manifest.json": to_json(listing)}, links=links))
    return path


@pytest.mark.parametrize("shared", [True, False])
def test_the_old_form_with_a_shared_layer(tmp_path: Path, shared: bool) -> None:
    one, two = MadeImage([BASE], ["none"]), MadeImage([BASE, TOP], ["none", "none"])
    path = docker_archive(tmp_path / "saved.tar", {"app:v1": one, "app:v2": two}, shared=shared)
    with sources.opened(path, tmp_path) as candidates:
        assert [candidate.names for candidate in candidates] == [("app:v1",), ("app:v2",)]
    image, blobs = load(path, 1)
    assert blobs == [BASE, TOP]
    assert image.parsed.diff_ids == (sha256(BASE), sha256(TOP))
    assert json.loads(image.config) == two.config
    manifest = oci.parse_manifest(image.manifest, "the manifest")
    assert manifest.layers == image.layers
    assert manifest.config.digest == sha256(image.config)
    assert load(path, 1)[0].manifest == image.manifest


def test_the_form_of_docker_25_with_paths_below_blobs(tmp_path: Path) -> None:
    image = MadeImage([BASE, TOP], ["none", "none"])
    config = to_json(image.config)
    names = [f"blobs/sha256/{sha256(data)[7:]}" for data in (config, BASE, TOP)]
    listing = [{"Config": names[0], "RepoTags": ["a:1", "b:2"], "Layers": names[1:], "LayerSources": {}}]
    path = archive(tmp_path / "saved.tar", listing, dict(zip(names, (config, BASE, TOP), strict=True)))
    assert load(path)[1] == [BASE, TOP]
    with sources.opened(path, tmp_path) as candidates:
        assert candidates[0].names == ("a:1", "b:2")


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_compressed_layers_are_described_by_their_own_digest(tmp_path: Path, kind: str) -> None:
    made = MadeImage([BASE], [kind])
    image, blobs = load(docker_archive(tmp_path / "saved.tar", {"": made}))
    assert blobs == made.blobs
    assert image.layers[0] == oci.Descriptor(oci.LAYER_TYPES[kind], sha256(blobs[0]), len(blobs[0]))


def test_a_compressed_archive_without_names(tmp_path: Path) -> None:
    docker_archive(tmp_path / "saved.tar", {"": MadeImage([BASE], ["none"])})
    subprocess.run(["gzip", str(tmp_path / "saved.tar")], check=True)
    path = tmp_path / "saved.tar.gz"
    assert load(path)[1] == [BASE]
    with sources.opened(path, tmp_path) as candidates:
        assert candidates[0].names == ()
    assert sources.default_name(path) == "saved"


def test_a_platform_that_is_asked_for_has_to_be_the_image_s(tmp_path: Path) -> None:
    path = docker_archive(tmp_path / "saved.tar", {"": MadeImage([BASE], ["none"], platform=("linux", "s390x"))})
    with sources.opened(path, tmp_path) as candidates:
        assert candidates[0].load(platforms.parse("linux/s390x"))
        assert candidates[0].load(None)
        with pytest.raises(InvalidArgument, match="linux/s390x"):
            candidates[0].load(platforms.parse("linux/amd64"))


@pytest.mark.parametrize(
    ("listing", "reason"),
    [
        ({}, "no JSON list"),
        (["x"], "has to be an object"),
        ([{"Config": 1}], "has to be a string"),
        ([{"Config": "config", "Layers": "layer"}], "has to be a list"),
        ([{"Config": "config", "Layers": [1]}], "list of strings"),
        ([{"Config": "config", "RepoTags": [None], "Layers": ["layer"]}], "list of strings"),
        ([{"Config": "config", "Layers": []}], "0 layers"),
        ([{"Config": "config", "Layers": ["layer", "layer"]}], "2 layers"),
        ([{"Config": "config", "Layers": ["other"]}], "has no file 'other'"),
        ([{"Config": "config", "Layers": ["folder"]}], "has no file 'folder'"),
        ([{"Config": "config", "Layers": ["../secret"]}], "has no file"),
        ([{"Config": "config", "Layers": ["out"]}], "has no file"),
        ([{"Config": "config", "Layers": ["loop1"]}], "has no file"),
        ([{"Config": "/etc/passwd", "Layers": []}], "has no file"),
        ([{"Config": "layer", "Layers": ["layer"]}], "no valid JSON"),
    ],
)
def test_a_hostile_list_is_refused_with_its_reason(tmp_path: Path, listing: Any, reason: str) -> None:
    (tmp_path / "secret").write_bytes(BASE)
    files: dict[str, Any] = {"config": to_json(MadeImage([BASE]).config), "layer": BASE, "folder": None}
    links = {"out": str(tmp_path / "secret"), "loop1": "loop2", "loop2": "loop1"}
    assert reason in refusal(archive(tmp_path / "saved.tar", listing, files, links))


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b" " * (oci.LONGEST + 1), b'[] , "x": []'])
def test_a_list_that_is_no_json_or_too_long_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "saved.tar"
    path.write_bytes(tar_of({"manifest.json": data}))
    assert "manifest.json" in refusal(path)


def test_a_configuration_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    config = to_json(MadeImage([BASE]).config)
    name = f"{'0' * 64}.json"
    path = archive(tmp_path / "saved.tar", [{"Config": name, "Layers": ["layer"]}], {name: config, "layer": BASE})
    assert "damaged" in refusal(path)


def test_the_form_without_a_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "saved.tar"
    path.write_bytes(tar_of({"repositories": b"{}"}))
    assert "before version 1.10" in refusal(path)


def test_members_lie_where_they_are_said_to_be_in_every_dialect(tmp_path: Path) -> None:
    """Long names and extended headers stand between the members."""
    image = MadeImage([BASE, TOP], ["none", "none"])
    long = "x" * 150 + "/" + "y" * 150
    files = {"config": to_json(image.config), long + "0": BASE, long + "1": TOP, "odd": b"1"}
    listing = to_json([{"Config": "config", "RepoTags": [], "Layers": [long + "0", long + "1"]}])
    for name in ("pax", "gnu"):
        folder = tmp_path / name
        for member, content in (files | {"manifest.json": listing}).items():
            (folder / member).parent.mkdir(parents=True, exist_ok=True)
            (folder / member).write_bytes(content)
        path = tmp_path / f"{name}.tar"
        subprocess.run(["tar", f"--format={name}", "-C", str(folder), "-cf", str(path), "."], check=True)
        assert load(path)[1] == [BASE, TOP]


def test_an_archive_with_too_many_members_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "many.tar"
    header = tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)
    with path.open("wb") as out:
        for number in range(200_001):
            name = f"{number}".encode()
            block = bytearray(header)
            block[: len(name)] = name
            block[148:156] = b" " * 8
            block[148:156] = f"{sum(block):06o}\0 ".encode()
            out.write(block)
        out.write(bytes(1024))
    assert "members" in refusal(path)


@pytest.mark.skipif(
    not (shutil.which("skopeo") and shutil.which("umoci")),
    reason="skopeo or umoci is missing: apt-get install skopeo umoci",
)
def test_what_skopeo_writes_is_read(tmp_path: Path) -> None:
    def run(*command: object) -> None:
        subprocess.run([str(part) for part in command], check=True, capture_output=True)

    made = f"{tmp_path}/made:v1"
    run("umoci", "init", "--layout", tmp_path / "made")
    run("umoci", "new", "--image", made)
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(os.urandom(1000))
        run("umoci", "insert", "--rootless", "--image", made, tmp_path / name, f"/{name}")
    path = tmp_path / "saved.tar"
    run("skopeo", "copy", f"oci:{made}", f"docker-archive:{path}:example.com/app:v1")
    with sources.opened(path, tmp_path) as candidates:
        assert candidates[0].names == ("example.com/app:v1",)
    image, blobs = load(path)
    assert [f"sha256:{hashlib.sha256(blob).hexdigest()}" for blob in blobs] == list(image.parsed.diff_ids)
    assert len(blobs) == 2
