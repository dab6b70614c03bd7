"""OCI layouts: reading hostile and odd ones, choosing platforms, and writing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerfs import digest, layout, oci, platforms, sources
from layerfs.errors import BadLayer, FailedPrecondition, InvalidArgument, LayerfsError, NotFound
from layerfs.platforms import Platform
from layerfs.sourceimage import SourceImage
from layerfs.testing.images import OCI, MadeImage, MadeLayout, descriptor, sha256, tar_of, to_json

BASE = tar_of({"etc": None, "etc/a": b"one"})
TOP = tar_of({"etc/b": b"two"})


def load(path: Path, *, platform: Platform | None = None, position: int = 0) -> SourceImage:
    with sources.opened(path, path.parent) as candidates:
        return candidates[position].load(platform)


def refusal(path: Path, kind: type[LayerfsError] = BadLayer) -> str:
    with pytest.raises(kind) as caught:
        load(path)
    return str(caught.value)


@pytest.fixture
def made(tmp_path: Path) -> MadeLayout:
    return MadeLayout(tmp_path / "layout")


# -- digests -------------------------------------------------------------------------------------------------------


def test_chain_ids_are_those_of_the_spec() -> None:
    a, b, c = (sha256(text) for text in (b"a", b"b", b"c"))
    ab = sha256(f"{a} {b}".encode())
    assert digest.chain_ids([a, b, c]) == [a, ab, sha256(f"{ab} {c}".encode())]
    assert digest.chain_ids([]) == []


@pytest.mark.parametrize(
    "text",
    [
        "sha256:" + "0" * 63,
        "sha256:" + "A" * 64,
        "sha256:" + "0" * 64 + "\n",
        "sha256:../../../../etc/passwd",
        "sha256:" + "../" * 20 + "0000",
        "sha512:" + "0" * 128,
        "0" * 64,
        "",
        None,
        7,
        ["sha256:" + "0" * 64],
    ],
)
def test_what_is_no_digest_is_refused(text: object) -> None:
    with pytest.raises(BadLayer, match="the layer"):
        digest.checked(text, "the layer")


# -- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "tar", "tar.gz", "tar.zst"])
def test_an_image_is_read_from_every_form(made: MadeLayout, tmp_path: Path, form: str) -> None:
    image = MadeImage([BASE, TOP], ["gzip", "zstd"])
    made.add(image, "v1")
    path = made.path
    if form != "folder":
        path = made.to_tar(tmp_path / "image.tar")
    if form == "tar.gz":
        subprocess.run(["gzip", str(path)], check=True)
        path = tmp_path / "image.tar.gz"
    elif form == "tar.zst":
        import zstandard

        path = tmp_path / "image.tar.zst"
        path.write_bytes(zstandard.compress((tmp_path / "image.tar").read_bytes()))
    with sources.opened(path, tmp_path) as candidates:
        assert [candidate.names for candidate in candidates] == [("v1",)]
        found = candidates[0].load(None)
        assert found.parsed.diff_ids == (sha256(BASE), sha256(TOP))
        assert found.parsed.platform == Platform("linux", "amd64")
        blobs = []
        for layer in found.layers:
            with found.open(layer) as file:
                blobs.append(file.read())
    assert blobs == image.blobs
    assert json.loads(found.config) == image.config
    assert not [name for name in os.listdir(tmp_path) if name.startswith("tmp")]


def test_names_with_dots_in_front_and_slashes_are_found_in_a_tar(made: MadeLayout, tmp_path: Path) -> None:
    made.add(MadeImage([BASE]), "v1")
    path = tmp_path / "image.tar"
    subprocess.run(["tar", "-C", str(made.path), "-cf", str(path), "."], check=True)
    assert load(path).parsed.diff_ids == (sha256(BASE),)


def test_the_full_name_goes_before_the_tag(made: MadeLayout) -> None:
    entry = made.put(MadeImage([BASE]))
    entry["annotations"] = {
        "org.opencontainers.image.ref.name": "v1",
        "io.containerd.image.name": "example.com/app:v1",
    }
    made.entries.append(entry)
    made.write_index()
    with sources.opened(made.path, made.path) as candidates:
        assert candidates[0].names == ("example.com/app:v1",)


def test_docker_media_types_are_read(made: MadeLayout) -> None:
    image = MadeImage([BASE])
    docker = "application/vnd.docker"
    manifest = image.manifest | {"mediaType": f"{docker}.distribution.manifest.v2+json"}
    manifest["config"]["mediaType"] = f"{docker}.container.image.v1+json"
    manifest["layers"][0]["mediaType"] = f"{docker}.image.rootfs.diff.tar.gzip"
    made.put(image)
    made.entries.append(made.document(f"{docker}.distribution.manifest.v2+json", manifest))
    made.write_index()
    assert load(made.path).parsed.diff_ids == (sha256(BASE),)


def test_an_image_may_have_no_layers_and_no_history(made: MadeLayout) -> None:
    image = MadeImage([])
    image.config["rootfs"]["diff_ids"] = None  # Go's empty list
    del image.config["history"]
    made.add(image)
    assert load(made.path).layers == ()


# -- hostile documents ---------------------------------------------------------------------------------------------


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Put the last of ``path`` where the others lead."""

    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for key in path[:-2]:
            place = place[key]
        place[path[-2]] = path[-1]

    return change


