"""containerd's and Docker's own test suites for storage drivers, which were not written here, against the two servers.

Debian carries their sources; the small Go programs in ``suites/`` that run them are built for the test. What needs a
guest kernel is built and run in one, with its server.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

from layerfs import registry
from layerfs.driver import Capability
from layerfs.store import Store
from layerfs.testing.engines import Served, program
from layerfs.testing.guests import every_driver

GOCODE = Path("/usr/share/gocode/src")
NEEDED = {
    "golang-github-containerd-containerd-dev": "github.com/containerd/containerd/snapshots/testsuite",
    "golang-github-docker-docker-dev": "github.com/docker/docker/daemon/graphdriver/graphtest",
    "golang-github-vbatts-tar-split-dev": "github.com/vbatts/tar-split/tar/storage",
}
missing = [package for package, path in NEEDED.items() if not (GOCODE / path).is_dir()]

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the suites mount what they test, as root"),
    pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed (golang-go)"),
    pytest.mark.skipif(bool(missing), reason=f"sources are not installed: {', '.join(missing)}"),
    pytest.mark.timeout(3600),  # 128 layers one on the other take their time, and more on a busy machine
]


class Suites:
    """Builds the programs in a directory of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        sources = place / "gopath" / "src"
        shutil.copytree(Path(__file__).parent / "suites", sources / "suites")
        (sources / "suites/absent/github.com").rename(sources / "github.com")
        # Debian has this package without the version in its path, by which Docker's sources import it.
        (sources / "gotest.tools").mkdir()
        (sources / "gotest.tools/v3").symlink_to(GOCODE / "gotest.tools")
        self.environment = os.environ | {"GO111MODULE": "off", "GOPATH": f"{place / 'gopath'}:{GOCODE.parent}"}

    def built(self, name: str) -> Path:
        """The program that runs the suite ``name``."""
        made = self.place / f"{name}.test"
        if not made.exists():
            command = ["go", "test", "-c", "-o", str(made), "."]
            source = self.place / "gopath/src/suites" / name
            done = subprocess.run(
                command, cwd=source, env=self.environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
        return made


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Suites:
    return Suites(tmp_path_factory.mktemp("suites"))


@pytest.fixture(params=every_driver())
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    probe = registry.load(request.param).probe(tmp_path)
    if not probe.usable:
        pytest.skip(f"{request.param}: {probe.reason}; {probe.remedy}")
    return str(request.param)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory in whose path the suite's sockets find room, wherever the tests' own directories are."""
    with tempfile.TemporaryDirectory(prefix="suite-", dir="/var/tmp") as place:
        yield Path(place)


def run(*command: str | Path, known: Collection[str] = (), **environment: str) -> Mapping[str, str]:
    """Run a suite, in which tests that are ``known`` to fail may do so; how each test ended."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    found = {name: how for how, name in re.findall(r"^ *--- (PASS|FAIL|SKIP): (\S+)", done.stdout, re.MULTILINE)}
    failed = {name for name, how in found.items() if how == "FAIL"}
    if not failed.issubset(known) or (done.returncode and not failed):
        noise = re.compile(r".*: unmount /|=== | *--- PASS")
        said = [line for line in done.stdout.splitlines() if not noise.match(line)]
        pytest.fail("\n".join([*said[-100:], done.stderr[-2000:]]), pytrace=False)
    return found


def test_containerds_suite_for_snapshotters(suites: Suites, driver: str, short_path: Path) -> None:
    # In a mount namespace of its own, for copies of its mounts in others' sandboxes would keep layers busy.
    found = run(
        *("unshare", "--mount", suites.built("snapshotter"), "-test.v"),
        *("-test.root", "-test.parallel", "2", "-test.timeout", "50m"),
        LAYERFS_COMMAND="\n".join(program()),
        LAYERFS_DRIVER=driver,
        TMPDIR=str(short_path),
    )
    assert found["TestSuite/128LayersMount"] == "PASS"
    # The suite itself leaves this one out.
    assert [name for name, how in found.items() if how == "SKIP"] == ["TestSuite/Rename"]


def test_dockers_suite_for_graph_drivers(suites: Suites, driver: str, tmp_path: Path) -> None:
    served = Served("docker", driver, tmp_path)
    with Store(served.root, driver) as store:
        limits = bool(store.driver.capabilities & Capability.SIZE_LIMIT)
    served.start()
    # zfs-fuse makes directories without their sticky bit.
    known = {"TestCreateBase", "TestCreateSnap"} if driver == "zfs" and not Path("/sys/module/zfs").exists() else ()
    try:
        found = run(
            suites.built("graphdriver"),
            "-test.v",
            SOCKET=str(served.socket),
            known=known,
            QUOTA="1" if limits else "",
            TMPDIR=str(tmp_path),
        )
    finally:
        code = served.stop()
    assert code == 0
    assert {name for name, how in found.items() if how == "SKIP"} == (set() if limits else {"TestQuota"})
    assert {"TestDeepLayers", "TestDiffApply", "TestChanges"} <= set(found)
