"""Images taken out of Docker's and podman's own stores, which the real programs have filled."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from layerfs import oci, platforms
from layerfs.errors import BadLayer, InvalidArgument, LayerfsError, NotFound
from layerfs.store import Store
from layerfs.testing.engines import BUSYBOX, busybox_image, busybox_layer, layerfs, running, wait_until
from layerfs.testing.images import tar_of

MakeStore = Callable[..., Store]

DOCKER = "/usr/bin/docker"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="Docker needs root"),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="busybox-static is not installed"),
]
with_docker = pytest.mark.skipif(
    shutil.which("dockerd") is None or not os.path.exists(DOCKER), reason="docker.io is missing"
)


# -- Docker ------------------------------------------------------------------------------------------------------------


@contextmanager
def daemon(place: Path, driver: str) -> Iterator[Callable[..., str]]:
    """A Docker daemon on its own storage driver, as a function that calls its client."""
    (place / "daemon.json").write_text("{}")
    command = [
        *("dockerd", "--config-file", str(place / "daemon.json"), "--storage-driver", driver),
        *("--data-root", str(place / "root"), "--exec-root", str(place / "exec"), "--pidfile", str(place / "pid")),
        *("--host", f"unix://{place}/docker.sock", "--log-level", "warn"),
        *("--iptables=false", "--ip6tables=false", "--bridge=none"),
    ]

    def docker(*arguments: str, feed: bytes = b"") -> str:
        done = subprocess.run(
            [DOCKER, "--host", f"unix://{place}/docker.sock", *arguments],
            input=feed,
            capture_output=True,
            check=False,
            timeout=120,
            env=os.environ | {"DOCKER_BUILDKIT": "0", "DOCKER_CONFIG": str(place / "client")},
        )
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout.decode().strip()

    def answers() -> bool:
        command = [DOCKER, "--host", f"unix://{place}/docker.sock", "version"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    with running(command, place / "dockerd.log"):
        wait_until(answers, "Docker answers")
        yield docker


@pytest.fixture(params=["overlay2", "vfs"], scope="module")
def docker_root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Docker's data root, and the ID of its image ``built``, which has several layers and deletes files."""
    place = tmp_path_factory.mktemp(f"docker-{request.param}")
    context = place / "context"
    context.mkdir()
    (context / "file").write_text("copied\n")
    (context / "empty").touch()
    odd = tar_of({"odd": None, "odd/ünï ☃": b"1", "odd/\udcff": b"2" * 5000, "odd/.hidden": b"3"})
    (context / "odd.tar").write_bytes(odd)
    steps = ["FROM base", "COPY file empty /data/", "ADD odd.tar /", 'CMD ["/bin/cat", "/data/file"]']
    steps += ["RUN rm /etc/passwd && ln /data/file /data/link && mkfifo /pipe || true", "RUN echo more >> /data/file"]
    (context / "Dockerfile").write_text("\n".join([*steps, ""]))
    with daemon(place, request.param) as docker:
        docker("import", "-", "base", feed=busybox_layer())
        docker("build", "--network", "none", "--tag", "built:1", "--tag", "again/built:2", str(context))
        identity = docker("inspect", "--format", "{{.Id}}", "built:1")
    return place / "root", identity


