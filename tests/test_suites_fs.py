"""File-system test suites that were not written here, on a mounted layer of every driver and on unions of mount(8).

Nothing may fail that passes in a plain directory beside it. `nox -s suites_fs` runs them; they take minutes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from layerfs import mounts, registry
from layerfs.backing import DIRECTORY, Backing, BackingSpec
from layerfs.programs import find
from layerfs.testing.guests import every_driver
from layerfs.testing.workbench import Workbench

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
    pytest.mark.timeout(1800),
]

UNION = "fuse.layerfs-aufs"
PROGRAM = shutil.which("layerfs-aufs", path=f"{Path(sys.executable).parent}:{os.defpath}")

# Of stress-ng's class those that have nothing to do with the directory that they are given.
_ELSEWHERE = "access,bind-mount,binderfs,dup,eventfd,procfs"


def stress_ng(place: Path, _scratch: Path) -> set[str]:
    """One second of each stressor; those that failed."""
    command = ["stress-ng", "--class", "filesystem", "--exclude", _ELSEWHERE, "--sequential", "1", "--timeout", "1"]
    done = _run(*command, "--verify", "--temp-path", str(place))
    assert "successful run completed" in done.stdout or "unsuccessful run" in done.stdout, done.stdout
    return set(re.findall(r"stress-ng: fail: +\[\d+\] ([\w-]+)[: ].*", done.stdout))


def fio(place: Path, scratch: Path) -> set[str]:
    """Written in random and sequential order by system calls and mappings, and read again with checksums."""
    options = ["--size=32M", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"]
    jobs = []
    for engine in ("psync", "mmap", "libaio", "pvsync2"):
        for pattern in ("write", "randwrite", "randrw"):
            jobs += [f"--name={engine}-{pattern}", f"--ioengine={engine}", f"--rw={pattern}", "--stonewall"]
            jobs += ["--bsrange=512-64k", "--fsync=64", f"--directory={place}", *options]
    report = scratch / "fio.json"
    _run("fio", "--output-format=json", f"--output={report}", *jobs)
    text = report.read_text()
    found = json.loads(text[text.index("{") :])["jobs"]
    assert len(found) == 12
    return {job["jobname"] for job in found if job["error"]}


def python(place: Path, scratch: Path) -> set[str]:
    """The parts of CPython's regression tests that are about files; the test cases that failed."""
    parts = "bufio fcntl file file_eintr fileio filecmp genericpath glob io largefile mailbox mmap os pathlib posix"
    parts += " posixpath shelve shutil stat tarfile tempfile zipfile dbm_dumb sqlite3"
    report = scratch / "python.xml"
    names = [f"test_{name}" for name in parts.split()]
    # Root is not refused what the tests expect to be refused; the rest is the same for all.
    _run("/usr/bin/python3", "-m", "test", "--tempdir", str(place), "--junit-xml", str(report), *names)
    cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314 - written here
    assert len(cases) > 1000
    return {case.get("name", "") for case in cases if {child.tag for child in case} & {"error", "failure"}}


def dbench(place: Path, _scratch: Path) -> set[str]:
    """What an office did to a file server, by four clients at once."""
    done = _run("dbench", "-D", str(place), "-t", "10", "4")
    return set() if "Throughput" in done.stdout else {done.stdout[-500:]}


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


SUITES: dict[str, tuple[Callable[[Path, Path], set[str]], str]] = {
    "stress-ng": (stress_ng, "stress-ng"),
    "fio": (fio, "fio"),
    "python": (python, "/usr/lib/python3.11/test/test_os.py"),
    "dbench": (dbench, "dbench"),
}


@pytest.fixture(params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    needed = SUITES[name][1]
    if not (os.path.exists(needed) or find(needed)):
        pytest.skip(f"{needed} is not installed; .ci/packages says what has it")
    return name


@pytest.fixture(scope="module")
def plainly(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], set[str]]:
    """What fails of a suite in a plain directory, on the same machine and file system."""

    @cache
    def failing(name: str) -> set[str]:
        place = tmp_path_factory.mktemp("plain")
        place.chmod(0o755)
        return SUITES[name][0](place, tmp_path_factory.mktemp("scratch"))

    return failing


@contextmanager
def layer_of(driver: str, place: Path) -> Iterator[tuple[Path, Path]]:
    """A writable layer on one that holds something, and a plain directory on the same file system."""
    kind = registry.load(driver)
    if not (probe := kind.probe(place)).usable:
        pytest.skip(probe.reason)
    filesystem = (*kind.needs.filesystems, DIRECTORY)[0]
    size = None if filesystem == DIRECTORY else 4 << 30
    backing = Backing.create(place / "backing", BackingSpec(filesystem, size=size))
    try:
        backing.up()
        (backing.path / "driver").mkdir(mode=0o700)
        bench = Workbench(kind(backing.path / "driver"))
        base = bench.prepare()
        with bench.mounted(base) as root:
            (root / "below").write_bytes(b"below")
        bench.seal(base)
        child = bench.prepare(base)
        target = place / "mounted"
        target.mkdir()
        for mount in bench.driver.mounts(child, bench.ancestry[child]):
            mounts.attach([mount], target)
        try:
            plain = backing.path / "plain"
            plain.mkdir()
            yield target, plain
            assert (target / "below").read_bytes() == b"below"
        finally:
            mounts.unmount(target)
        for volume in (child, base):
            bench.remove(volume)
        bench.driver.close()
    finally:
        backing.destroy()


@contextmanager
def union_of_mount(place: Path) -> Iterator[tuple[Path, Path]]:
    """What ``mount -t fuse.layerfs-aufs`` gives, and a plain directory.

    Its helper is called by itself, for mount(8) keeps no PATH.
    """
    if PROGRAM is None:
        pytest.skip("layerfs-aufs is not beside this interpreter")
    for name in ("one", "two", "upper", "work", "target", "plain"):
        (place / name).mkdir()
    (place / "two/below").write_bytes(b"below")
    options = f"lowerdir={place}/one:{place}/two,upperdir={place}/upper,workdir={place}/work"
    helper = ["mount.fuse3", "somewhere", str(place / "target"), "-t", UNION, "-o", options]
    subprocess.run(helper, env=os.environ | {"PATH": f"{Path(PROGRAM).parent}:{os.environ['PATH']}"}, check=True)
    try:
        yield place / "target", place / "plain"
        assert (place / "target/below").read_bytes() == b"below"  # the daemon is alive
    finally:
        mounts.unmount(place / "target")


@pytest.mark.parametrize("where", [UNION, *(driver for driver in every_driver() if driver.values != ("vfs",))])
def test_nothing_fails_that_a_plain_directory_passes(
    where: str, suite: str, tmp_path: Path, plainly: Callable[[str], set[str]]
) -> None:
    tmp_path.chmod(0o755)
    with union_of_mount(tmp_path) if where == UNION else layer_of(where, tmp_path) as (place, plain):
        place.chmod(0o755)
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        found = SUITES[suite][0](place, scratch) - plainly(suite)
        if found:  # such as what zfs-fuse cannot do anywhere
            plain.chmod(0o755)
            found -= SUITES[suite][0](plain, scratch)
    assert sorted(found) == []
