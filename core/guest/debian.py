"""Debian's packages, fetched and unpacked beside the host's own: apt with a state of its own, and nothing installed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from layerfs.errors import EnvironmentUnfit, LayerfsError
from layerfs.guest.kind import find_program

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_COMPONENTS = "main contrib"


class Packages:
    """What Debian's archive has, as the host's own apt is set up to reach it, and its component contrib.

    Args:
        directory: for apt's lists and what it fetches; may be empty.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        find_program("apt-get", "apt, as Debian has it")
        sources = directory / "sources.list"
        for place in ("lists/partial", "archives/partial"):
            (directory / place).mkdir(parents=True, exist_ok=True)
        sources.write_text("".join(f"{line}\n" for line in self._sources()))
        options = {
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::lists": directory / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": directory,
            "APT::Sandbox::User": "root",  # the cache is for its owner only
        }
        self._options = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        self._apt("apt-get", "update", "-qq")

    def newest(self, package: str) -> str:
        """The version of ``package`` that apt would install."""
        shown = self._apt("apt-cache", "show", "--no-all-versions", package)
        return next(line.split(": ", 1)[1] for line in shown.splitlines() if line.startswith("Version: "))

    def needed(self, package: str) -> list[str]:
        """The packages that ``package`` depends on."""
        lines = self._apt("apt-cache", "depends", "--important", package).splitlines()
        return [line.split("Depends: ", 1)[1] for line in lines if "Depends: " in line]

    def unpack(self, packages: Sequence[str], tree: Path) -> None:
        """Fetch packages and put their files below ``tree``, what is in /bin, /sbin and /lib in /usr, as on a host."""
        for name in ("bin", "sbin", "lib", "lib64"):
            (tree / "usr" / name).mkdir(parents=True, exist_ok=True)
            if not (tree / name).is_symlink():
                (tree / name).symlink_to(f"usr/{name}")
        archives = self._directory / "archives"
        self._apt("apt-get", "download", "-qq", *packages, directory=archives)
        for archive in sorted(archives.glob("*.deb")):
            _unpack(archive, tree)
            archive.unlink()

    def _sources(self) -> Iterable[str]:
        """One line of sources.list(5) for each suite of Debian that the host takes packages from."""
        form = "$(ORIGIN)|$(COMPONENT)|$(REPO_URI)|$(RELEASE)"
        done = subprocess.run(
            ["apt-get", "indextargets", "--format", form, "Created-By: Packages"],
            capture_output=True,
            text=True,
            check=False,
        )
        rows = [line.split("|") for line in done.stdout.splitlines()]
        signed = f"[signed-by={_KEYRING}] " if _KEYRING.exists() else ""
        found = [f"deb {signed}{row[2]} {row[3]} {_COMPONENTS}" for row in rows if row[:2] == ["Debian", "main"]]
        if not found:
            raise EnvironmentUnfit(
                "the packages of a QEMU guest come from Debian's archive, which this host's apt does not know; "
                "name a kernel with --kernel, or run `apt-get update` as root first if this is Debian"
            )
        return dict.fromkeys(found)

    def _apt(self, program: str, *arguments: str, directory: Path | None = None) -> str:
        done = subprocess.run(
            [program, *self._options, *arguments], capture_output=True, text=True, cwd=directory, check=False
        )
        if done.returncode:
            said = " ".join(line for line in done.stderr.splitlines() if line.startswith("E: "))
            raise LayerfsError(f"{program} {' '.join(arguments)}: {said or done.stderr.strip()}")
        return done.stdout


def _unpack(archive: Path, tree: Path) -> None:
    """dpkg-deb's own extraction would put directories where the links to /usr are."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as source:
        command = ["tar", "--extract", "--keep-directory-symlink", "--no-same-owner", "--directory", str(tree)]
        tar = subprocess.run(command, stdin=source.stdout, capture_output=True, text=True, check=False)
    if tar.returncode or source.returncode:
        raise LayerfsError(f"unpacking {archive.name!r} into {str(tree)!r}: {tar.stderr.strip() or 'dpkg-deb failed'}")


def cache() -> Path:
    """Where what a guest needs is kept for the next time: one directory for each user."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path("~/.cache").expanduser()) / "layerfs" / "guest"
