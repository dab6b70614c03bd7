"""Random file operations, as hypothesis makes them up, for properties that must hold whatever is done to a tree."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

_CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
_TIMES = (0, 1, 10**9, 1_600_000_000_000_000_000, 1_600_000_000_123_456_789)

Values = tuple[str, str, int]


class Operation(NamedTuple):
    """One step: ``path`` is what it is done to, ``other`` a second path, ``number`` chooses among values."""

    name: str
    path: str
    other: str
    number: int

    def do(self, root: Path) -> None:
        """Do it below ``root``; where the tree does not allow it, nothing happens."""
        with contextlib.suppress(FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, OSError):
            _DO[self.name](root / self.path, root / self.other, self.number)


def operations(*, most: int = 12) -> st.SearchStrategy[list[Operation]]:
    """Up to ``most`` operations on few names, so that they meet."""
    name = st.sampled_from(["a", "b", "c", "a.b"])
    path = st.lists(name, min_size=1, max_size=3).map("/".join)
    return st.lists(
        st.builds(Operation, st.sampled_from(sorted(_DO)), path, path, st.integers(0, 9)),
        max_size=most,
    )


def _write(path: Path, _: Path, number: int) -> None:
    # Without waiting: nobody reads from a fifo.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK), "wb") as file:
        file.write(b"%d" % number * (number * number * 7))


def _rewrite(path: Path, _: Path, number: int) -> None:
    """Other content, but the size and time of before."""
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        return
    with open(path, "r+b") as file:
        file.write(b"%d" % number * min(info.st_size, 3))
        file.truncate(info.st_size)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def _touch_and_restore(path: Path, _: Path, __: int) -> None:
    """A change that is taken back, which only copies the file up."""
    info = path.lstat()
    os.chown(path, 1, 1, follow_symlinks=False)
    os.chown(path, info.st_uid, info.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(info.st_mode):
        os.chmod(path, stat.S_IMODE(info.st_mode))


def _replace_by_twin(path: Path, other: Path, _: int) -> None:
    """Another inode that looks the same."""
    if path.is_file() and not path.is_symlink() and not other.exists():
        shutil.copy2(path, other)
        os.chown(other, path.stat().st_uid, path.stat().st_gid)
        os.rename(other, path)


def _remake(path: Path, _: Path, __: int) -> None:
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode):  # rmtree would open it, and wait at a fifo for ever
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    shutil.rmtree(path)
    path.mkdir()
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def _move(path: Path, other: Path, _: int) -> None:
    """As mv(1) does it where the file system answers EXDEV."""
    if not other.exists() and not other.is_relative_to(path):
        shutil.move(path, other)


def _remove(path: Path, _: Path, __: int) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _bind(path: Path, _: Path, __: int) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


_DO: dict[str, Callable[[Path, Path, int], object]] = {
    "write": _write,
    "rewrite": _rewrite,
    "touch and restore": _touch_and_restore,
    "replace by twin": _replace_by_twin,
    "remake": _remake,
    "move": _move,
    "remove": _remove,
    "bind": _bind,
    "mkdir": lambda path, _, __: path.mkdir(),
    "unlink": lambda path, _, __: path.unlink(),
    "rename": lambda path, other, _: os.rename(path, other),
    "link": lambda path, other, _: os.link(path, other, follow_symlinks=False),
    "symlink": lambda path, other, _: os.symlink(other.name, path),
    "fifo": lambda path, _, __: os.mkfifo(path),
    "device": lambda path, _, number: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3 + 2 * (number % 2))),
    "chmod": lambda path, _, number: os.chmod(path, (0o644, 0o4755, 0o1777)[number % 3]),
    "chown": lambda path, _, number: os.chown(path, number % 3, number * 300_000, follow_symlinks=False),
    "utime": lambda path, _, n: os.utime(path, ns=(5, _TIMES[n % len(_TIMES)]), follow_symlinks=False),
    "setxattr": lambda path, _, number: os.setxattr(path, f"user.{number % 3}=", b"\0\xff" * number),
    "removexattr": lambda path, _, number: os.removexattr(path, f"user.{number % 3}="),
    "capability": lambda path, _, __: os.setxattr(path, "security.capability", _CAPABILITY),
}
