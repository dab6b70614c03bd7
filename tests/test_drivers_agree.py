"""The same random operations on every driver, and on a plain directory as the model.

After each step the trees are equal, and after each commit the changes and the bytes of the diff. What works on this
kernel is compared here, and all drivers in a guest whose kernel has everything that they need.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerfs import registry
from layerfs.backing import DIRECTORY, Backing, BackingSpec
from layerfs.changes import compare
from layerfs.diff import write_diff
from layerfs.driver import Change
from layerfs.testing.trees import Tree, read_tree
from layerfs.testing.workbench import Workbench
from layerfs.treecopy import copy_tree

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

NAMES = ["a", "b", "d", "e", "d/a", "d/b", "d/s", "d/s/a", "e/a", "e/b"]
_EPOCH = 1_600_000_000

Operation = tuple[str, str, str, int]


def operations(most: int, fewest: int = 0) -> st.SearchStrategy[list[Operation]]:
    kinds = [
        *("write", "write", "append", "truncate", "unlink", "mkdir", "mkdir", "rmtree", "rename", "link", "symlink"),
        *("chmod", "chown", "xattr", "fifo", "commit", "fork"),
    ]
    names = st.sampled_from(NAMES)
    return st.lists(
        st.tuples(st.sampled_from(kinds), names, names, st.integers(0, 9000)), min_size=fewest, max_size=most
    )


def perform(root: Path, operation: Operation, step: int) -> None:
    """One operation on a tree. What it touches gets a time that depends on the step alone."""
    kind, name, other, number = operation
    path, second = root / name, root / other
    content = bytes([step % 256]) * number
    touched = [path, path.parent]
    match kind:
        case "write":
            _put(path, content, os.O_TRUNC)
        case "append":
            _put(path, content, os.O_APPEND)
        case "truncate":
            os.truncate(path, number)
        case "unlink":
            path.unlink()
        case "mkdir":
            path.mkdir()
        case "rmtree":
            shutil.rmtree(path)
        case "rename" if not path.is_dir() and not second.is_dir():  # overlay moves no directory of a lower layer
            path.rename(second)
            touched = [path.parent, second, second.parent]
        case "link":
            os.link(path, second, follow_symlinks=False)
            touched = [second, second.parent]
        case "symlink":
            path.symlink_to(other)
        case "chmod" if not path.is_symlink():
            path.chmod(number % 0o1000)
        case "chown":
            os.chown(path, number, number + 1, follow_symlinks=False)
        case "xattr" if path.is_file() and not path.is_symlink():
            os.setxattr(path, "user.x", content[:3000])
        case "fifo":
            os.mkfifo(path)
        case _:
            return
    for place in touched:
        if os.path.lexists(place):
            # The root may be named by a link in /proc.
            os.utime(place, (_EPOCH + step, _EPOCH + step), follow_symlinks=place == root)


def _put(path: Path, content: bytes, flag: int) -> None:
    """Write, without waiting for somebody to read from a fifo."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | flag), "wb") as file:
        file.write(content)


