"""Writes an image, or a chain of layers as an image, into an OCI layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from layerfs import layout, oci
from layerfs.compression import Compressor
from layerfs.epoch import source_date_epoch
from layerfs.errors import Damaged, InvalidArgument
from layerfs.layer import Layer

if TYPE_CHECKING:
    from layerfs.store import Store

# What the image spec allows in the annotation org.opencontainers.image.ref.name.
_PART: Final = r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*"
_REF: Final = re.compile(rf"{_PART}(?:/{_PART})*")


@dataclass(frozen=True, slots=True)
class Content:
    """What is to be written.

    Attributes:
        layers: from the bottom up.
        config: the configuration of the image at the bottom; its bytes are written as they are unless there are more
            layers.
        diff_ids: of that configuration; ``layers`` may have more.
        annotations: of the manifest.
    """

    layers: Sequence[Layer]
    config: bytes
    diff_ids: Sequence[str]
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: the manifest's and the configuration's digests, the configuration, bytes of layers' blobs."""

    digest: str
    config_digest: str
    config: oci.Config
    size: int


def reference(name: str) -> str:
    """What OCI allows of a name: its tag, else all of it, else ``latest``."""
    tag = name.rpartition("/")[2].rpartition(":")[2]
    return next((text for text in (tag, name) if _REF.fullmatch(text)), "latest")


class Exporter:
    """Writes one image to ``target``.

    Args:
        compression: of the layers: ``gzip``, ``zstd`` or ``none``.
        progress: bytes done, bytes in all, what; in bytes that the layers occupy.
    """

    def __init__(
        self, store: Store, target: Path, compression: str, progress: Callable[[int, int, str], object] | None
    ) -> None:
        if compression not in oci.LAYER_TYPES:
            raise InvalidArgument(f"compression {compression!r} is not known; there are {', '.join(oci.LAYER_TYPES)}")
        self._store = store
        self._target = target
        self._compression = compression
        self._progress = progress
        self._epoch = source_date_epoch()

    def write(self, name: str, content: Content) -> Exported:
        """Write it under ``name``. Raises `Damaged` where a layer's content is not what its diff ID says."""
        with layout.writer(self._target) as out:
            written: dict[str, oci.Descriptor] = {}
            diff_ids: list[str] = []
            layers: list[oci.Descriptor] = []
            meter = _Meter(self._store, content.layers, self._progress)
            expected = [*content.diff_ids, *("" for _ in content.layers[len(content.diff_ids) :])]
            for layer, diff_id in zip(content.layers, expected, strict=True):
                # The times in a new layer may be later than the epoch, and its diff ID another than the store's then.
                known = diff_id or (layer.diff_id if self._epoch is None else "")
                if known not in written:
                    descriptor, known = self._write_layer(out, layer, known, meter)
                    written[known] = descriptor
                meter.finished(layer)
                layers.append(written[known])
                diff_ids.append(known)
            data = self._config(content, diff_ids)
            config = out.add_bytes(oci.CONFIG, data)
            manifest = out.add_bytes(oci.MANIFEST, oci.make_manifest(config, layers, content.annotations))
            out.finish(replace(manifest, annotations=_names(name)))
        parsed = oci.parse_config(data, "the configuration")
        return Exported(manifest.digest, config.digest, parsed, sum(layer.size for layer in layers))

    def _write_layer(
        self, out: layout.LayoutWriter, layer: Layer, expected: str, meter: _Meter
    ) -> tuple[oci.Descriptor, str]:
        found = ""

        def write(blob: BinaryIO) -> None:
            nonlocal found
            with Compressor(blob, self._compression) as compressor:
                epoch = None if expected else self._epoch  # what is known already was written without
                found = self._store.diff(layer.key, meter.through(layer, compressor), source_date_epoch=epoch).diff_id
            if expected and found != expected:
                raise Damaged(f"the layer {layer.key!r} has the diff ID {found}, but should have {expected}")

        descriptor = out.add(oci.LAYER_TYPES[self._compression], write)
        return descriptor, found

    def _config(self, content: Content, diff_ids: Sequence[str]) -> bytes:
        added = content.layers[len(content.diff_ids) :]
        if not added:
            return content.config
        base = oci.parse_json(content.config, "the configuration")
        return oci.extend_config(base, diff_ids[len(content.diff_ids) :], [self._created(layer) for layer in added])

    def _created(self, layer: Layer) -> str:
        time = layer.created if self._epoch is None else datetime.fromtimestamp(self._epoch, UTC)
        return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _names(name: str) -> dict[str, str]:
    names = {oci.REF_NAME: reference(name)}
    if ":" in name and _REF.fullmatch(name):
        names[oci.FULL_NAME] = name
    return names


class _Meter:
    """Tells how much of the layers is written."""

    def __init__(
        self, store: Store, layers: Sequence[Layer], progress: Callable[[int, int, str], object] | None
    ) -> None:
        self._progress = progress
        # What a layer occupies is about the length of its diff, which nobody knows before it is written.
        self._sizes = {layer.key: store.usage(layer.key).size for layer in layers} if progress else {}
        self._total = sum(self._sizes.values())
        self._done = 0

    def through(self, layer: Layer, out: Any) -> BinaryIO:
        return out if self._progress is None else _Counted(self, layer, out)  # type: ignore[return-value]

    def tell(self, layer: Layer, written: int) -> None:
        if self._progress is not None:
            self._progress(self._done + min(written, self._sizes[layer.key]), self._total, f"layer {layer.key}")

    def finished(self, layer: Layer) -> None:
        if self._progress is not None:
            self._done += self._sizes[layer.key]
            self._progress(self._done, self._total, f"layer {layer.key}")


class _Counted:
    """A file to write to that tells a meter."""

    def __init__(self, meter: _Meter, layer: Layer, out: BinaryIO) -> None:
        self._meter = meter
        self._layer = layer
        self._out = out
        self._written = 0

    def write(self, data: Any) -> int:
        size = self._out.write(data)
        self._written += size
        self._meter.tell(self._layer, self._written)
        return size
