"""Finding drivers by name, also those of other packages."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from layerfs import registry
from layerfs.driver import Driver
from layerfs.errors import EnvironmentUnfit, InvalidArgument


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installs a package that announces a driver, one that is none, one that fails, and one with a name of ours."""
    info = tmp_path / "other_drivers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-drivers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[layerfs.drivers]\n"
        "mine = other_drivers:Mine\n"
        "nodriver = other_drivers:nothing\n"
        "broken = other_drivers_broken:Driver\n"
        "vfs = other_drivers:Mine\n"
    )
    (tmp_path / "other_drivers.py").write_text(
        "from layerfs.drivers.vfs import VfsDriver\nnothing = 1\nclass Mine(VfsDriver):\n    name = 'mine'\n"
    )
    (tmp_path / "other_drivers_broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_names_are_sorted_and_cost_no_import() -> None:
    for module in [name for name in sys.modules if name.startswith("layerfs.drivers.")]:
        del sys.modules[module]
    names = registry.names()
    assert names == sorted(names)
    assert {"btrfs", "overlay2", "vfs"} <= set(names)
    assert not any(name.startswith("layerfs.drivers.") for name in sys.modules)


@pytest.mark.parametrize("name", sorted(registry.OWN))
def test_our_drivers_load_under_their_own_names(name: str) -> None:
    driver = registry.load(name)
    assert issubclass(driver, Driver)
    assert driver.name == name
    assert driver.summary


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match=r"'devicemaper'.*btrfs.*overlay2.*vfs"):
        registry.load("devicemaper")


@pytest.mark.usefixtures("other_package")
def test_drivers_of_other_packages_are_found() -> None:
    assert {"mine", "btrfs"} <= set(registry.names())
    assert registry.load("mine").name == "mine"


@pytest.mark.usefixtures("other_package")
def test_nobody_takes_one_of_our_names() -> None:
    assert registry.load("vfs").__module__ == "layerfs.drivers.vfs"


@pytest.mark.usefixtures("other_package")
@pytest.mark.parametrize(
    ("name", "reason"), [("broken", "a_module_that_is_not_there"), ("nodriver", "no subclass of layerfs.Driver")]
)
def test_a_broken_driver_says_so_and_the_others_work(name: str, reason: str) -> None:
    with pytest.raises(EnvironmentUnfit, match=reason):
        registry.load(name)
    assert registry.load("overlay2").name == "overlay2"


def test_the_table_is_what_the_package_announces() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["layerfs.drivers"] == registry.OWN
