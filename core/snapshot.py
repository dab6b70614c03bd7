"""What snapshot drivers share: a volume holds its whole tree, and a child begins as a copy that shares what it can."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from os import stat_result
from pathlib import Path

from layerfs import mounts, walk
from layerfs.changes import compare
from layerfs.driver import Change, Driver, Mount


class SnapshotDriver(Driver):
    """A driver whose volumes are whole trees; `mounts` is for those that keep each in a directory."""

    @abstractmethod
    def tree_path(self, volume: str) -> Path:
        """The directory that holds the volume's tree."""

    def unchanged(
        self,
        volume: str,  # noqa: ARG002
        parents: Sequence[str],  # noqa: ARG002
    ) -> Callable[[stat_result, stat_result], bool] | None:
        """What tells that an inode of the volume is exactly its parent's, see `layerfs.changes.compare`.

        None where the backend keeps no such record.
        """
        return None

    def mounts(self, volume: str, parents: Sequence[str], *, read_only: bool = False) -> list[Mount]:  # noqa: ARG002
        return [Mount("bind", str(self.tree_path(volume)), ("bind", "ro" if read_only else "rw"))]

    def changes(self, volume: str, parents: Sequence[str], old: int | None, new: int) -> Iterator[Change]:
        known = None if old is None else self.unchanged(volume, parents)
        yield from compare(old, new, unchanged=known)

    def uncache(self, volume: str, parents: Sequence[str]) -> None:
        with mounts.opened(self.mounts(volume, parents, read_only=True)) as tree:
            walk.uncache(tree)