HOSTILE_MANIFESTS = {
    "schema 1": (_set("schemaVersion", 1), "schema version"),
    "no schema": (_set("schemaVersion", None), "schema version"),
    "index and manifest": (_set("manifests", []), "at once"),
    "another type": (_set("mediaType", f"{OCI}.index.v1+json"), "of the type"),
    "type no string": (_set("mediaType", 5), "has to be a string"),
    "layers no list": (_set("layers", {"0": 1}), "has to be a list"),
    "layer no object": (_set("layers", 0, "x"), "has to be an object"),
    "layer digest climbs": (_set("layers", 0, "digest", "sha256:../../../etc/passwd"), "malformed digest"),
    "layer digest is a list": (_set("layers", 0, "digest", []), "malformed digest"),
    "sha512": (_set("layers", 0, "digest", "sha512:" + "0" * 128), "only sha256"),
    "size negative": (_set("layers", 0, "size", -1), "size"),
    "size float": (_set("layers", 0, "size", 1.5), "size"),
    "size bool": (_set("layers", 0, "size", True), "size"),
    "size huge": (_set("layers", 0, "size", 1 << 64), "size"),
    "size absent": (_set("layers", 0, "size", None), "size"),
    "foreign": (
        _set("layers", 0, "mediaType", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
        "foreign",
    ),
    "nondistributable": (_set("layers", 0, "mediaType", f"{OCI}.layer.nondistributable.v1.tar+gzip"), "foreign"),
    "unknown layer type": (_set("layers", 0, "mediaType", "text/plain"), "unknown type"),
    "encrypted": (_set("layers", 0, "mediaType", f"{OCI}.layer.v1.tar+gzip+encrypted"), "unknown type"),
    "artifact": (_set("config", "mediaType", "application/vnd.oci.empty.v1+json"), "no container image"),
    "config no object": (_set("config", "x"), "has to be an object"),
    "config digest climbs": (_set("config", "digest", "sha256:" + "../" * 30), "malformed digest"),
    "config missing": (_set("config", "digest", "sha256:" + "0" * 64), "lacks the blob"),
    "config size lies": (_set("config", "size", 3), "are declared"),
    "config size too long": (_set("config", "size", 5 << 20), "longer than"),
    "one layer less": (_set("layers", []), "0 layers"),
    "annotations": (_set("annotations", {"a": 1}), "annotation has to be a string"),
}


@pytest.mark.parametrize("case", HOSTILE_MANIFESTS)
def test_a_hostile_manifest_is_refused_with_its_reason(made: MadeLayout, case: str) -> None:
    change, reason = HOSTILE_MANIFESTS[case]
    image = MadeImage([BASE])
    made.put(image)
    manifest = image.manifest
    change(manifest)
    made.entries.append(made.document(f"{OCI}.manifest.v1+json", manifest))
    made.write_index()
    assert reason in refusal(made.path)


HOSTILE_CONFIGS = {
    "no rootfs": (_set("rootfs", None), "rootfs"),
    "rootfs type": (_set("rootfs", "type", "snapshots"), "rootfs"),
    "diff ids no list": (_set("rootfs", "diff_ids", "sha256:"), "has to be a list"),
    "diff id malformed": (_set("rootfs", "diff_ids", ["../../x"]), "malformed digest"),
    "one diff id more": (_set("rootfs", "diff_ids", [sha256(b"a"), sha256(b"b")]), "2 diff IDs"),
    "os no string": (_set("os", {}), "has to be a string"),
    "history": (_set("history", ["x"]), "history"),
}


@pytest.mark.parametrize("case", HOSTILE_CONFIGS)
def test_a_hostile_configuration_is_refused_with_its_reason(made: MadeLayout, case: str) -> None:
    change, reason = HOSTILE_CONFIGS[case]
    image = MadeImage([BASE])
    change(image.config)
    made.add(image)
    assert reason in refusal(made.path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no valid JSON"),
        (b"\xff\xfe", "no valid JSON"),
        (b"[]", "no JSON object"),
        (b'{"schemaVersion": NaN}', "no valid JSON"),
        (b'{"schemaVersion": ' + b"9" * 10_000 + b"}", "no valid JSON"),
        (b'{"schemaVersion": 2, "manifests": [{"digest": "\\ud800"}]}', "no valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b" " * (oci.LONGEST + 1), "longer than"),
        (b'{"schemaVersion": 2, "manifests": null}', "has to be a list"),
        (b'{"schemaVersion": 2, "manifests": [null]}', "has to be an object"),
        (b'{"schemaVersion": 2, "manifests": [{"digest": "sha256:../x", "size": 1}]}', "malformed digest"),
        (b'{"schemaVersion": 2, "manifests": [], "layers": []}', "at once"),
    ],
)
def test_a_hostile_index_is_refused_with_its_reason(made: MadeLayout, data: bytes, reason: str) -> None:
    (made.path / "index.json").write_bytes(data)
    assert reason in refusal(made.path)


@pytest.mark.parametrize("marker", [b'{"imageLayoutVersion":"2.0.0"}', b"{}", b"", b'{"imageLayoutVersion":1}'])
def test_a_layout_of_another_version_is_refused(made: MadeLayout, marker: bytes) -> None:
    made.add(MadeImage([BASE]))
    (made.path / "oci-layout").write_bytes(marker)
    assert "oci-layout" in refusal(made.path) or "version" in refusal(made.path)


def test_a_damaged_manifest_or_configuration_is_refused(made: MadeLayout) -> None:
    image = MadeImage([BASE])
    entry = made.add(image)
    config = made.path / "blobs/sha256" / sha256(to_json(image.config))[7:]
    config.write_bytes(config.read_bytes().replace(b"amd64", b"arm64"))
    assert "damaged" in refusal(made.path)
    manifest = made.path / "blobs/sha256" / entry["digest"][7:]
    manifest.write_bytes(manifest.read_bytes().replace(b"gzip", b"zstd"))
    assert "damaged" in refusal(made.path)


def test_a_fifo_or_directory_for_a_file_is_refused_at_once(made: MadeLayout) -> None:
    entry = made.add(MadeImage([BASE]))
    blob = made.path / "blobs/sha256" / entry["digest"][7:]
    blob.unlink()
    os.mkfifo(blob)
    assert "bytes" in refusal(made.path)
    (made.path / "index.json").unlink()
    os.mkfifo(made.path / "index.json")
    assert "no regular file" in refusal(made.path)


def test_a_layer_that_is_longer_shorter_or_changed_is_refused_while_it_is_read(tmp_path: Path) -> None:
    def read(data: bytes, size: int) -> None:
        path = tmp_path / "blob"
        path.write_bytes(data)
        digest.VerifyingReader(path.open("rb"), sha256(b"right"), size, "the layer").readall()

    read(b"right", 5)
    with pytest.raises(BadLayer, match="longer"):
        read(b"right!", 5)
    with pytest.raises(BadLayer, match="has 3 bytes"):
        read(b"rig", 5)
    with pytest.raises(BadLayer, match="damaged"):
        read(b"wrong", 5)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "no OCI layout" in refusal(tmp_path / "folder")
    (tmp_path / "text").write_bytes(b"hello" * 1000)
    assert "cannot be read" in refusal(tmp_path / "text")
    (tmp_path / "empty").write_bytes(b"")
    assert "cannot be read" in refusal(tmp_path / "empty")
    (tmp_path / "rootfs.tar").write_bytes(BASE)
    assert "no image" in refusal(tmp_path / "rootfs.tar")
    (tmp_path / "bomb.gz").write_bytes(b"\x1f\x8b\x08\x00garbage")
    assert "cannot be read" in refusal(tmp_path / "bomb.gz")
    os.mkfifo(tmp_path / "fifo")
    assert "regular file" in refusal(tmp_path / "fifo", InvalidArgument)
    refusal(tmp_path / "nothing", NotFound)


def test_a_cut_off_tar_is_refused(made: MadeLayout, tmp_path: Path) -> None:
    made.add(MadeImage([os.urandom(1 << 16)], ["none"]))
    path = made.to_tar(tmp_path / "image.tar")
    data = path.read_bytes()
    for length in range(0, len(data) - 10240, 7001):
        path.write_bytes(data[:length])
        assert str(path) in refusal(path)


def test_a_link_in_a_tar_never_leads_to_a_file_of_the_host(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(to_json({"schemaVersion": 2, "manifests": []}))
    path = tmp_path / "image.tar"
    path.write_bytes(
        tar_of({"oci-layout": b'{"imageLayoutVersion":"1.0.0"}'}, links={"index.json": str(secret), "blobs": "/"})
    )
    assert "no image" in refusal(path)


# -- platforms -----------------------------------------------------------------------------------------------------

SEVERAL = [("amd64", ""), ("arm64", "v8"), ("arm", "v6"), ("arm", "v7"), ("s390x", "")]


def _platforms(made: MadeLayout) -> list[dict[str, Any]]:
    entries = []
    for architecture, variant in SEVERAL:
        image = MadeImage([tar_of({"arch": f"{architecture}{variant}".encode()})], platform=("linux", architecture))
        platform = {"os": "linux", "architecture": architecture} | ({"variant": variant} if variant else {})
        entries.append(made.put(image, platform=platform))
    attestation = made.put(
        MadeImage([b""]),
        platform={"os": "unknown", "architecture": "unknown"},
        annotations={"vnd.docker.reference.type": "attestation-manifest"},
    )
    return [*entries, attestation]


@pytest.mark.parametrize("nested", [0, 1, 3])
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("linux/amd64", "amd64"),
        ("linux/arm64", "arm64v8"),
        ("linux/arm64/v8", "arm64v8"),
        ("linux/arm", "armv7"),
        ("linux/arm/v6", "armv6"),
        ("linux/s390x", "s390x"),
    ],
)
def test_the_platform_is_chosen_from_an_index(made: MadeLayout, nested: int, wanted: str, expected: str) -> None:
    entries = _platforms(made)
    for _ in range(nested):
        index = {"schemaVersion": 2, "mediaType": f"{OCI}.index.v1+json", "manifests": entries}
        entries = [made.document(f"{OCI}.index.v1+json", index)]
    made.entries = entries
    made.write_index()
    found = load(made.path, platform=platforms.parse(wanted))
    assert found.parsed.diff_ids == (sha256(tar_of({"arch": expected.encode()})),)


