"""Finds drivers by name: those of this package, and those that other packages give as entry points.

Another package announces a driver in its pyproject.toml::

    [project.entry-points."layerfs.drivers"]
    mine = "my_package:MyDriver"
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from layerfs.driver import Driver
from layerfs.errors import EnvironmentUnfit, InvalidArgument

GROUP = "layerfs.drivers"

# Ours need no installed metadata, so that a source tree works as it is; a test holds pyproject.toml to this table.
OWN = {
    "aufs": "layerfs.drivers.aufs.driver:AufsDriver",
    "btrfs": "layerfs.drivers.btrfs:BtrfsDriver",
    "devicemapper": "layerfs.drivers.devicemapper:DevicemapperDriver",
    "overlay2": "layerfs.drivers.overlay2:Overlay2Driver",
    "vfs": "layerfs.drivers.vfs:VfsDriver",
    "zfs": "layerfs.drivers.zfs:ZfsDriver",
}


def names() -> list[str]:
    """The names of all drivers, sorted. None of them is imported for that."""
    return sorted(_found())


def load(name: str) -> type[Driver]:
    """Import the driver ``name`` and return its class.

    Raises `InvalidArgument` for an unknown name, listing the known ones, and `EnvironmentUnfit` for a driver that
    cannot be imported or is none.
    """
    found = _found()
    if name not in found:
        raise InvalidArgument(f"there is no driver {name!r}; the known ones are {', '.join(sorted(found))}")
    point = found[name]
    try:
        driver = point.load()
    except Exception as error:  # another package's import may fail in any way
        text = f"the driver {name!r} ({point.value}) cannot be imported: {error or type(error).__name__}"
        raise EnvironmentUnfit(f"{text}; install what it needs, or remove the package that announces it") from error
    if not (isinstance(driver, type) and issubclass(driver, Driver)):
        raise EnvironmentUnfit(f"the driver {name!r} ({point.value}) is no subclass of layerfs.Driver; fix its package")
    return driver


def _found() -> dict[str, EntryPoint]:
    others = {point.name: point for point in entry_points(group=GROUP)}
    return others | {name: EntryPoint(name, value, GROUP) for name, value in OWN.items()}
