"""What base layers are filled with: incompressible data from a fixed seed."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

LOWER_FILE = "lower.dat"
"""The large file in the base layer that `lower_file` describes."""

SMALLEST, SMALL = 4096, 1 << 20
"""Bytes: no file is smaller than the one, and of files below the other a sample takes many (see `alike`)."""
_TOGETHER, _MOST_ALIKE = 4 << 20, 256
_CHUNK = 1 << 20
_PERIOD, _SHIFT = 1 << 20, 4


def alike(size: int) -> int:
    """How many files of ``size`` bytes a sample works on: a figure of one small file would be noise."""
    return max(1, min(_MOST_ALIKE, _TOGETHER // size)) if size < SMALL else 1


@dataclass(frozen=True)
class Base:
    """A committed layer that samples stand on, made once for each driver.

    Attributes:
        key: tells bases of different content apart.
        size: bytes of file content.
        fill: writes the content into an empty mounted layer.
    """

    key: str
    size: int
    fill: Callable[[Path], None]
    depth: int = 1
    """Layers that it consists of: those above the first are made by `stack_up`."""


def lower_file(size: int, seed: int) -> Base:
    """One file of ``size`` bytes, `LOWER_FILE`."""
    return Base(f"file-{size}-{seed}", size, lambda root: write_random(root / LOWER_FILE, size, seed))


def lower_files(size: int, seed: int) -> Base:
    """As many files of ``size`` bytes as are `alike`, with the names `lower_names`."""
    return lower_file(size, seed) if alike(size) == 1 else even_files(alike(size), size, seed)


def lower_names(size: int) -> list[str]:
    """The names in the base layer of `lower_files`."""
    return [LOWER_FILE] if alike(size) == 1 else even_names(alike(size))


def deepened(base: Base, depth: int) -> Base:
    """The same below further layers, ``depth`` in all."""
    return base if depth == 1 else dataclasses.replace(base, key=f"{base.key}-depth-{depth}", depth=depth)


def stack_up(root: Path, number: int) -> None:
    """Write a small file of layer ``number`` into every directory, so that each is one of this layer, too.

    As the layers of an image do that change one place again and again: a name is then searched for in all of them.
    """
    for place, _, _ in os.walk(root):
        Path(place, f"layer-{number}").write_text(str(number))


def small_files(count: int, size: int, seed: int) -> Base:
    """``count`` files of ``size`` bytes together, of very different sizes, as the tree of a program has them."""

    def fill(root: Path) -> None:
        for name, data in tree(count, size, seed):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    return Base(f"files-{count}-{size}-{seed}", size, fill)


def even_files(count: int, size: int, seed: int) -> Base:
    """``count`` files of ``size`` bytes each, ``even/0000/00000.dat`` and so on, 100 to a directory."""

    def fill(root: Path) -> None:
        for number, name in enumerate(even_names(count)):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_random(path, size, seed + number, durable=False)

    return Base(f"even-{count}-{size}-{seed}", count * size, fill)


def even_names(count: int) -> list[str]:
    """The names in the base layer of `even_files`."""
    return [f"even/{number // 100:04}/{number:05}.dat" for number in range(count)]


def write_random(path: Path, size: int, seed: int, *, durable: bool = True) -> None:
    """Make a file of ``size`` random bytes that depend on ``seed`` alone, and have it on the disk if ``durable``."""
    source = random.Random(seed)  # noqa: S311 - not for secrets
    with open(path, "wb", buffering=0) as file:
        file.writelines(source.randbytes(min(_CHUNK, size - offset)) for offset in range(0, size, _CHUNK))
        if durable:
            os.fsync(file.fileno())


class Supply:
    """What a workload writes into one file: incompressible, each block different, made before anything is clocked.

    A file system that finds equal or compressible data has nothing to find here, also not in what the bases hold or
    what another supply gave. It is small, so that a cache has it and reading it is not part of the figure: where it
    ends it begins anew, a few bytes further on, which makes blocks (they begin at a multiple of 4K) differ up to 1G.

    Args:
        size, block: bytes of the file, and of what is written at a time.
        seeds: all that the data depends on.
    """

    def __init__(self, size: int, block: int, *seeds: object) -> None:
        self._size, self._block = size, block
        self._period = min(size, max(block, _PERIOD))
        length = min(size, self._period + block + size // self._period * _SHIFT)
        # Of a text, because bases and offsets are made of plain numbers.
        self._data = memoryview(random.Random(" ".join(map(str, seeds))).randbytes(length))  # noqa: S311

    def at(self, offset: int) -> memoryview:
        """The block at ``offset``; at the file's end it is shorter."""
        begin = offset % self._period + offset // self._period * _SHIFT
        return self._data[begin : begin + min(self._block, self._size - offset)]


def tree(count: int, size: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of ``count`` files, ``size`` bytes together, 20 to a directory.

    Sizes are spread log-normally, so that most files are small and a few hold most of the bytes.
    """
    source = random.Random(seed)  # noqa: S311
    weights = [source.lognormvariate(0, 2) for _ in range(count)]
    scale = size / sum(weights)
    for number, weight in enumerate(weights):
        yield f"tree/{number // 20:04}/{number:05}.dat", source.randbytes(int(weight * scale))


def write_tar(path: Path, count: int, size: int, seed: int) -> None:
    """The files of `tree` as an uncompressed layer tar."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        directories = set[str]()
        for name, data in tree(count, size, seed):
            parent = name.rpartition("/")[0]
            for directory in (parent.partition("/")[0], parent):
                if directory not in directories:
                    directories.add(directory)
                    entry = tarfile.TarInfo(directory)
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(entry)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
