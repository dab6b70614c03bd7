"""Images in and out of real stores, on every driver."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from layerfs import digest, imageexport
from layerfs.backing import Backing
from layerfs.driver import Driver
from layerfs.errors import (
    AlreadyExists,
    BadLayer,
    Damaged,
    FailedPrecondition,
    InvalidArgument,
    LayerfsError,
    NotFound,
)
from layerfs.images import Image
from layerfs.store import Store
from layerfs.testing.images import OCI, MadeImage, MadeLayout, docker_archive, sha256, tar_of, to_json

DRIVERS = ["overlay2", "btrfs", "vfs"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")

TOOLS = pytest.mark.skipif(
    not (shutil.which("skopeo") and shutil.which("umoci")),
    reason="skopeo or umoci is missing: apt-get install skopeo umoci",
)

BASE = tar_of({"etc": None, "etc/a": b"one", "etc/gone": b"x", "opt": None, "opt/old": b"old"})
MIDDLE = tar_of({"etc/.wh.gone": b"", "etc/b": b"two"})
TOP = tar_of({"opt": None, "opt/.wh..wh..opq": b"", "opt/new": b"three" * 10_000})
DIFFS = [BASE, MIDDLE, TOP]
TREE = {"etc/a": b"one", "etc/b": b"two", "opt/new": b"three" * 10_000}
CHAIN = digest.chain_ids(map(sha256, DIFFS))


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def tree_of(store: Store, parent: str) -> dict[str, bytes]:
    """The files that a container on ``parent`` sees."""
    store.view("look", parent)
    try:
        with store.mounted("look") as path:
            return files(path)
    finally:
        store.remove("look")


def keys(store: Store) -> list[str]:
    return sorted(layer.key for layer in store.list())


def blobs(store: Store) -> set[str]:
    return set(os.listdir(store.root / "blobs/sha256"))


@contextlib.contextmanager
def opened(root: Path, driver: str) -> Iterator[Store]:
    try:
        with Store(root, driver) as store:
            yield store
    finally:
        take_away(root)


def take_away(root: Path) -> None:
    """The store's loop device and data, which pytest's own directories would keep for a while."""
    with contextlib.suppress(NotFound):
        Backing(root).destroy()


@pytest.fixture(params=DRIVERS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with opened(tmp_path / "store", request.param) as store:
        yield store


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Store]:
    """For what does not depend on the driver."""
    with opened(tmp_path / "store", "overlay2") as store:
        yield store


@pytest.fixture
def made(tmp_path: Path) -> MadeLayout:
    return MadeLayout(tmp_path / "source")


# -- import --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "tar", "docker"])
def test_an_image_comes_in_whole(store: Store, made: MadeLayout, tmp_path: Path, form: str) -> None:
    image = MadeImage(DIFFS, ["none"] * 3 if form == "docker" else ["gzip", "zstd", "none"])
    made.add(image, "v1")
    source = made.path
    if form == "tar":
        source = made.to_tar(tmp_path / "source.tar")
    elif form == "docker":
        source = docker_archive(tmp_path / "docker.tar", {"v1": image})
    told: list[tuple[int, int, str]] = []
    [found] = store.images.import_(source, progress=lambda *values: told.append(values))
    assert (found.name, found.top, found.layers, found.platform) == ("v1", CHAIN[-1], tuple(CHAIN), "linux/amd64")
    assert found.config_digest == sha256(to_json(image.config))
    assert [store.stat(key).diff_id for key in CHAIN] == list(map(sha256, DIFFS))
    assert [store.stat(key).chain_id for key in CHAIN] == CHAIN
    assert tree_of(store, "v1") == TREE
    assert tree_of(store, CHAIN[0]) == {"etc/a": b"one", "etc/gone": b"x", "opt/old": b"old"}
    assert store.images.get("v1") == found
    assert store.images.list() == [found]
    assert blobs(store) == {found.digest[7:], found.config_digest[7:]}
    total = sum(map(len, image.blobs))
    assert told[-1][:2] == (total, total)
    assert all(0 <= done <= of == total and str(source) in what for done, of, what in told)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)


def test_layers_are_stored_once_and_shared(overlay: Store, made: MadeLayout) -> None:
    made.add(MadeImage([BASE, MIDDLE]), "one")
    made.add(MadeImage([BASE, MIDDLE, TOP], ["zstd"] * 3), "two")
    made.add(MadeImage([BASE, TOP]), "three")
    assert [image.name for image in overlay.images.import_(made.path)] == ["one", "two", "three"]
    assert len(keys(overlay)) == 4
    assert tree_of(overlay, "two") == TREE


def test_a_layer_that_is_there_is_not_read_again(overlay: Store, made: MadeLayout) -> None:
    made.add(MadeImage([BASE]), "one")
    overlay.images.import_(made.path)
    made.add(MadeImage([BASE, MIDDLE]), "two")
    read: dict[str, int] = {}
    overlay.images.import_(made.path, name="two", progress=lambda done, _, what: read.update({what: done}))
    assert not [what for what in read if "layer 1 of" in what]
    assert [what for what in read if "layer 2 of" in what]


def test_the_same_layer_twice_and_an_image_without_layers(overlay: Store, made: MadeLayout) -> None:
    made.add(MadeImage([BASE, MIDDLE, MIDDLE]), "twice")
    made.add(MadeImage([]), "none")
    twice, none = overlay.images.import_(made.path)
    assert len(set(twice.layers)) == 3
    assert (none.top, none.layers) == ("", ())
    overlay.prepare("empty", "none")
    with overlay.mounted("empty") as path:
        assert not files(path)


def test_names_are_any_strings(overlay: Store, made: MadeLayout) -> None:
    made.add(MadeImage([BASE]))
    names = ["../../etc", "a/b:c@d", " ", "ünï ☃", "new\nline", "'; DROP TABLE images; --", "x" * 5000, "sha256:abc"]
    for name in names:
        [image] = overlay.images.import_(made.path, name=name)
        assert image.name == name
        assert overlay.images.get(name) == image
    assert sorted(image.name for image in overlay.images.list()) == sorted(names)
    for name in names:
        overlay.images.remove(name)
    assert not keys(overlay)
    for name in ("", "\udcff"):
        with pytest.raises(InvalidArgument):
            overlay.images.import_(made.path, name=name)


def test_an_image_without_a_name_gets_its_source_s(overlay: Store, made: MadeLayout, tmp_path: Path) -> None:
    made.add(MadeImage([BASE]))
    [image] = overlay.images.import_(made.path)
    assert image.name == "source"
    [image] = overlay.images.import_(made.to_tar(tmp_path / "some.image.tar"))
    assert image.name == "some.image"


def test_every_name_of_a_docker_archive_is_an_image(overlay: Store, tmp_path: Path) -> None:
    config = to_json(MadeImage([BASE]).config)
    listing = [{"Config": "config", "RepoTags": ["a:1", "b:2"], "Layers": ["layer"]}]
    path = tmp_path / "saved.tar"
    path.write_bytes(tar_of({"config": config, "layer": BASE, "manifest.json": to_json(listing)}))
    assert [image.name for image in overlay.images.import_(path)] == ["a:1", "b:2"]


def test_a_name_chooses_among_several_images(overlay: Store, made: MadeLayout) -> None:
    made.add(MadeImage([BASE]), "one")
    made.add(MadeImage([TOP]), "two")
    [image] = overlay.images.import_(made.path, name="two")
    assert image.layers == (sha256(TOP),)
    with pytest.raises(InvalidArgument, match="'one', 'two'"):
        overlay.images.import_(made.path, name="three")


def test_the_platform_is_chosen(overlay: Store, made: MadeLayout) -> None:
    entries = [
        made.put(
            MadeImage([tar_of({"arch": name.encode()})], platform=("linux", name)),
            platform={"os": "linux", "architecture": name, "variant": variant},
        )
        for name, variant in (("amd64", ""), ("arm64", "v8"), ("s390x", ""))
    ]
    made.entries = [
        made.document(
            f"{OCI}.index.v1+json",
            {"schemaVersion": 2, "manifests": entries},
            annotations={"org.opencontainers.image.ref.name": "multi"},
        )
    ]
    made.write_index()
    [image] = overlay.images.import_(made.path, name="arm", platform="linux/arm64/v8")
    assert (image.platform, tree_of(overlay, "arm")) == ("linux/arm64", {"arch": b"arm64"})
    with pytest.raises(InvalidArgument, match="linux/amd64, linux/arm64/v8, linux/s390x"):
        overlay.images.import_(made.path, platform="linux/riscv64")


def test_the_same_image_again_is_no_error_and_another_of_its_name_is(
    overlay: Store, made: MadeLayout, tmp_path: Path
) -> None:
    image = MadeImage([BASE], ["none"])
    made.add(image, "v1")
    [first] = overlay.images.import_(made.path)
    assert overlay.images.import_(made.path) == [first]
    assert overlay.images.import_(docker_archive(tmp_path / "docker.tar", {"v1": image})) == [first]
    other = MadeLayout(tmp_path / "other")
    other.add(MadeImage([TOP]), "v1")
    with pytest.raises(AlreadyExists, match="v1"):
        overlay.images.import_(other.path)
    assert overlay.images.list() == [first]
    assert keys(overlay) == [sha256(BASE)]


# -- bad images ----------------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["gzip", "zstd", "none"])
def test_a_changed_blob_is_refused_wherever_it_was_changed(store: Store, made: MadeLayout, kind: str) -> None:
    image = MadeImage([BASE, TOP], [kind, kind])
    made.add(image, "v1")
    path = made.path / "blobs/sha256" / sha256(image.blobs[1])[7:]
    whole = path.read_bytes()
    for position in sorted({0, 5, len(whole) // 2, len(whole) - 6, len(whole) - 1}):
        flip(path, position)
        with pytest.raises(BadLayer):
            store.images.import_(made.path)
        path.write_bytes(whole)
        assert not store.images.list()
        assert CHAIN[-1] not in keys(store)
    for data in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(data)
        with pytest.raises(BadLayer, match="are declared"):
            store.images.import_(made.path)
    path.unlink()
    with pytest.raises(BadLayer, match="lacks the blob"):
        store.images.import_(made.path)
    path.write_bytes(whole)
    store.images.collect_garbage()
    assert not keys(store)
    assert not blobs(store)
    assert store.images.import_(made.path)


def test_a_layer_that_cannot_be_recorded_leaves_no_volume(store: Store, made: MadeLayout) -> None:
    """Somebody takes its key while it is unpacked."""
    made.add(MadeImage(DIFFS), "v1")

    def take(_done: int, _total: int, _what: str) -> None:
        with contextlib.suppress(AlreadyExists):
            store.prepare(CHAIN[1])

    with pytest.raises(AlreadyExists, match="taken"):
        store.images.import_(made.path, progress=take)
    assert keys(store) == [CHAIN[1]]
    store.remove(CHAIN[1])
    assert not store._database.volumes()
    assert not os.listdir(store.root / "records")
    store.images.import_(made.path)


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_base_that_is_removed_meanwhile_is_named(
    store: Store, made: MadeLayout, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Before its copy or clone is made, or while the layers on it are read."""
    made.add(MadeImage(DIFFS[:1]), "base")
    store.images.import_(made.path)
    store.prepare("work", CHAIN[0])
    store.images.remove("base")
    store.remove("work")
    assert keys(store) == CHAIN[:1]
    create = type(store.driver).create

    def late(self: Driver, volume: str, parents: Sequence[str], *, size: int | None = None) -> None:
        if moment == "before":
            take()
        create(self, volume, parents, size=size)

    def take(*_: object) -> None:
        with contextlib.suppress(NotFound):
            store.remove(CHAIN[0])

    monkeypatch.setattr(type(store.driver), "create", late)
    made.add(MadeImage(DIFFS), "v1")
    with pytest.raises(FailedPrecondition, match=rf"{CHAIN[0]}.* was removed meanwhile"):
        store.images.import_(made.path, name="v1", progress=take if moment == "while" else None)
    assert not store._database.volumes()
    monkeypatch.undo()
    store.images.import_(made.path, name="v1")
    assert tree_of(store, CHAIN[-1]) == TREE


