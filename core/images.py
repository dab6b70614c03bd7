"""The images of a store: import, export, list, remove.

An image is a name for a chain of committed layers, keyed by their chain IDs and shared by all images that have them,
and for the manifest and configuration that it came with. Its row in the database is written last and removed first,
so that a crash leaves at most layers and blobs that `Images.collect_garbage` finds.
"""

from __future__ import annotations

import builtins
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from layerfs import adopt, digest, imageexport, oci, platforms, sources
from layerfs.database import Database, ImageRow, checked_text
from layerfs.errors import AlreadyExists, FailedPrecondition, InvalidArgument, LayerfsError, NotFound
from layerfs.imageblobs import ImageBlobs
from layerfs.layer import Kind, Layer
from layerfs.reserve import Reserve
from layerfs.sourceimage import Candidate, SourceImage
from layerfs.unpacking import BlobLayer

if TYPE_CHECKING:
    from layerfs.store import Store

Progress = Callable[[int, int, str], object]
"""Is called with bytes done, bytes in all, and what is being done; also from other threads than the caller's."""


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a store.

    Attributes:
        name: any string.
        digest: of its manifest, ``sha256:…``.
        config_digest: of its configuration; engines call this the image's ID.
        top: key of its top layer, which is a chain ID; ``""`` where it has no layers.
        created: when it came into the store, in UTC.
        size: bytes of its layers' blobs as they came in.
        layers: keys of its layers from the bottom up.
        platform: ``os/architecture[/variant]``.
    """

    name: str
    digest: str
    config_digest: str
    top: str
    created: datetime
    size: int
    layers: tuple[str, ...]
    platform: str


class Images:
    """The images of ``store``, which reaches this object as its attribute ``images``."""

    def __init__(self, store: Store, database: Database, reserve: Reserve) -> None:
        self._store = store
        self._database = database
        self._reserve = reserve
        self._blobs = ImageBlobs(store.root)

    def import_(
        self,
        source: Path,
        *,
        kind: str | None = None,
        name: str | None = None,
        platform: str | None = None,
        progress: Progress | None = None,
    ) -> builtins.list[Image]:
        """Import what is in an OCI layout (folder or tar), in a docker archive, or in another program's own store.

        Args:
            kind: whose store the directory ``source`` is, one of `layerfs.adopt.KINDS`; by default it is no such.
            name: of the image in the store; where the source has several images, also which of them is meant. By
                default every image of the source is imported under each of its own names.
            platform: as ``linux/arm64/v8``; by default the host's.

        Every blob is verified against its digest and size, every layer against its diff ID. Layers that the store has
        are not read again. An image that the store has under the same name already is no error.

        Raises `BadLayer`, `NotFound` (the source), `AlreadyExists` (another image has the name), `InvalidArgument`
        (no image of that name or platform), and what `Store.unpack` raises.
        """
        wanted = None if platform is None else platforms.parse(platform)
        checked_text("the image's name", [name] if name is not None else [])
        if name == "":
            raise InvalidArgument("an image needs a name that is not empty")
        found: list[Image] = []
        opened = sources.opened(source, self._store.root) if kind is None else adopt.opened(kind, source)
        with opened as candidates, self._blobs.locked():
            for candidate, names in _chosen(candidates, name, source):
                image = candidate.load(wanted)
                self._check_names(names, image.config)
                self._unpack(image, f"{source}", progress)
                chain = digest.chain_ids(image.parsed.diff_ids)
                found += [self._record(name, image.manifest, image.config, chain) for name in names]
        return found

    def _check_names(self, names: tuple[str, ...], config: bytes) -> None:
        for name in names:
            row = self._database.image(name)
            if row is not None and row.config_digest != digest.of(config):
                raise AlreadyExists(f"another image has the name {name!r}; remove it, or give this one another name")

    def _unpack(self, image: SourceImage, what: str, progress: Progress | None) -> None:
        chain = digest.chain_ids(image.parsed.diff_ids)
        count = _Count(sum(layer.size for layer in image.layers), progress)
        layers = [
            _blob_layer(image, number, chain_id, f"{what}: layer {number + 1} of {len(chain)}", count)
            for number, chain_id in enumerate(chain)
        ]
        for layer in image.layers:
            image.open(layer).close()  # a blob that is missing is found before any work is done
        self._store.unpack(layers)

    def _record(self, name: str, manifest: bytes, config: bytes, chain: builtins.list[str]) -> Image:
        manifest_digest, config_digest = self._blobs.put(manifest), self._blobs.put(config)
        with self._database.transaction(durable=True):
            self._check_names((name,), config)
            if (row := self._database.image(name)) is None:
                created = datetime.now(UTC).isoformat()
                self._database.put_image(name, manifest_digest, config_digest, chain[-1] if chain else "", created)
        return self._image(row) if row else self.get(name)

    def get(self, name: str) -> Image:
        """One image. Raises `NotFound`; `Damaged` where its documents are."""
        row = self._database.image(name)
        if row is None:
            raise NotFound(f"there is no image {name!r}")
        return self._image(row)

    def list(self) -> builtins.list[Image]:
        """All images, by name."""
        return [self._image(row) for row in self._database.images()]

    def config(self, name: str) -> Mapping[str, Any]:
        """An image's configuration, as the OCI image spec defines it. Raises `NotFound`; `Damaged`."""
        row = self._database.image(name)
        if row is None:
            raise NotFound(f"there is no image {name!r}")
        return self._documents(row)[0].document

    def _image(self, row: ImageRow) -> Image:
        config, manifest = self._documents(row)
        return Image(
            name=row.name,
            digest=row.manifest_digest,
            config_digest=row.config_digest,
            top=row.top_chain_id,
            created=datetime.fromisoformat(row.created),
            size=sum(layer.size for layer in manifest.layers),
            layers=tuple(digest.chain_ids(config.diff_ids)),
            platform=str(config.platform),
        )

    def _documents(self, row: ImageRow) -> tuple[oci.Config, oci.Manifest]:
        return (
            oci.parse_config(self._blobs.get(row.config_digest), f"the configuration of the image {row.name!r}"),
            oci.parse_manifest(self._blobs.get(row.manifest_digest), f"the manifest of the image {row.name!r}"),
        )

    def documents(self, name: str) -> tuple[bytes, bytes]:
        """The bytes of an image's manifest and configuration. Raises `NotFound`, `Damaged`."""
        with self._blobs.locked():
            row = self._database.image(name)
            if row is None:
                raise NotFound(f"there is no image {name!r}")
            return self._blobs.get(row.manifest_digest), self._blobs.get(row.config_digest)

    def coming(self) -> AbstractContextManager[None]:
        """Within the context, layers that came with an image are no garbage though no image has them yet."""
        return self._blobs.locked()

    def put(self, name: str, manifest: bytes, config: bytes) -> Image:
        """Give an image a name whose layers the store has already.

        Raises `NotFound` where it lacks one, `AlreadyExists` where another image has the name.
        """
        parsed = oci.parse_config(config, f"the configuration of the image {name!r}")
        with self._blobs.locked():
            chain = digest.chain_ids(parsed.diff_ids)
            for key in chain:
                self._store.stat(key)
            return self._record(name, manifest, config, chain)

    def export(self, name: str, dest: Path, *, compression: str = "gzip", progress: Progress | None = None) -> Image:
        """Write an image, or a committed layer as an image, into an OCI layout.

        Args:
            name: an image, else a committed layer. A layer's configuration is that of the image it stands on with the
                new layers added; of several images on one layer, the first by name counts.
            dest: a folder (new, empty, or an OCI layout, which keeps its other images), or a tar if it ends in
                ``.tar``.
            compression: of the layers: ``gzip``, ``zstd`` or ``none``.

        The same image gives the same bytes each time. New layers' times are ``SOURCE_DATE_EPOCH``, where that is set.

        Raises `NotFound`, `FailedPrecondition` (the layer is not committed, ``dest`` is something else), `Damaged`.
        """
        exporter = imageexport.Exporter(self._store, dest, compression, progress)
        with self._blobs.locked():
            row = self._database.image(name)
            content = self._layer_content(name) if row is None else self._image_content(row)
            written = exporter.write(name, content)
        return Image(
            name=name,
            digest=written.digest,
            config_digest=written.config_digest,
            top=content.layers[-1].key if content.layers else "",
            created=datetime.fromisoformat(row.created) if row else content.layers[-1].created,
            size=written.size,
            layers=tuple(layer.key for layer in content.layers),
            platform=str(written.config.platform),
        )

    def _image_content(self, row: ImageRow) -> imageexport.Content:
        config, manifest = self._documents(row)
        layers = [self._store.stat(key) for key in digest.chain_ids(config.diff_ids)]
        return imageexport.Content(layers, self._blobs.get(row.config_digest), config.diff_ids, manifest.annotations)

    def _layer_content(self, name: str) -> imageexport.Content:
        try:
            chain = self._chain(name)
        except NotFound:
            raise NotFound(f"there is no image or layer {name!r}") from None
        if chain[-1].kind is not Kind.COMMITTED:
            raise FailedPrecondition(f"the layer {name!r} is {chain[-1].kind}; commit it before it is exported")
        for position in range(len(chain), 0, -1):
            if (base := self._database.image_on(chain[position - 1].key)) is not None:
                row = self._database.image(base)
                assert row is not None
                config, _ = self._documents(row)
                return imageexport.Content(chain, self._blobs.get(row.config_digest), config.diff_ids, {})
        return imageexport.Content(chain, oci.dump(oci.minimal_config(platforms.host())), (), {})

    def _chain(self, key: str) -> builtins.list[Layer]:
        """A layer and its ancestors, from the bottom up. Raises `NotFound`."""
        chain = []
        while key:
            chain.append(self._store.stat(key))
            key = chain[-1].parent
        return chain[::-1]

    def defects(self) -> Iterator[tuple[str, str]]:
        """The name of each image that lacks something, and a sentence of what."""
        for row in self._database.images():
            try:
                layers = self._image(row).layers
            except LayerfsError as error:
                yield row.name, str(error)
                continue
            missing = [key for key in layers if self._database.find(key) is None]
            if missing:
                yield row.name, f"the image {row.name!r} lacks the layer {missing[0]}; remove it and import it again"

    # -- removing --------------------------------------------------------------------------------------------------

    def remove(self, name: str) -> None:
        """Remove an image, and those of its layers that nothing else uses, the newest first. Raises `NotFound`."""
        with self._blobs.locked(alone=True):
            row = self._database.image(name)
            if row is None:
                raise NotFound(f"there is no image {name!r}")
            self._reserve.use()
            self._database.delete_image(name)
            self._remove_unused(row.top_chain_id)
            self._sweep()

    def collect_garbage(self) -> builtins.list[str]:
        """Remove what interrupted imports and removals have left: blobs and layers of no image.

        Returns a sentence for each thing that was removed. Waits for imports that are under way.
        """
        with self._blobs.locked(alone=True):
            done = []
            for key in self._orphans():
                done += [f"removed the layer {key}, which no image has any more" for key in self._remove_unused(key)]
            return done + [f"removed the blob {name}, which no image has any more" for name in self._sweep()]

    def _remove_unused(self, key: str) -> builtins.list[str]:
        """Remove a layer and its ancestors as far as nothing else uses them; the keys of those removed."""
        removed: builtins.list[str] = []
        with contextlib.suppress(NotFound):  # a user may have removed it
            while key and self._database.image_on(key) is None:
                parent = self._store.stat(key).parent
                try:
                    self._store.remove(key)
                except FailedPrecondition:  # it has children, or is mounted
                    break
                removed.append(key)
                key = parent
        return removed

    def _orphans(self) -> builtins.list[str]:
        """The layers that images brought and none has any more, the newest first."""
        return [key for key in self._database.unpacked() if self._database.image_on(key) is None]

    def _sweep(self) -> builtins.list[str]:
        rows = self._database.images()
        used = {row.manifest_digest for row in rows} | {row.config_digest for row in rows}
        return [*self._blobs.sweep(used)]