def contents(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every file below a directory with its size, mode and time."""
    found = {}
    for place, directories, names in os.walk(root):
        for name in [*directories, *names]:
            info = os.lstat(Path(place, name))
            found[os.path.join(place, name)] = (info.st_size, info.st_mode, info.st_mtime_ns)
    return found


@with_docker
def test_dockers_images_come_with_their_names_and_files(docker_root: tuple[Path, str], make_store: MakeStore) -> None:
    root, identity = docker_root
    before = contents(root)
    store = make_store("overlay2")
    printed = layerfs("import", "--from", f"docker:{root}", "--root", store.root)
    assert set(printed.split()) >= {"base:latest", "built:1", "again/built:2"}
    assert contents(root) == before
    image = store.images.get("built:1")
    assert image.config_digest == identity
    assert image.layers == store.images.get("again/built:2").layers
    store.view("look", "built:1")
    with store.mounted("look") as tree:
        assert (tree / "data/file").read_text() == "copied\nmore\n"
        assert (tree / "odd/ünï ☃").read_text() == "1"
        assert not (tree / "etc/passwd").exists()
        assert (tree / "data/empty").stat().st_size == 0
    assert store.check() == []
    assert len(store.images.import_(root, kind="docker", name="built:1")) == 1


def copied(whole: Path, root: Path) -> tuple[Path, str]:
    """A copy of a Docker's images and layers that may be changed, and the name of its driver."""
    root.mkdir()
    (driver,) = os.listdir(whole / "image")
    subprocess.run(["cp", "-a", whole / "image", whole / driver, root], check=True)
    return root, driver


@with_docker
def test_what_was_changed_or_lost_at_docker_is_refused(
    docker_root: tuple[Path, str], make_store: MakeStore, tmp_path: Path
) -> None:
    whole, _ = docker_root
    root, driver = copied(whole, tmp_path / "docker")
    layers = root / "image" / driver / "layerdb/sha256"
    store = make_store("overlay2")

    def refused(error: type[LayerfsError], match: str) -> None:
        with pytest.raises(error, match=match):
            store.images.import_(root, kind="docker", name="built:1")
        assert list(store.list()) == []

    (file,) = [path for path in root.rglob("data/empty") if path.is_file()][:1]
    file.write_text("not empty any more")
    store.images.import_(root, kind="docker", name="built:1")  # an empty file has no bytes in the archive
    store.images.remove("built:1")
    for file in root.rglob("data/file"):
        file.write_text("other")
    refused(BadLayer, "the file 'data/file' has 5 bytes")
    for file in root.rglob("data/file"):
        file.write_text("Copied\n")
    refused(BadLayer, "has the diff ID|the file 'data/file' has 7 bytes")  # the upper layer's was longer
    for file in root.rglob("data/file"):
        file.unlink()
        file.symlink_to("/etc/hostname")
    refused(BadLayer, "data/file")
    for layer in layers.iterdir():
        (layer / "cache-id").write_text("../../../../etc")
    refused(BadLayer, "names no directory")
    shutil.rmtree(layers)
    refused(BadLayer, "is missing")


@with_docker
def test_what_a_killed_docker_has_left_is_passed_over(
    docker_root: tuple[Path, str], make_store: MakeStore, tmp_path: Path
) -> None:
    whole, identity = docker_root
    root, driver = copied(whole, tmp_path / "docker")
    images = root / "image" / driver / "imagedb/content/sha256"
    store = make_store("overlay2")
    before = store.images.import_(root, kind="docker")
    for place in (images, root / "image" / driver / "layerdb/sha256"):
        (place / f".tmp-{identity[7:]}123").write_text("{")
    (root / "image" / driver / "layerdb/tmp/write-set-1").mkdir(parents=True)
    assert store.images.import_(root, kind="docker") == before
    other = images / ("0" * 64)
    other.write_text("{")  # whatever its content is, this one claims to be an image
    with pytest.raises(BadLayer, match=f"{other.name}' is damaged"):
        store.images.import_(root, kind="docker")


# -- podman, buildah and all that use containers/storage ---------------------------------------------------------------


@pytest.fixture(params=["overlay", "vfs"])
def containers_root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A store of containers/storage, and the ID of its image ``localhost/bb:1``."""
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    more = tar_of({"data": None, "data/.wh.file": b"", "data/new": b"x" * 100_000, "data/ünï": b""})
    archive = busybox_image(tmp_path / "bb.tar", "bb:1", more)
    root = tmp_path / "containers"
    target = f"containers-storage:[{request.param}@{root}+{tmp_path / 'run'}]localhost/bb:1"
    copy = ["skopeo", "--insecure-policy", "copy", f"oci-archive:{archive}:bb:1", target]
    done = subprocess.run(copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (image,) = json.loads((root / f"{request.param}-images/images.json").read_text())
    yield root, f"sha256:{image['id']}"
    subprocess.run(["umount", root / "overlay"], capture_output=True, check=False)


def test_podmans_images_come_with_their_names_and_files(
    containers_root: tuple[Path, str], make_store: MakeStore
) -> None:
    root, identity = containers_root
    before = contents(root)
    store = make_store("overlay2")
    assert layerfs("import", "--from", f"containers-storage:{root}", "--root", store.root) == "localhost/bb:1\n"
    assert contents(root) == before
    assert store.images.get("localhost/bb:1").config_digest == identity
    store.view("look", "localhost/bb:1")
    with store.mounted("look") as tree:
        assert sorted(os.listdir(tree / "data")) == ["new", "ünï"]
    assert store.check() == []


def test_podmans_lists_of_images_are_the_image_for_the_platform(
    containers_root: tuple[Path, str], make_store: MakeStore
) -> None:
    root, identity = containers_root
    driver = "overlay" if (root / "overlay-images").exists() else "vfs"
    listed = root / f"{driver}-images/images.json"
    (image,) = json.loads(listed.read_text())
    here = {"mediaType": oci.MANIFEST, "digest": image["digest"], "size": 1}
    fits = here | {"platform": {"os": "linux", "architecture": platforms.host().architecture}}
    elsewhere = here | {"digest": f"sha256:{'1' * 64}", "platform": {"os": "linux", "architecture": "mips"}}
    about = here | {"platform": {"os": "unknown", "architecture": "unknown"}}
    lists = {"one": [about, elsewhere, here], "two": [elsewhere, fits, fits], "away": [elsewhere], "only": [about]}
    images = [image]
    for number, (name, entries) in enumerate(lists.items()):
        images.append({"id": f"{number:064}", "names": [f"localhost/{name}:1"]})
        (listed.parent / f"{number:064}").mkdir()
        document = {"schemaVersion": 2, "mediaType": oci.INDEX, "manifests": entries}
        (listed.parent / f"{number:064}" / "manifest").write_text(json.dumps(document))
    listed.write_text(json.dumps(images))
    store = make_store("overlay2")
    names = layerfs("import", "--from", f"containers-storage:{root}", "--root", store.root).split()
    assert names == ["localhost/bb:1", "localhost/one:1", "localhost/two:1"]
    assert {image.config_digest for image in store.images.list()} == {identity}
    with pytest.raises(InvalidArgument, match="mips"):
        store.images.import_(root, kind="containers-storage", name="localhost/two:1", platform="linux/mips")


def test_what_was_changed_or_lost_at_podman_is_refused(
    containers_root: tuple[Path, str], make_store: MakeStore
) -> None:
    root, _ = containers_root
    driver = "overlay" if (root / "overlay-images").exists() else "vfs"
    store = make_store("overlay2")

    def refused(match: str) -> None:
        with pytest.raises(BadLayer, match=match):
            store.images.import_(root, kind="containers-storage")
        assert list(store.list()) == []

    files = [path for path in root.rglob("data/new") if path.is_file()]
    for file in files:
        file.write_bytes(b"y" * 100_000)
    refused("diff ID")
    for file in files:
        file.write_bytes(b"y" * 100)
    refused("the file 'data/new' has 100 bytes, but had 100000")
    places = sorted((root / f"{driver}-layers").glob("*.tar-split.gz"))
    for place in places:
        place.write_bytes(gzip.compress(b'{"type": 1}\n{"type": 3}\n'))
    refused("tar-split record is damaged")
    for place in places:
        place.unlink()
    refused("is missing")
    listed = root / f"{driver}-layers/layers.json"
    layers = json.loads(listed.read_text())
    for layer in layers:
        layer["parent"] = layer["id"]
    listed.write_text(json.dumps(layers))
    refused("missing from the list of layers")


# -- what is no such store ---------------------------------------------------------------------------------------------


def test_what_is_no_such_store_is_refused(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store("overlay2")
    for kind, root, error in (
        ("docker", tmp_path, InvalidArgument),
        ("docker", tmp_path / "none", NotFound),
        ("containers-storage", tmp_path, InvalidArgument),
        ("rkt", tmp_path, InvalidArgument),
    ):
        with pytest.raises(error):
            store.images.import_(root, kind=kind)
    (tmp_path / "image/btrfs").mkdir(parents=True)
    with pytest.raises(InvalidArgument, match="its driver is btrfs"):
        store.images.import_(tmp_path, kind="docker")
    for words in (["--from", "docker"], ["--from", "docker:x", "y"], []):
        with pytest.raises(AssertionError, match="--from"):
            layerfs("import", "--root", store.root, *words)


def test_a_record_names_no_file_outside_its_layer(make_store: MakeStore, tmp_path: Path) -> None:
    """A hand-made data root whose layer asks for a file of the host, by its path and by a link."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret!!")
    archive = tar_of({"leak": b"secret!!"})
    pieces = (archive[:512], archive[520:])
    from layerfs.digest import of

    diff_id = of(archive)
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    ).encode()
    image = tmp_path / "root/image/overlay2"
    layer = image / "layerdb/sha256" / diff_id[7:]
    layer.mkdir(parents=True)
    (image / "imagedb/content/sha256").mkdir(parents=True)
    (image / "imagedb/content/sha256" / of(config)[7:]).write_bytes(config)
    (layer / "cache-id").write_text("a" * 64)
    diff = tmp_path / "root/overlay2" / ("a" * 64) / "diff"
    diff.mkdir(parents=True)
    store = make_store("overlay2")

    def record(name: str) -> None:
        lines = [
            {"type": 2, "payload": base64.b64encode(pieces[0]).decode()},
            {"type": 1, "name": name, "size": 8},
            {"type": 2, "payload": base64.b64encode(pieces[1]).decode()},
        ]
        out = io.BytesIO()
        with gzip.GzipFile(fileobj=out, mode="wb") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        (layer / "tar-split.json.gz").write_bytes(out.getvalue())

    (diff / "link").symlink_to(outside)
    os.mkfifo(diff / "pipe")
    for name in (f"../../../../..{outside}", str(outside), "link", "pipe"):
        record(name)
        with pytest.raises(BadLayer, match="cannot be read"):
            store.images.import_(tmp_path / "root", kind="docker")
    (diff / "leak").write_bytes(b"secret!!")
    record("leak")
    assert len(store.images.import_(tmp_path / "root", kind="docker")) == 1
