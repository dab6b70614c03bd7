"""The control: plain files in a plain directory, with no layers and no driver."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import BinaryIO

from layerfs.bench.caches import write_back
from layerfs.bench.content import Base
from layerfs.bench.fingerprint import storage
from layerfs.bench.target import Target
from layerfs.driver import Usage
from layerfs.walk import disk_usage

NATIVE = "native"
"""Its name among the drivers'."""


class NativeTarget(Target):
    """What every driver's figures can be read as a ratio to.

    A "layer" is a directory with a copy of its base, made before anything is clocked and with blocks of its own even
    where the file system could share them. Work on layers as such (mounting, diff, apply) has no meaning here.
    """

    has_layers = False

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self._root = root
        for part in ("bases", "layers"):
            (root / part).mkdir(parents=True)

    def build(self, base: Base) -> None:
        place = self._root / "bases" / base.key
        place.mkdir()
        base.fill(place)

    def create(self, key: str, base: Base | None) -> None:
        place = self._root / "layers" / key
        if base is None:
            place.mkdir()
        else:
            # Python copies with sendfile(2), which never shares blocks.
            shutil.copytree(self._root / "bases" / base.key, place, symlinks=True)

    def mount(self, key: str) -> Path:
        return self._root / "layers" / key

    def unmount(self, key: str) -> None:
        """Nothing is mounted."""

    def remove(self, key: str) -> None:
        shutil.rmtree(self._root / "layers" / key)

    def discard(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.remove(key)

    def write_back(self, *trees: Path) -> None:
        write_back(*trees, self._root)

    def occupied(self, key: str) -> int:
        self.write_back()
        fd = os.open(self._root / "layers" / key, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return disk_usage(fd).size
        finally:
            os.close(fd)

    def commit(self, key: str, name: str) -> None:
        raise NotImplementedError("the native control has no layers")

    def held(self) -> int:
        raise NotImplementedError("the native control has no layers")

    def used(self) -> Usage:
        raise NotImplementedError("the native control has no layers")

    def apply(self, key: str, diff: BinaryIO) -> int:
        raise NotImplementedError("the native control has no layers")

    def diff(self, key: str, out: BinaryIO) -> int:
        raise NotImplementedError("the native control has no layers")

    def facts(self) -> dict[str, object]:
        return {"driver": NATIVE, "options": {}, "capabilities": [], "status": {}, "backing": storage(self._root)}
