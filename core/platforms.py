"""Platforms of images (``linux/arm64/v8``) and the choice of the one that fits.

Names are Go's (``GOOS``, ``GOARCH``), as the OCI image spec's *Image Index* says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from layerfs.errors import InvalidArgument

# uname's machine -> GOARCH, variant
_MACHINES: Final = {
    "x86_64": ("amd64", ""),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "aarch64": ("arm64", "v8"),
    "armv5tel": ("arm", "v5"),
    "armv6l": ("arm", "v6"),
    "armv7l": ("arm", "v7"),
    "armv8l": ("arm", "v7"),
    "loongarch64": ("loong64", ""),
    "ppc64le": ("ppc64le", ""),
    "riscv64": ("riscv64", ""),
    "s390x": ("s390x", ""),
}

# The variant that is meant where none is given.
_USUAL: Final = {"arm64": "v8", "arm": "v7", "amd64": "v1"}

_FORM: Final = re.compile(r"([a-z0-9]+)/([a-z0-9_]+)(?:/([a-z0-9.]+))?")


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image runs on.

    Attributes:
        os, architecture: Go's names.
        variant: of the CPU (``v8``), or ``""``.
    """

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    @property
    def _variant(self) -> str:
        return self.variant or _USUAL.get(self.architecture, "")

    def distance(self, wanted: Platform) -> int | None:
        """How far this is from ``wanted``: 0 fits exactly, more is older but runs, None does not run."""
        if (self.os, self.architecture) != (wanted.os, wanted.architecture):
            return None
        if self._variant == wanted._variant:
            return 0
        ours, theirs = _level(self._variant), _level(wanted._variant)
        # Each level of arm and amd64 runs what was built for a lower one.
        if self.architecture in ("arm", "amd64") and ours is not None and theirs is not None and ours < theirs:
            return theirs - ours
        return None


def _level(variant: str) -> int | None:
    return int(variant[1:]) if re.fullmatch(r"v[0-9]{1,3}", variant) else None


def host() -> Platform:
    """The platform of this machine."""
    machine = os.uname().machine
    return Platform("linux", *_MACHINES.get(machine, (machine, "")))


def parse(text: str) -> Platform:
    """A platform as people write it, ``os/architecture[/variant]``. Raises `InvalidArgument`."""
    if not (match := _FORM.fullmatch(text)):
        raise InvalidArgument(f"{text!r} is no platform; write it as linux/amd64 or linux/arm64/v8")
    return Platform(match[1], match[2], match[3] or "")


def nearest(there: Sequence[Platform], wanted: Platform) -> int | None:
    """The position of the platform that fits ``wanted`` best, the first among equals; None where none does."""
    found = [(far, position) for position, item in enumerate(there) if (far := item.distance(wanted)) is not None]
    return min(found)[1] if found else None