class Model:
    """Plain directories: the layer, and its parent if it has one."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._count = 0
        self.parent: Path | None = None
        self.tree = self._new()

    def commit(self) -> None:
        self.parent, self.tree = self.tree, self._new()
        with _opened(self.parent) as old, _opened(self.tree) as new:
            copy_tree(old, new)

    def changes(self) -> tuple[list[Change], bytes]:
        out = io.BytesIO()
        with contextlib.ExitStack() as stack:
            old = None if self.parent is None else stack.enter_context(_opened(self.parent))
            new = stack.enter_context(_opened(self.tree))
            found = list(compare(old, new))
            write_diff(found, new, out)
        return found, out.getvalue()

    def _new(self) -> Path:
        self._count += 1
        made = self._base / str(self._count)
        made.mkdir(mode=0o755)
        os.utime(made, (_EPOCH, _EPOCH))
        return made


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@dataclass
class Candidate:
    """One driver and the volume that is worked on."""

    bench: Workbench
    volume: str

    def reset(self) -> None:
        for volume in reversed(list(self.bench.ancestry)):
            self.bench.remove(volume)
        self.volume = self.bench.prepare()
        with self.bench.mounted(self.volume) as root:
            os.utime(root, (_EPOCH, _EPOCH))

    def perform(self, operation: Operation, step: int) -> int | None:
        with self.bench.mounted(self.volume) as root:
            return outcome(lambda: perform(root, operation, step))

    def commit(self) -> tuple[list[Change], bytes]:
        found = self.bench.changes(self.volume), self.bench.diff(self.volume)
        self.bench.seal(self.volume)
        assert (self.bench.changes(self.volume), self.bench.diff(self.volume)) == found
        self.volume = self.bench.prepare(self.volume)
        return found

    def fork(self) -> None:
        """Go on with a copy; what is done to it does not reach the original, which goes."""
        old = self.volume
        self.volume = self.bench.fork(old)
        self.bench.remove(old)


def outcome(action: Callable[[], None]) -> int | None:
    """The number of the error that the kernel answered."""
    try:
        action()
    except OSError as error:
        return error.errno
    return None


def usable(root: Path) -> list[str]:
    return [name for name in registry.names() if registry.load(name).probe(root).usable]


def all_usable() -> bool:
    return usable(Path("/var/tmp")) == registry.names()


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Candidate]]:
    found: dict[str, Candidate] = {}
    with contextlib.ExitStack() as stack:
        for name in usable(tmp_path_factory.getbasetemp()):
            kind = registry.load(name)
            filesystem = (*kind.needs.filesystems, DIRECTORY)[0]
            size = None if filesystem == DIRECTORY else 1 << 30
            backing = Backing.create(tmp_path_factory.mktemp(name), BackingSpec(filesystem, size=size))
            stack.callback(backing.destroy)
            backing.up()
            (backing.path / "driver").mkdir(mode=0o700)
            driver = kind(backing.path / "driver")
            stack.callback(driver.close)
            bench = Workbench(driver)
            found[name] = Candidate(bench, bench.prepare())
        yield found
        for candidate in found.values():
            for volume in reversed(list(candidate.bench.ancestry)):
                candidate.bench.remove(volume)


def run(candidates: dict[str, Candidate], base: Path, given: list[Operation]) -> None:
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    model = Model(base)
    for candidate in candidates.values():
        candidate.reset()
    for step, operation in enumerate([*given, ("commit", "a", "a", 0)]):
        if operation[0] == "fork":
            for candidate in candidates.values():
                candidate.fork()
        elif operation[0] == "commit":
            expected = model.changes()
            for name, candidate in candidates.items():
                assert candidate.commit() == expected, name
            model.commit()
        else:
            answer = outcome(lambda op=operation, n=step: perform(model.tree, op, n))  # type: ignore[misc]
            for name, candidate in candidates.items():
                assert candidate.perform(operation, step) == answer, (name, operation)
        tree: Tree = read_tree(model.tree)
        for name, candidate in candidates.items():
            assert candidate.bench.tree(candidate.volume) == tree, (name, operation)


@pytest.mark.guest("uml", unless=all_usable)
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(given=operations(30, fewest=25))
def test_all_drivers_on_one_kernel_do_what_a_plain_directory_does(
    candidates: dict[str, Candidate], tmp_path_factory: pytest.TempPathFactory, given: list[Operation]
) -> None:
    assert list(candidates) == registry.names()
    run(candidates, tmp_path_factory.getbasetemp() / "model", given)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(given=operations(30))
def test_every_driver_does_what_a_plain_directory_does(
    candidates: dict[str, Candidate], tmp_path_factory: pytest.TempPathFactory, given: list[Operation]
) -> None:
    assert {"overlay2", "vfs"} <= set(candidates)
    run(candidates, tmp_path_factory.getbasetemp() / "model", given)