@pytest.mark.parametrize("kind", ["gzip", "none"])
def test_a_layer_whose_diff_id_is_another_is_refused(store: Store, made: MadeLayout, tmp_path: Path, kind: str) -> None:
    image = MadeImage([BASE, MIDDLE], [kind, kind])
    image.config["rootfs"]["diff_ids"][1] = sha256(b"something else")
    made.add(image, "v1")
    with pytest.raises(BadLayer):
        store.images.import_(made.path)
    with pytest.raises(BadLayer):
        store.images.import_(docker_archive(tmp_path / "docker.tar", {"v1": image}))
    assert not store.images.list()


def test_a_hostile_layer_is_refused_and_nothing_is_written_outside(store: Store, made: MadeLayout) -> None:
    outside = made.path.parent / "outside"
    outside.mkdir()
    for name, links in (("../../outside/x", {}), ("link/x", {"link": str(outside)}), ("/etc/layerfs-x", {})):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for link, target in links.items():
                member = tarfile.TarInfo(link)
                member.type, member.linkname = tarfile.SYMTYPE, target
                tar.addfile(member)
            tar.addfile(tarfile.TarInfo(name))
        made.entries = []
        made.add(MadeImage([out.getvalue()]), "bad")
        with pytest.raises(BadLayer):
            store.images.import_(made.path)
    assert not os.listdir(outside)
    assert not os.path.exists("/etc/layerfs-x")
    assert not store.images.list()
    assert not keys(store)