def test_a_missing_platform_is_an_error_that_lists_what_is_there(made: MadeLayout) -> None:
    made.entries = _platforms(made)
    made.write_index()
    with pytest.raises(InvalidArgument) as caught:
        load(made.path, platform=platforms.parse("linux/riscv64"))
    assert "linux/riscv64" in str(caught.value)
    assert "linux/amd64, linux/arm/v6, linux/arm/v7, linux/arm64/v8, linux/s390x" in str(caught.value)
    assert "unknown" not in str(caught.value)


def test_other_platforms_need_not_be_there(made: MadeLayout) -> None:
    """As Docker saves one platform of an index whose other images it does not have."""
    made.entries = _platforms(made)
    made.write_index()
    for entry in made.entries[1:]:
        (made.path / "blobs/sha256" / entry["digest"][7:]).unlink()
    assert load(made.path, platform=platforms.parse("linux/amd64")).parsed.platform.architecture == "amd64"
    with pytest.raises(BadLayer, match="lacks the blob"):
        load(made.path, platform=platforms.parse("linux/s390x"))


def test_a_lone_image_is_taken_whatever_it_runs_on_unless_a_platform_is_asked_for(made: MadeLayout) -> None:
    made.add(MadeImage([BASE], platform=("linux", "s390x")))
    assert load(made.path).parsed.platform == Platform("linux", "s390x")
    with pytest.raises(InvalidArgument, match="linux/s390x"):
        load(made.path, platform=platforms.parse("linux/amd64"))