def _chosen(candidates: list[Candidate], name: str | None, source: Path) -> list[tuple[Candidate, tuple[str, ...]]]:
    """The images that are to be imported, each with the names that it gets."""
    if not candidates:
        raise InvalidArgument(f"{source} has no images")
    if name is None:
        return [(item, item.names or (sources.default_name(source),)) for item in candidates]
    named = [item for item in candidates if name in item.names] or candidates
    if len(named) > 1:
        listing = ", ".join(repr(name) for item in candidates for name in item.names or ("one without a name",))
        raise InvalidArgument(f"{source} has several images, and none is called {name!r}: {listing}")
    return [(named[0], (name,))]


class _Count:
    """Adds up what the readers of several layers have read."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done: dict[int, int] = {}
        self._lock = threading.Lock()

    def reset(self, number: int) -> None:
        """Layer ``number`` is read from its beginning."""
        with self._lock:
            self._done[number] = 0

    def add(self, number: int, size: int, what: str) -> None:
        if self._progress is not None:
            with self._lock:
                self._done[number] += size
                self._progress(sum(self._done.values()), self._total, what)


def _blob_layer(image: SourceImage, number: int, chain_id: str, what: str, count: _Count) -> BlobLayer:
    blob, diff_id = image.layers[number], image.parsed.diff_ids[number]

    def open_blob() -> BinaryIO:
        count.reset(number)
        # A plain blob whose digest is its diff ID is verified by that.
        expected = None if blob.digest == diff_id else blob.digest
        counted = partial(count.add, number, what=what)
        return digest.VerifyingReader(image.open(blob), expected, blob.size, what, counted)  # type: ignore[return-value]

    return BlobLayer(diff_id, chain_id, blob.size, open_blob)
