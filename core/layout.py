"""OCI image layouts, as a folder or as a tar of one: reading blobs by digest, and writing.

A blob is found by its digest alone, which has been checked to be one, so that no document can name another file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tarfile
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

from layerfs import digest, oci
from layerfs.archive import Archive
from layerfs.errors import BadLayer, FailedPrecondition, InvalidArgument, refused

_MARKER: Final = "oci-layout"
_INDEX: Final = "index.json"
_MARKER_TEXT: Final = b'{"imageLayoutVersion":"1.0.0"}'


def _blob_name(name: str) -> str:
    return f"blobs/{digest.ALGORITHM}/{digest.encoded(name)}"


class Layout(ABC):
    """A layout that is read. ``name`` is its path, for error texts."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def _open(self, name: str) -> BinaryIO:
        """A file of the layout; `BadLayer` where it is missing."""

    @abstractmethod
    def size(self, blob: str) -> int | None:
        """Bytes of the blob with this digest; None where it is missing."""

    def index(self) -> bytes:
        """The bytes of ``index.json``. Raises `BadLayer` where it or the layout's version is not as it should be."""
        marker = oci.parse_json(self._document(_MARKER), f"{self.name}: {_MARKER}")
        version = oci.text_of(marker, "imageLayoutVersion", f"{self.name}: {_MARKER}")
        if not version.startswith("1."):
            raise BadLayer(f"{self.name} is an OCI layout of the version {version[:40]!r}; only 1 is supported")
        return self._document(_INDEX)

    def _document(self, name: str) -> bytes:
        with self._open(name) as file:
            return file.read(oci.LONGEST + 1)

    def open(self, blob: oci.Descriptor) -> BinaryIO:
        """The blob's bytes, not verified. Raises `BadLayer` where it is missing or its size is not the declared one."""
        size = self.size(blob.digest)
        if size is None:
            raise BadLayer(f"{self.name} lacks the blob {blob.digest}")
        if size != blob.size:
            raise BadLayer(f"{self.name}: the blob {blob.digest} has {size} bytes, but {blob.size} are declared")
        return self._open(_blob_name(blob.digest))

    def read(self, blob: oci.Descriptor, what: str) -> bytes:
        """A document, verified. Raises `BadLayer`."""
        what = f"{self.name}: {what} {blob.digest}"
        if blob.size > oci.LONGEST:
            raise BadLayer(f"{what} is longer than {oci.LONGEST} bytes")
        with digest.VerifyingReader(self.open(blob), blob.digest, blob.size, what) as reader:
            return reader.readall()


class FolderLayout(Layout):
    """A layout in a folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def _open(self, name: str) -> BinaryIO:
        try:
            # A fifo must not make us wait.
            fd = os.open(self._path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise BadLayer(f"{self.name} lacks the file {name}") from None
        except OSError as error:
            raise refused(f"open {self.name}/{name}", error) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise BadLayer(f"{self.name}/{name} is no regular file")
        return open(fd, "rb")

    def size(self, blob: str) -> int | None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return os.stat(self._path / _blob_name(blob)).st_size
        return None


class ArchiveLayout(Layout):
    """A layout in a tar."""

    def __init__(self, archive: Archive, name: str) -> None:
        super().__init__(name)
        self._archive = archive

    def _open(self, name: str) -> BinaryIO:
        return self._archive.open(name)

    def size(self, blob: str) -> int | None:
        return self._archive.size(_blob_name(blob))


def is_layout(names: Callable[[str], bool]) -> bool:
    """Whether a folder or archive is an OCI layout; ``names`` tells whether it has a file."""
    return names(_MARKER) and names(_INDEX)


# -- writing -------------------------------------------------------------------------------------------------------


class LayoutWriter(ABC):
    """Writes one image into a layout: blobs first, then `finish`. Without `finish` the layout stays as it was."""

    @abstractmethod
    def add(self, media_type: str, write: Callable[[BinaryIO], object]) -> oci.Descriptor:
        """A blob, of what ``write`` puts into the file that it is given."""

    def add_bytes(self, media_type: str, data: bytes) -> oci.Descriptor:
        """A blob of these bytes."""
        return self.add(media_type, lambda out: out.write(data))

    @abstractmethod
    def finish(self, manifest: oci.Descriptor) -> None:
        """Show the image in the index, in the place of one with the same name; see `oci.name_of`.

        Where another has the same ``ref.name``, as tags are, it gets its whole name for that. Raises
        `FailedPrecondition` where it has none or that is taken too.
        """

    @abstractmethod
    def close(self) -> None:
        """Give up what is not finished. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def writer(target: Path) -> LayoutWriter:
    """A writer into ``target``: a tar where its name ends in ``.tar``, else a folder, new or an OCI layout already.

    Raises `InvalidArgument`, `FailedPrecondition` where ``target`` is something else, and what `refused` makes of the
    system's errors.
    """
    if target.name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz")):
        raise InvalidArgument(f"{target}: an image's layers are compressed one by one; end the name in .tar")
    return _ArchiveWriter(target) if target.suffix == ".tar" else _FolderWriter(target)


