"""layerfs: container layers on interchangeable storage drivers.

`Store` is the way in: a directory that keeps copy-on-write layers, with the meaning that containerd's snapshotter
interface gives to them. `Driver` is what a storage backend implements; `layerfs.testing` has the suite it must pass.
Everything that is not named here is private.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerfs.backing import BackingSpec
    from layerfs.check import Finding
    from layerfs.driver import (
        BackingNeed,
        Capability,
        Change,
        ChangeKind,
        Driver,
        Mount,
        Probe,
        Problem,
        Upper,
        Usage,
        Whiteouts,
    )
    from layerfs.errors import (
        AlreadyExists,
        BadLayer,
        Damaged,
        EnvironmentUnfit,
        FailedPrecondition,
        InvalidArgument,
        KernelRefused,
        LayerfsError,
        NotFound,
        OutOfSpace,
    )
    from layerfs.layer import Kind, Layer
    from layerfs.settling import Sync
    from layerfs.store import Store

__all__ = [
    "AlreadyExists",
    "BackingNeed",
    "BackingSpec",
    "BadLayer",
    "Capability",
    "Change",
    "ChangeKind",
    "Damaged",
    "Driver",
    "EnvironmentUnfit",
    "FailedPrecondition",
    "Finding",
    "InvalidArgument",
    "KernelRefused",
    "Kind",
    "Layer",
    "LayerfsError",
    "Mount",
    "NotFound",
    "OutOfSpace",
    "Probe",
    "Problem",
    "Store",
    "Sync",
    "Upper",
    "Usage",
    "Whiteouts",
]

# Where each name lives; a module is imported when its first name is used, so that `import layerfs` costs nothing.
_HOMES = {
    "layerfs.backing": ("BackingSpec",),
    "layerfs.check": ("Finding",),
    "layerfs.driver": (
        "BackingNeed",
        "Capability",
        "Change",
        "ChangeKind",
        "Driver",
        "Mount",
        "Probe",
        "Problem",
        "Upper",
        "Usage",
        "Whiteouts",
    ),
    "layerfs.errors": (
        "AlreadyExists",
        "BadLayer",
        "Damaged",
        "EnvironmentUnfit",
        "FailedPrecondition",
        "InvalidArgument",
        "KernelRefused",
        "LayerfsError",
        "NotFound",
        "OutOfSpace",
    ),
    "layerfs.layer": ("Kind", "Layer"),
    "layerfs.settling": ("Sync",),
    "layerfs.store": ("Store",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    try:
        home = _HOME_OF[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