# -- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("dest", ["out", "out.tar"])
def test_an_unmodified_image_goes_out_as_it_came_in(
    store: Store, made: MadeLayout, tmp_path: Path, compression: str, dest: str
) -> None:
    image = MadeImage(DIFFS, extra={"annotations": {"kept": "yes"}})
    made.add(image, "v1")
    [found] = store.images.import_(made.path)
    told: list[tuple[int, int, str]] = []
    exported = store.images.export(
        "v1", tmp_path / dest, compression=compression, progress=lambda *values: told.append(values)
    )
    assert exported.config_digest == found.config_digest
    assert (exported.layers, exported.platform, exported.top) == (found.layers, found.platform, found.top)
    again = store.images.export("v1", tmp_path / f"again-{dest}", compression=compression)
    assert again == exported
    assert told[-1][0] == told[-1][1]
    with opened(tmp_path / "second", "vfs") as second:
        [back] = second.images.import_(tmp_path / dest)
        assert (back.name, back.digest, back.layers) == ("v1", exported.digest, found.layers)
        assert tree_of(second, "v1") == TREE
    if dest == "out":
        manifest = json.loads((tmp_path / dest / "blobs/sha256" / exported.digest[7:]).read_bytes())
        assert manifest["annotations"] == {"kept": "yes"}


