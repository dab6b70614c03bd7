"""The package as users get it: built from the source archive, complete, and with entry points that resolve."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
ROOMS = {"core": "layerfs", "drivers": "layerfs/drivers", "bench": "layerfs/bench"}


def _build(source: Path, kind: str, out: Path) -> Path:
    """Build a ``wheel`` or ``sdist`` as pip does, without fetching anything."""
    program = f"import sys; from setuptools.build_meta import build_{kind}; print(build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        check=True,
    )
    return out / done.stdout.splitlines()[-1]


def _ignored(folder: str, names: list[str]) -> set[str]:
    """What is no source: caches, and links that a development environment may have put there."""
    return {name for name in names if name == "__pycache__" or os.path.islink(os.path.join(folder, name))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("source")
    for room in ROOMS:
        shutil.copytree(TOP / room, copy / room, ignore=_ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / file, copy)
    return copy


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel, built from the source archive, is unpacked; installing a pure wheel is just that."""
    out = tmp_path_factory.mktemp("built")
    with tarfile.open(_build(source, "sdist", out)) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in every 3.11
        archive.extractall(out, **safe)  # type: ignore[arg-type]  # noqa: S202 - we have just made it
        unpacked = out / archive.getnames()[0].split("/")[0]
    with zipfile.ZipFile(_build(unpacked, "wheel", out)) as wheel:
        wheel.extractall(out / "site")  # noqa: S202 - we have just made it
    return out / "site"


def test_the_wheel_has_every_module(source: Path, installed: Path) -> None:
    expected = {
        f"{package}/{file.relative_to(source / room)}"
        for room, package in ROOMS.items()
        for file in (source / room).rglob("*.py")
    }
    found = {str(file.relative_to(installed)) for file in installed.rglob("*.py")}
    assert found == expected  # a package that is missing here has to be listed in pyproject.toml


def test_the_wheel_says_that_it_is_typed_and_under_which_licence(installed: Path) -> None:
    assert (installed / "layerfs/py.typed").is_file()
    (metadata,) = installed.glob("layerfs-*.dist-info")
    assert (metadata / "licenses/LICENSE").read_text() == (TOP / "LICENSE").read_text()
    assert "License-Expression: Apache-2.0" in (metadata / "METADATA").read_text()


def test_the_wheel_has_every_file_of_data(source: Path, installed: Path) -> None:
    expected = {
        f"{package}/{file.relative_to(source / room)}"
        for room, package in ROOMS.items()
        for pattern in ("*.css", "*.csv", "*.toml")
        for file in (source / room).rglob(pattern)
    }
    assert "layerfs/bench/report/page.css" in expected
    assert not [name for name in expected if not (installed / name).is_file()]


def test_entry_points_resolve_to_what_they_name(installed: Path) -> None:
    program = """
import sys
from importlib.metadata import distribution
import layerfs
from layerfs.driver import Driver

assert layerfs.__file__.startswith(sys.argv[1]), layerfs.__file__
for point in distribution("layerfs").entry_points:
    loaded = point.load()
    if point.group == "layerfs.drivers":
        assert issubclass(loaded, Driver) and loaded.name == point.name, point
    else:
        assert callable(loaded), point
    print(point.group, point.name)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(installed)],
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "console_scripts layerfs" in done.stdout
    assert "layerfs.drivers overlay2" in done.stdout


def test_the_help_needs_nothing_that_is_slow_to_import() -> None:
    program = """
import sys
from layerfs.cli import main

sys.argv = ["layerfs", "--help"]
main()
slow = {"rich", "humanize", "sqlite3", "subprocess", "asyncio", "layerfs.bench", "layerfs.store", "importlib.metadata"}
slow |= {"grpc", "google.protobuf", "layerfs.serve", "prometheus_client"}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