def test_the_host_s_platform_is_found() -> None:
    assert platforms.host().distance(platforms.host()) == 0
    machine = os.uname().machine
    assert machine != "x86_64" or platforms.host() == Platform("linux", "amd64")


@pytest.mark.parametrize(
    "text", ["", "linux", "linux/", "/amd64", "linux/amd64/", "linux/arm/v7/x", "Linux/AMD64", "a/b\n"]
)
def test_a_platform_is_checked(text: str) -> None:
    with pytest.raises(InvalidArgument, match="platform"):
        platforms.parse(text)


def test_older_variants_of_arm_run_and_newer_ones_do_not() -> None:
    v7 = Platform("linux", "arm", "v7")
    assert Platform("linux", "arm", "v5").distance(v7) == 2
    assert Platform("linux", "arm", "v8").distance(v7) is None
    assert Platform("linux", "amd64", "v3").distance(Platform("linux", "amd64")) is None
    assert Platform("windows", "amd64").distance(Platform("linux", "amd64")) is None


def test_an_index_that_unfolds_without_end_is_refused(made: MadeLayout) -> None:
    leaf = made.put(MadeImage([BASE]), platform={"os": "linux", "architecture": "amd64"})
    entries = [leaf]
    for depth in range(12):
        index = {"schemaVersion": 2, "manifests": entries * 50, "annotations": {"depth": str(depth)}}
        entries = [made.document(f"{OCI}.index.v1+json", index)]
    made.entries = entries
    made.write_index()
    assert "nested too deeply" in refusal(made.path)


