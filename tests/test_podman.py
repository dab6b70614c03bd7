"""podman with `layerfs-aufs` as the program that mounts its overlays (``mount_program``)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layerfs import mount_table, mounts, registry
from layerfs.store import Store
from layerfs.testing.engines import BUSYBOX, busybox_image

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="podman is tried as root"),
    pytest.mark.skipif(not all(map(shutil.which, ("podman", "runc", "skopeo"))), reason="podman is not installed"),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="busybox-static is not installed"),
]

PROGRAM = Path(sys.executable).parent / "layerfs-aufs"
# podman's own limits are higher than a sandbox may allow.
RUN = ("run", "--pull", "never", "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
IMAGE = "localhost/bb:1"

Podman = Callable[..., str]


@pytest.fixture
def podman(tmp_path: Path) -> Iterator[Podman]:
    """podman on a store of its own, with an image, as a function that calls it."""
    probe = registry.load("aufs").probe(tmp_path)
    if not probe.usable:
        pytest.skip(f"{probe.reason}; {probe.remedy}")
    # podman takes no longer path than 50 characters for its state.
    root, state = tmp_path / "root", Path(tempfile.mkdtemp(prefix="podman-", dir="/var/tmp"))
    options = [*("--root", root, "--runroot", state, "--tmpdir", state / "tmp", "--storage-driver", "overlay")]
    options += ["--storage-opt", f"overlay.mount_program={PROGRAM}", "--cgroup-manager", "cgroupfs"]
    options += ["--runtime", "runc", "--events-backend", "file"]

    def run(*arguments: str) -> str:
        command = ["podman", *map(str, options), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    archive = busybox_image(tmp_path / "bb.tar", "bb:1")
    place = f"containers-storage:[overlay@{root}+{state}:overlay.mount_program={PROGRAM}]{IMAGE}"
    copy = ["skopeo", "--insecure-policy", "copy", f"oci-archive:{archive}:bb:1", place]
    subprocess.run(copy, check=True, capture_output=True)
    yield run
    for name in run("ps", "--all", "--quiet").split():
        run("rm", "--force", "--time", "0", name)
    shutil.rmtree(state)
    left = [point.target for point in mount_table.read() if point.target.is_relative_to(tmp_path)]
    for target in reversed(left):
        mounts.unmount(target, lazy=True)
    assert [target for target in left if target != root / "overlay"] == []  # podman itself leaves that one


def test_containers_run_and_are_committed(podman: Podman) -> None:
    assert podman(*RUN, "--rm", IMAGE) == "hello\n"
    script = "rm /data/file; echo new > /data/new; echo more >> /etc/greeting; mv /bin/ls /bin/list"
    podman(*RUN, "--name", "work", IMAGE, "/bin/sh", "-c", script)
    changed = {"A /data/new", "D /data/file", "C /etc/greeting", "A /bin/list", "D /bin/ls"}
    assert changed <= set(podman("diff", "work").splitlines())
    podman("commit", "--quiet", "work", "localhost/bb:2")
    podman("rm", "work")
    said = podman(*RUN, "--rm", "localhost/bb:2", "/bin/sh", "-c", "busybox ls /data; cat /etc/greeting")
    assert said == "new\nhello\nmore\n"
    podman("rmi", "localhost/bb:2")
    assert podman("images", "--format", "{{.Repository}}:{{.Tag}}") == f"{IMAGE}\n"


def test_a_container_lives_on(podman: Podman) -> None:
    podman(*RUN, "--detach", "--name", "long", IMAGE, "/bin/sh", "-c", "while true; do sleep 1; done")
    podman("exec", "long", "/bin/sh", "-c", "echo kept > /kept")
    podman("restart", "--time", "0", "long")
    assert podman("exec", "long", "/bin/cat", "/kept") == "kept\n"
    podman("stop", "--time", "0", "long")
    podman("rm", "long")


def test_its_images_can_be_adopted(podman: Podman, tmp_path: Path) -> None:
    podman(*RUN, "--name", "work", IMAGE, "/bin/sh", "-c", "rm /data/file; rm -r /tmp; mkdir /tmp; echo 1 > /tmp/1")
    podman("commit", "--quiet", "work", "localhost/bb:2")
    with Store(tmp_path / "store", "overlay2") as store:
        found = store.images.import_(tmp_path / "root", kind="containers-storage")
        assert [image.name for image in found] == [IMAGE, "localhost/bb:2"]
        store.view("look", "localhost/bb:2")
        with store.mounted("look") as tree:
            assert os.listdir(tree / "tmp") == ["1"]
            assert os.listdir(tree / "data") == []
        assert store.check() == []
