"""The command line of ``layerfs-aufs``, which is that of fuse-overlayfs and of a helper of mount(8)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from layerfs.errors import InvalidArgument
from layerfs.kernel import mountapi

USAGE = """\
Usage: layerfs-aufs [-f] [-o OPTION[,OPTION…]] [SOURCE] TARGET

Mounts a union of directories in aufs' format and serves it in the background until it is unmounted.

  -o lowerdir=A:B:C   read-only branches, nearest first (a backslash before a colon or comma makes it part of a name)
  -o upperdir=U       the writable branch; without it the union is read-only
  -o workdir=W        an empty directory on the file system of U
  -o ro, allow_other  and other options of mount(8); unknown ones are ignored
  -f                  stay in the foreground
"""

_FLAGS = {
    "ro": mountapi.MS_RDONLY,
    "nosuid": mountapi.MS_NOSUID,
    "nodev": mountapi.MS_NODEV,
    "noexec": mountapi.MS_NOEXEC,
    "noatime": mountapi.MS_NOATIME,
    "nodiratime": mountapi.MS_NODIRATIME,
    "nosymfollow": mountapi.MS_NOSYMFOLLOW,
}
_UNDONE_BY = {"rw": "ro", "suid": "nosuid", "dev": "nodev", "exec": "noexec", "atime": "noatime"}


class Options:
    """What is to be mounted, and where.

    Attributes:
        lower: the read-only branches, nearest first.
        flags: ``MS_…`` of `layerfs.kernel.mountapi`.
    """

    def __init__(self) -> None:
        self.target = ""
        self.source = "layerfs-aufs"
        self.lower: list[str] = []
        self.upper: str | None = None
        self.work: str | None = None
        self.flags = 0
        self.allow_other = False
        self.foreground = False
        self.help = False


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line. Raises `InvalidArgument`, which says what is wrong with it."""
    options = Options()
    names: list[str] = []
    given = list(arguments)
    while given:
        word = given.pop(0)
        if word == "--":
            names += given
            break
        if word in ("-h", "--help"):
            options.help = True
            return options
        if word == "-f":
            options.foreground = True
        elif word.startswith("-o"):
            if word == "-o" and not given:
                raise InvalidArgument("-o needs options after it")
            _take(options, word[2:] or given.pop(0))
        elif word == "-t":  # mount(8) may pass the type on
            given[:1] = []
        elif word.startswith("-") and word != "-":
            raise InvalidArgument(f"there is no option {word!r}; see --help")
        else:
            names.append(word)
    if not 1 <= len(names) <= 2:
        raise InvalidArgument("one mount point is needed, perhaps with a source before it; see --help")
    *source, options.target = names
    if source:
        options.source = source[0]
    _check(options)
    return options


def split(text: str, separator: str) -> list[str]:
    """The parts between separators that no backslash stands before."""
    return re.findall(rf"(?:\\.|[^\\{separator}])+", text, re.DOTALL)


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def escaped(path: str) -> str:
    """A path as it stands among the options."""
    return re.sub(r"([\\,:])", r"\\\1", path)


def _take(options: Options, text: str) -> None:
    for word in split(text, ","):
        key, _, value = word.partition("=")
        if key == "lowerdir":
            options.lower = [unescaped(part) for part in split(value, ":")]
        elif key == "upperdir":
            options.upper = unescaped(value)
        elif key == "workdir":
            options.work = unescaped(value)
        elif key == "fsname":
            options.source = unescaped(value)
        elif key == "allow_other":
            options.allow_other = True
        elif key in _FLAGS:
            options.flags |= _FLAGS[key]
        elif key in _UNDONE_BY:
            options.flags &= ~_FLAGS[_UNDONE_BY[key]]


def _check(options: Options) -> None:
    if not options.lower and options.upper is None:
        raise InvalidArgument("there is nothing to mount; name branches with -o lowerdir=… and upperdir=…")
    if options.upper is not None and options.work is None:
        raise InvalidArgument("upperdir needs a workdir, an empty directory on the same file system")
    if options.upper is None:
        options.flags |= mountapi.MS_RDONLY
