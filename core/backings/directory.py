"""The backing that is nothing but a directory of the file system that is there."""

from __future__ import annotations

from layerfs.backings.kind import BackingSpec, Kind, refuse_pool_settings
from layerfs.errors import InvalidArgument


class Directory(Kind):
    """``dir``: nothing is made, mounted or grown."""

    @classmethod
    def validate(cls, spec: BackingSpec) -> None:
        if spec.size is not None or spec.device is not None:
            raise InvalidArgument("a backing of kind 'dir' takes neither a size nor a device")
        refuse_pool_settings(spec)

    def prepare(self, *, force: bool) -> BackingSpec:  # noqa: ARG002
        return self.spec

    def make(self) -> None:
        pass

    def is_up(self) -> bool:
        return self.path.is_dir()

    def up(self) -> None:
        pass

    def down(self) -> None:
        pass

    def enlarge(self, size: int) -> BackingSpec:  # noqa: ARG002
        raise InvalidArgument("a backing of kind 'dir' has no size of its own; grow the file system it is on")

    def grow(self) -> None:
        pass

    def erase(self) -> None:
        pass