def test_several_unnamed_images_cannot_be_told_apart(made: MadeLayout) -> None:
    made.add(MadeImage([BASE]))
    made.add(MadeImage([TOP]))
    assert "no names tell apart" in refusal(made.path, InvalidArgument)


def test_an_unnamed_entry_for_a_named_image_is_no_image_of_its_own(made: MadeLayout) -> None:
    made.add(MadeImage([BASE]))
    made.add(MadeImage([BASE]), "v1")
    with sources.opened(made.path, made.path) as candidates:
        assert [candidate.names for candidate in candidates] == [("v1",)]


# -- writing -------------------------------------------------------------------------------------------------------


def write(target: Path, name: str = "v1", diff: bytes = BASE) -> oci.Descriptor:
    image = MadeImage([diff], ["none"])
    with layout.writer(target) as out:
        config = out.add_bytes(oci.CONFIG, to_json(image.config))
        layer = out.add(oci.LAYER, lambda file: [file.write(diff[at : at + 100]) for at in range(0, len(diff), 100)])
        manifest = out.add_bytes(oci.MANIFEST, oci.make_manifest(config, [layer], {}))
        manifest = oci.Descriptor(oci.MANIFEST, manifest.digest, manifest.size, annotations={oci.REF_NAME: name})
        out.finish(manifest)
    return manifest


@pytest.mark.parametrize("target", ["layout", "layout.tar"])
def test_what_is_written_can_be_read_and_is_the_same_each_time(tmp_path: Path, target: str) -> None:
    path = tmp_path / target
    write(path)
    with sources.opened(path, tmp_path) as candidates:
        assert candidates[0].names == ("v1",)
        found = candidates[0].load(None)
        with found.open(found.layers[0]) as file:
            assert file.read() == BASE
    first = contents(path)
    write(path)
    assert contents(path) == first
    assert sorted(os.listdir(tmp_path)) == [target]


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(item.relative_to(path)): item.read_bytes() for item in path.rglob("*") if item.is_file()}


def test_a_written_tar_is_one_for_other_tools(tmp_path: Path) -> None:
    write(tmp_path / "image.tar")
    with tarfile.open(tmp_path / "image.tar") as tar:
        for member in tar:
            if member.name.startswith("blobs/"):
                file = tar.extractfile(member)
                assert file is not None
                assert member.name == f"blobs/sha256/{hashlib.sha256(file.read()).hexdigest()}"
        assert tar.getnames()[-1] == "index.json"
    assert (tmp_path / "image.tar").stat().st_size % 512 == 0