class _FolderWriter(LayoutWriter):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._blobs = path / "blobs" / digest.ALGORITHM
        with _step(f"write the OCI layout {path}"):
            if path.exists() and not path.is_dir():
                raise FailedPrecondition(f"{path} is a file; name a folder, or a file that ends in .tar")
            path.mkdir(exist_ok=True)
            if not (path / _MARKER).exists() and any(path.iterdir()):
                raise FailedPrecondition(f"{path} is neither empty nor an OCI layout; name another folder")
            with self._locked():
                if not (path / _MARKER).exists():
                    self._replace(path / _MARKER, _MARKER_TEXT)
                if not (path / _INDEX).exists():
                    self._replace(path / _INDEX, oci.make_index([]))
            self._blobs.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Only one at a time changes the index."""
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _temporary(self, folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".layerfs-", delete=False) as file:
            path = Path(file.name)
            try:
                os.fchmod(file.fileno(), 0o644)
                yield file, path  # type: ignore[misc]
            except BaseException:
                path.unlink(missing_ok=True)
                raise

    def _replace(self, path: Path, data: bytes) -> None:
        with self._temporary(path.parent) as (file, temporary):
            file.write(data)
            _sync(file)
            temporary.rename(path)

    def add(self, media_type: str, write: Callable[[BinaryIO], object]) -> oci.Descriptor:
        with _step(f"write a blob into {self._path}"), self._temporary(self._blobs) as (file, temporary):
            out = digest.HashingWriter(file)
            write(out)  # type: ignore[arg-type]
            _sync(file)
            temporary.rename(self._blobs / digest.encoded(out.digest))
        return oci.Descriptor(media_type, out.digest, out.size)

    def finish(self, manifest: oci.Descriptor) -> None:
        path = self._path / _INDEX
        name = oci.name_of(manifest.annotations)
        with _step(f"write {path}"), self._locked():
            data = path.read_bytes()
            oci.parse_index(data, str(path))
            document = oci.parse_json(data, str(path))  # what others wrote into it is kept as it is
            others = [item for item in document["manifests"] if oci.name_of(_annotations(item)) != name]
            taken = {_annotations(item).get(oci.REF_NAME) for item in others}
            if (reference := manifest.annotations[oci.REF_NAME]) in taken:
                if name in taken:
                    raise FailedPrecondition(
                        f"{self._path} has another image with the reference {reference!r}; name another folder"
                    )
                manifest = replace(manifest, annotations={**manifest.annotations, oci.REF_NAME: name})
            document["manifests"] = [*others, manifest.document()]
            self._replace(path, oci.dump(document))

    def close(self) -> None:
        pass


class _ArchiveWriter(LayoutWriter):
    """Writes each member's header after its content, whose length and digest are known only then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: set[str] = set()
        with _step(f"write {path}"):
            self._file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:100]}-", delete=False)  # noqa: SIM115
        self._add_member(_MARKER, _MARKER_TEXT)

    def _header(self, name: str, size: int) -> bytes:
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.GNU_FORMAT)

    def _add_member(self, name: str, data: bytes) -> None:
        with _step(f"write {self._path}"):
            self._file.write(self._header(name, len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE))

    def add(self, media_type: str, write: Callable[[BinaryIO], object]) -> oci.Descriptor:
        with _step(f"write {self._path}"):
            start = self._file.tell()
            self._file.write(bytes(tarfile.BLOCKSIZE))
            out = digest.HashingWriter(self._file)  # type: ignore[arg-type]
            write(out)  # type: ignore[arg-type]
            if out.digest in self._written:
                self._file.seek(start)
                self._file.truncate()
            else:
                self._written.add(out.digest)
                self._file.write(bytes(-out.size % tarfile.BLOCKSIZE))
                end = self._file.tell()
                self._file.seek(start)
                self._file.write(self._header(_blob_name(out.digest), out.size))
                self._file.seek(end)
        return oci.Descriptor(media_type, out.digest, out.size)

    def finish(self, manifest: oci.Descriptor) -> None:
        self._add_member(_INDEX, oci.make_index([manifest]))
        with _step(f"write {self._path}"):
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))
            os.fchmod(self._file.fileno(), 0o644)
            _sync(self._file)  # type: ignore[arg-type]
            os.rename(self._file.name, self._path)
        self._file.close()

    def close(self) -> None:
        if not self._file.closed:
            with contextlib.suppress(OSError):  # what waits to be written is given up as well
                self._file.close()
            os.unlink(self._file.name)


def _annotations(item: dict[str, Any]) -> dict[str, str]:
    return item.get("annotations") or {}


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _step(step: str) -> Iterator[None]:
    """Turns the system's errors into the family's."""
    try:
        yield
    except OSError as error:
        raise refused(step, error) from error
