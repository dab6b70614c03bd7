"""containerd's and Docker's own test suites for storage drivers, which were not written here, against the two servers.

Debian carries their sources; the small Go programs in ``suites/`` that run them are built for the test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from layerfs import registry
from layerfs.driver import Capability
from layerfs.store import Store
from layerfs.testing.engines import Served, program

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


@pytest.fixture(params=registry.names())
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    probe = registry.load(request.param).probe(tmp_path)
    if not probe.usable:
        pytest.skip(f"{request.param}: {probe.reason}; {probe.remedy}")
    return str(request.param)


def run(program: Path, *arguments: str, **environment: str) -> str:
    """Run a suite; what it says."""
    command = [str(program), "-test.v", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    failed = re.findall(r"^ *--- FAIL: (\S+)", done.stdout, re.MULTILINE)
    assert done.returncode == 0, (failed, done.stdout[-6000:], done.stderr[-2000:])
    return done.stdout


def results(said: str) -> Mapping[str, str]:
    """How each test of a suite ended."""
    return {name: how for how, name in re.findall(r"^ *--- (PASS|FAIL|SKIP): (\S+)", said, re.MULTILINE)}


def test_containerds_suite_for_snapshotters(suites: Suites, driver: str, tmp_path: Path) -> None:
    said = run(
        suites.built("snapshotter"),
        *("-test.root", "-test.parallel", "2", "-test.timeout", "50m"),
        LAYERFS_COMMAND="\n".join(program()),
        LAYERFS_DRIVER=driver,
        TMPDIR=str(tmp_path),
    )
    found = results(said)
    assert found["TestSuite/128LayersMount"] == "PASS"
    # The suite itself leaves this one out.
    assert [name for name, how in found.items() if how == "SKIP"] == ["TestSuite/Rename"]


def test_dockers_suite_for_graph_drivers(suites: Suites, driver: str, tmp_path: Path) -> None:
    served = Served("docker", driver, tmp_path)
    with Store(served.root, driver) as store:
        limits = bool(store.driver.capabilities & Capability.SIZE_LIMIT)
    served.start()
    try:
        said = run(
            suites.built("graphdriver"), SOCKET=str(served.socket), QUOTA="1" if limits else "", TMPDIR=str(tmp_path)
        )
    finally:
        code = served.stop()
    assert code == 0
    found = results(said)
    assert {name for name, how in found.items() if how == "SKIP"} == (set() if limits else {"TestQuota"})
    assert {"TestDeepLayers", "TestDiffApply", "TestChanges"} <= set(found)