def test_a_folder_keeps_another_image_of_the_same_tag(overlay: Store, tmp_path: Path) -> None:
    names = ["example.com/one:v1", "example.com/two:v1", "example.com/one:v1"]
    for number, name in enumerate(names):
        change(overlay, "", name, b"%d" % number)
        overlay.images.export(name, tmp_path / "out")
        overlay.remove(name)
    index = json.loads((tmp_path / "out/index.json").read_bytes())
    references = [item["annotations"]["org.opencontainers.image.ref.name"] for item in index["manifests"]]
    assert references == ["example.com/two:v1", "v1"]  # one alone may have the tag
    assert [image.name for image in overlay.images.import_(tmp_path / "out")] == names[1:]
    with overlay.mounted(_work(overlay, "example.com/one:v1")) as path:
        assert (path / "added").read_bytes() == b"2"


def test_an_image_that_could_not_be_told_from_another_is_not_exported(overlay: Store, tmp_path: Path) -> None:
    change(overlay, "", "example.com/one:v1", b"1")
    change(overlay, "", "v1", b"2")
    overlay.images.export("example.com/one:v1", tmp_path / "out")
    before = (tmp_path / "out/index.json").read_bytes()
    with pytest.raises(FailedPrecondition, match=r"another image .*'v1'.*another folder"):
        overlay.images.export("v1", tmp_path / "out")
    assert (tmp_path / "out/index.json").read_bytes() == before


def change(store: Store, parent: str, name: str, content: bytes, *, measured: bool = False) -> None:
    """Commit a layer on ``parent`` that adds a file and deletes another."""
    store.prepare("work", parent)
    with store.mounted("work") as path:
        (path / "added").write_bytes(content)
        os.utime(path / "added", (5e8, 5e8))
        os.utime(path, (5e8, 5e8))
        if (path / "etc/a").is_file():
            (path / "etc/a").unlink()
    store.commit(name, "work", digest=measured)