def test_a_folder_takes_more_images_and_replaces_one_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "layout"
    write(path, "a")
    index = json.loads((path / "index.json").read_bytes())
    index["annotations"] = {"kept": "yes"}
    (path / "index.json").write_bytes(to_json(index))
    write(path, "b", TOP)
    last = write(path, "a", tar_of({"new": b""}))
    index = json.loads((path / "index.json").read_bytes())
    assert index["annotations"] == {"kept": "yes"}
    assert [item["annotations"][oci.REF_NAME] for item in index["manifests"]] == ["b", "a"]
    assert index["manifests"][1]["digest"] == last.digest


@pytest.mark.parametrize("target", ["layout", "layout.tar"])
def test_a_failed_write_leaves_the_target_as_it_was(tmp_path: Path, target: str) -> None:
    path = tmp_path / target
    write(path)
    before = contents(path)

    def fail(file: Any) -> None:
        file.write(b"half")
        raise BadLayer("stop")

    with pytest.raises(BadLayer, match="stop"), layout.writer(path) as out:
        out.add(oci.LAYER, fail)
    assert contents(path) == before
    assert os.listdir(tmp_path) == [target]


def test_a_failed_write_into_a_new_folder_can_be_done_again(tmp_path: Path) -> None:
    with layout.writer(tmp_path / "layout"):
        pass
    write(tmp_path / "layout")
    assert load(tmp_path / "layout").layers


def test_a_target_that_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/precious").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"precious")
    for name in ("folder", "file"):
        with pytest.raises(FailedPrecondition, match=name):
            layout.writer(tmp_path / name)
    with pytest.raises(InvalidArgument, match=r"\.tar"):
        layout.writer(tmp_path / "image.tar.gz")
    with pytest.raises(LayerfsError, match="missing"):
        layout.writer(tmp_path / "missing" / "image.tar")
    assert os.listdir(tmp_path / "folder") == ["precious"]
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_two_writers_into_one_folder_both_show_their_image(tmp_path: Path) -> None:
    """Processes, so that the lock has to hold."""
    path = tmp_path / "layout"
    write(path, "first")
    children = []
    for number in range(8):
        child = os.fork()
        if not child:
            status = 1
            try:
                write(path, f"image-{number}", tar_of({f"{number}": b""}))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    index = json.loads((path / "index.json").read_bytes())
    assert len(index["manifests"]) == 9


# -- other tools ---------------------------------------------------------------------------------------------------

TOOLS = pytest.mark.skipif(
    not (shutil.which("skopeo") and shutil.which("umoci")),
    reason="skopeo or umoci is missing: apt-get install skopeo umoci",
)


@TOOLS
@pytest.mark.parametrize("form", ["oci", "oci-archive"])
def test_what_skopeo_and_umoci_write_is_read(tmp_path: Path, form: str) -> None:
    run("umoci", "init", "--layout", tmp_path / "made")
    run("umoci", "new", "--image", f"{tmp_path}/made:v1")
    (tmp_path / "file").write_bytes(b"content")
    run("umoci", "insert", "--rootless", "--image", f"{tmp_path}/made:v1", tmp_path / "file", "/file")
    path = tmp_path / "copy"
    run("skopeo", "copy", f"oci:{tmp_path}/made:v1", f"{form}:{path}:v1")
    with sources.opened(path, tmp_path) as candidates:
        assert [candidate.names for candidate in candidates] == [("v1",)]
        assert len(candidates[0].load(None).layers) == 1
    assert load(tmp_path / "made").parsed == load(path).parsed


@TOOLS
def test_skopeo_and_umoci_accept_what_is_written(tmp_path: Path) -> None:
    manifest = write(tmp_path / "layout")
    write(tmp_path / "image.tar")
    for reference in (f"oci:{tmp_path}/layout:v1", f"oci-archive:{tmp_path}/image.tar:v1"):
        told = json.loads(run("skopeo", "inspect", reference))
        assert told["Digest"] == manifest.digest
        assert told["Architecture"] == "amd64"
    assert sha256(BASE) in run("umoci", "stat", "--json", "--image", f"{tmp_path}/layout:v1")


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def test_the_descriptor_helper_of_these_tests_agrees_with_the_module() -> None:
    data = b"x"
    made = descriptor(oci.LAYER, data, platform={"os": "linux", "architecture": "arm", "variant": "v7"})
    index = oci.parse_index(to_json({"schemaVersion": 2, "manifests": [made]}), "the index")
    assert index[0].document() == made