@pytest.mark.parametrize("measured", [False, True])
def test_a_committed_layer_goes_out_with_its_base_image_s_configuration(
    store: Store, made: MadeLayout, tmp_path: Path, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    base = MadeImage(DIFFS)
    made.add(base, "v1")
    store.images.import_(made.path)
    change(store, "v1", "mine", b"first", measured=measured)
    change(store, "mine", "mine too", b"second", measured=measured)
    exported = store.images.export("mine too", tmp_path / "out")
    assert exported.layers == (*CHAIN, "mine", "mine too")
    assert store.images.export("mine too", tmp_path / "again") == exported
    config = json.loads((tmp_path / "out/blobs/sha256" / exported.config_digest[7:]).read_bytes())
    assert config["config"] == base.config["config"]
    assert config["rootfs"]["diff_ids"][:3] == list(map(sha256, DIFFS))
    assert len(config["rootfs"]["diff_ids"]) == len(config["history"]) == 5
    assert config["history"][:3] == base.config["history"]
    times = [store.stat(key).created.isoformat().replace("+00:00", "Z") for key in ("mine", "mine too")]
    assert [item["created"] for item in config["history"][3:]] == times
    assert config["created"] == times[1]
    with opened(tmp_path / "second", "vfs") as second:
        [back] = second.images.import_(tmp_path / "out")
        expected = TREE | {"added": b"second"}
        del expected["etc/a"]
        assert tree_of(second, back.name) == expected


@pytest.mark.parametrize("measured", [False, True])
def test_a_layer_without_an_image_gets_a_plain_configuration(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    change(store, "", "example.com/mine:v7", b"x", measured=measured)
    exported = store.images.export("example.com/mine:v7", tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as tar:
        file = tar.extractfile(f"blobs/sha256/{exported.config_digest[7:]}")
        assert file is not None
        config = json.load(file)
    assert config["os"] == "linux"
    assert config["architecture"]
    assert config["created"] == "1970-01-02T00:00:00Z"
    assert [item["created"] for item in config["history"]] == ["1970-01-02T00:00:00Z"]
    [back] = store.images.import_(tmp_path / "out.tar")
    assert (back.name, back.digest) == ("example.com/mine:v7", exported.digest)
    with store.mounted(_work(store, back.layers[-1])) as path:
        assert (path / "added").stat().st_mtime == 86400  # the epoch holds younger times down


def _work(store: Store, parent: str) -> str:
    store.prepare("look", parent)
    return "look"


def test_the_epoch_is_checked(overlay: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("now", "-1", "1.5", "9" * 30, "9" * 5000):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
        with pytest.raises(InvalidArgument, match="SOURCE_DATE_EPOCH"):
            overlay.images.export("x", tmp_path / "out")


def test_what_cannot_be_exported_says_why(overlay: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="'nothing'"):
        overlay.images.export("nothing", tmp_path / "out")
    overlay.prepare("active")
    with pytest.raises(FailedPrecondition, match="active"):
        overlay.images.export("active", tmp_path / "out")
    with pytest.raises(InvalidArgument, match="lzma"):
        overlay.images.export("active", tmp_path / "out", compression="lzma")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["content", "missing"])
def test_a_damaged_layer_is_not_exported(overlay: Store, made: MadeLayout, tmp_path: Path, damage: str) -> None:
    made.add(MadeImage(DIFFS), "v1")
    overlay.images.import_(made.path)
    [path] = [path for path in (overlay.root / "data").rglob("new") if path.is_file()]
    if damage == "content":
        flip(path, 7)
    else:
        path.unlink()
    with pytest.raises(Damaged):
        overlay.images.export("v1", tmp_path / "out.tar")
    assert not list(tmp_path.glob("*out.tar*"))


def test_damaged_documents_are_told_and_healed_by_another_import(overlay: Store, made: MadeLayout) -> None:
    made.add(MadeImage([BASE]), "v1")
    [image] = overlay.images.import_(made.path)
    flip(overlay.root / "blobs/sha256" / image.config_digest[7:], 9)
    with pytest.raises(Damaged, match="import it again"):
        overlay.images.get("v1")
    assert overlay.images.import_(made.path) == [image]
    assert overlay.images.get("v1") == image
    (overlay.root / "blobs/sha256" / image.digest[7:]).unlink()
    overlay.images.remove("v1")
    assert not keys(overlay)
    assert not blobs(overlay)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("debian:12", "12"),
        ("example.com:5000/team/app:v1.2", "v1.2"),
        ("example.com:5000/team/app", "app"),
        ("app", "app"),
        ("a b", "latest"),
        ("ünï", "latest"),
        ("app:", "latest"),
        ("-", "latest"),
        ("", "latest"),
    ],
)
def test_the_reference_is_what_oci_allows(name: str, expected: str) -> None:
    assert imageexport.reference(name) == expected


# -- removing ------------------------------------------------------------------------------------------------------


def test_removing_an_image_takes_the_layers_that_nothing_else_uses(store: Store, made: MadeLayout) -> None:
    made.add(MadeImage([BASE, MIDDLE]), "short")
    made.add(MadeImage(DIFFS), "long")
    made.add(MadeImage([BASE, TOP]), "side")
    store.images.import_(made.path)
    store.images.remove("long")
    assert CHAIN[2] not in keys(store)
    assert CHAIN[1] in keys(store)
    store.prepare("child", "side")
    store.images.remove("side")
    assert store.stat("child").parent in keys(store)
    store.images.remove("short")
    assert CHAIN[0] in keys(store)
    assert len(keys(store)) == 3
    store.remove("child")
    assert len(store.images.collect_garbage()) == 2
    assert not keys(store)
    assert not blobs(store)
    assert not store.images.list()
    with pytest.raises(NotFound, match="short"):
        store.images.remove("short")


def test_garbage_is_never_what_a_user_made(overlay: Store, made: MadeLayout) -> None:
    made.add(MadeImage([BASE]), "v1")
    overlay.images.import_(made.path)
    change(overlay, "", "mine", b"x", measured=True)
    change(overlay, "", "sha256:" + "0" * 64, b"x")
    change(overlay, "v1", "on top", b"x")
    before = keys(overlay)
    assert overlay.images.collect_garbage() == []
    assert keys(overlay) == before
    (overlay.root / "blobs/sha256/new-half").write_bytes(b"half")
    assert len(overlay.images.collect_garbage()) == 1
    assert overlay.images.get("v1")


# -- several processes ---------------------------------------------------------------------------------------------


def child(root: Path, work: str) -> subprocess.Popen[bytes]:
    """A process with the store open that runs ``work``."""
    import sys

    imports = "import sys; from pathlib import Path; from layerfs.store import Store"
    program = f"{imports}\nwith Store(Path(sys.argv[1])) as store:\n    {work}"
    return subprocess.Popen([sys.executable, "-c", program, str(root)])


def big(made: MadeLayout, name: str = "v1") -> None:
    """An image that takes a while."""
    noise = random.Random(7)
    diffs = [
        tar_of({f"dir{number}": None} | {f"dir{number}/{index}": noise.randbytes(500) for index in range(400)})
        for number in range(4)
    ]
    made.add(MadeImage(diffs), name)


def test_two_imports_of_one_image_at_once_both_succeed(store: Store, made: MadeLayout) -> None:
    big(made)
    work = f"store.images.import_(Path({str(made.path)!r}))"
    children = [child(store.root, work) for _ in range(3)]
    [image] = store.images.import_(made.path)
    assert [one.wait() for one in children] == [0, 0, 0]
    assert keys(store) == sorted(image.layers)
    assert len(tree_of(store, "v1")) == 1600
    assert store.images.list() == [image]


def test_an_import_that_is_killed_leaves_nothing_wrong(store: Store, made: MadeLayout) -> None:
    big(made)
    noise = random.Random(3)
    for _ in range(6):
        killed = child(store.root, f"store.images.import_(Path({str(made.path)!r}))")
        time.sleep(0.2 + noise.random() * 0.5)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        for image in store.images.list():
            assert len(tree_of(store, image.name)) == 1600
            store.images.remove(image.name)
    work = "store.cleanup(); store.images.collect_garbage(); print(list(store.list()))"
    assert child(store.root, work).wait() == 0
    assert not keys(store)
    assert not blobs(store)
    store.images.import_(made.path)
    assert len(tree_of(store, "v1")) == 1600


# -- other tools ---------------------------------------------------------------------------------------------------


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def umoci_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout made by umoci: three layers, with deleted and replaced things in them."""
    folder = tmp_path_factory.mktemp("umoci")
    path = folder / "made"
    run("umoci", "init", "--layout", path)
    run("umoci", "new", "--image", f"{path}:v1")
    for step in range(3):
        bundle = folder / f"bundle{step}"
        run("umoci", "unpack", "--image", f"{path}:v1", bundle)
        root = bundle / "rootfs"
        if step == 0:
            (root / "etc").mkdir()
            (root / "etc/a").write_bytes(b"one")
            (root / "etc/b").write_bytes(b"two")
            os.link(root / "etc/b", root / "etc/same")
            (root / "etc/link").symlink_to("/etc/a")
            (root / "dir").mkdir(mode=0o1777)
            (root / "dir/x").write_bytes(b"x")
            os.chown(root / "dir/x", 1234, 5678)
        elif step == 1:
            (root / "etc/a").unlink()
            shutil.rmtree(root / "dir")
            (root / "dir").write_bytes(b"a file now")
        else:
            (root / "etc/a").mkdir()
            (root / "etc/a/b").write_bytes(b"three")
        run("umoci", "repack", "--image", f"{path}:v1", bundle)
    return path


UMOCI_TREE = {"etc/a/b": b"three", "etc/b": b"two", "etc/same": b"two", "dir": b"a file now"}


@TOOLS
@pytest.mark.parametrize("form", ["oci", "oci-archive", "docker-archive"])
def test_an_image_of_umoci_through_skopeo(store: Store, umoci_image: Path, tmp_path: Path, form: str) -> None:
    source = umoci_image
    name = "v1"
    if form == "oci-archive":
        source = tmp_path / "source.tar"
        run("skopeo", "copy", f"oci:{umoci_image}:v1", f"{form}:{source}:v1")
    elif form == "docker-archive":
        source = tmp_path / "source.tar"
        name = "example.com/made:v1"
        run("skopeo", "copy", f"oci:{umoci_image}:v1", f"{form}:{source}:{name}")
    [image] = store.images.import_(source)
    assert image.name == name
    assert tree_of(store, name) == UMOCI_TREE
    dest = tmp_path / "out"
    exported = store.images.export(name, dest)
    told = json.loads(run("skopeo", "inspect", f"oci:{dest}:v1"))
    assert told["Digest"] == exported.digest
    assert len(told["Layers"]) == 3
    run("skopeo", "copy", f"oci:{dest}:v1", f"docker-archive:{tmp_path}/docker.tar:again:v1")
    run("umoci", "stat", "--image", f"{dest}:v1")
    run("umoci", "unpack", "--image", f"{dest}:v1", tmp_path / "bundle")
    assert files(tmp_path / "bundle/rootfs") == UMOCI_TREE
    assert os.readlink(tmp_path / "bundle/rootfs/etc/link") == "/etc/a"


@TOOLS
def test_layers_that_umoci_inserted_end_with_their_last_byte(store: Store, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"not a whole block")
    made = f"{tmp_path}/made:v1"
    run("umoci", "init", "--layout", tmp_path / "made")
    run("umoci", "new", "--image", made)
    run("umoci", "insert", "--image", made, tmp_path / "tree", "/tree")
    store.images.import_(tmp_path / "made")
    assert tree_of(store, "v1") == {"tree/file": b"not a whole block"}
    assert not store.check()


@TOOLS
@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_a_commit_on_an_image_of_umoci_is_accepted_by_the_tools(
    store: Store, umoci_image: Path, tmp_path: Path, compression: str
) -> None:
    store.images.import_(umoci_image)
    change(store, "v1", "mine", b"mine")
    dest = tmp_path / "out.tar"
    exported = store.images.export("mine", dest, compression=compression)
    told = json.loads(run("skopeo", "inspect", f"oci-archive:{dest}:mine"))
    assert (told["Digest"], len(told["Layers"])) == (exported.digest, 4)
    run("skopeo", "copy", f"oci-archive:{dest}:mine", f"oci:{tmp_path}/copy:mine")
    if compression != "zstd":  # umoci 0.4 does not read it
        run("umoci", "unpack", "--image", f"{tmp_path}/copy:mine", tmp_path / "bundle")
        assert files(tmp_path / "bundle/rootfs") == UMOCI_TREE | {"added": b"mine"}


@TOOLS
def test_several_images_in_one_folder_are_kept_apart(overlay: Store, umoci_image: Path, tmp_path: Path) -> None:
    overlay.images.import_(umoci_image)
    change(overlay, "v1", "mine", b"mine")
    dest = tmp_path / "out"
    names = ["v1", "mine"]
    images: list[Image] = [overlay.images.export(name, dest) for name in names]
    for name, image in zip(names, images, strict=True):
        assert json.loads(run("skopeo", "inspect", f"oci:{dest}:{name}"))["Digest"] == image.digest
    assert sorted(run("umoci", "ls", "--layout", dest).split()) == ["mine", "v1"]
    with pytest.raises(LayerfsError):
        overlay.images.export("mine", umoci_image / "blobs")
