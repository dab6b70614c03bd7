"""What a QEMU guest boots: a kernel, its modules, and programs that belong to them.

The first time, the system is prepared from Debian's packages: the kernel of linux-image-amd64, OpenZFS's modules built
for it from zfs-dkms's source, and the tools of zfsutils-linux. It is kept in the user's cache by its versions.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from layerfs.errors import InvalidArgument, LayerfsError
from layerfs.guest.debian import Packages, cache
from layerfs.guest.kind import find_program

_PREFIX = "system-"
_TOOLS = ("zfsutils-linux", "libnvpair3linux", "libuutil3linux", "libzfs4linux", "libzpool5linux")
_COMPILE = {"make": "make", "gcc": "gcc", "depmod": "kmod"}


@dataclass(frozen=True)
class System:
    """Something to boot.

    Attributes:
        kernel: the image's path, or the release of a kernel that the host has installed.
        busybox: a busybox that needs no libraries, for the time before the host's files are there.
        modules: the directory that holds the modules by release; None for the host's own.
        tree: programs and modules that the guest sees over the host's root; None for none.
    """

    kernel: str
    busybox: Path
    modules: Path | None = None
    tree: Path | None = None


def chosen(kernel: str) -> System:
    """The kernel that somebody names, by its image or by the release of an installed one.

    Raises `InvalidArgument`, and `EnvironmentUnfit` where the host has no busybox.
    """
    busybox = Path(find_program("busybox", "busybox-static"))
    image = Path(kernel)
    if not image.exists():
        if "/" in kernel or not Path(f"/boot/vmlinuz-{kernel}").exists():
            raise InvalidArgument(f"there is no kernel {kernel!r}; give an image's path, or a release that is in /boot")
        return System(kernel, busybox)
    for above in image.resolve().parents:
        for modules in (above / "lib/modules", above / "usr/lib/modules"):
            if modules.is_dir():
                return System(str(image.resolve()), busybox, modules)
    return System(str(image.resolve()), busybox)


def prepared(progress: Callable[[str], None]) -> System:
    """Debian's kernel with OpenZFS, from the cache or made now, which takes minutes and says so by ``progress``.

    Raises `EnvironmentUnfit` where the host lacks what it takes, and `LayerfsError` with what a step said if it failed.
    """
    place = cache()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(place):
        kept = sorted(place.glob(f"{_PREFIX}*"), key=lambda tree: tree.stat().st_mtime)
        tree = kept[-1] if kept else _make(place, progress)
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    return System(str(kernel), tree / "usr/bin/busybox", tree / "usr/lib/modules", tree)


def _make(place: Path, progress: Callable[[str], None]) -> Path:
    for program, package in _COMPILE.items():
        find_program(program, package)
    with tempfile.TemporaryDirectory(dir=place, prefix="unfinished-") as scratch:
        work = Path(scratch)
        progress("looking up Debian's packages for the guest's kernel")
        packages = Packages(work / "apt")
        (image,) = packages.needed("linux-image-amd64")
        (headers,) = packages.needed("linux-headers-amd64")
        release = image.removeprefix("linux-image-")
        progress(f"fetching the kernel {release}")
        tree, build = work / "tree", work / "build"
        packages.unpack([image, "busybox-static", *_TOOLS], tree)
        sources = [name for name in packages.needed(headers) if name.startswith("linux-") and "compiler" not in name]
        packages.unpack([headers, *sources, "zfs-dkms"], build)
        progress("building OpenZFS for it, which takes some minutes this once")
        _build(build, tree, release)
        versions = f"{release}_{packages.newest(image)}_zfs-{packages.newest('zfs-dkms')}"
        kept = place / (_PREFIX + versions.replace(":", "."))  # a colon would end a directory of an overlay
        tree.rename(kept)
    return kept


def _build(build: Path, tree: Path, release: str) -> None:
    """Compile the modules in ``build`` and put them into ``tree``."""
    (source,) = (build / "usr/src").glob("zfs-*")
    objects = build / "usr/src" / f"linux-headers-{release}"
    (common,) = (build / "usr/src").glob("linux-headers-*-common")
    makefile = objects / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{build}/usr/src/"))
    _step(["./configure", "--with-config=kernel", f"--with-linux={common}", f"--with-linux-obj={objects}"], source)
    # Debug information would take time and ten times the space.
    _step(["make", f"-j{len(os.sched_getaffinity(0))}", "CONFIG_DEBUG_INFO="], source)
    modules = tree / "usr/lib/modules" / release / "updates"
    modules.mkdir(parents=True)
    for module in (source / "module").rglob("*.ko"):
        shutil.copy(module, modules)
    _step([find_program("depmod", "kmod"), "--basedir", str(tree), release], tree)


def _step(command: list[str], directory: Path) -> None:
    with open(directory.parent / "build.log", "a+b") as log:
        done = subprocess.run(
            command, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False
        )
        if done.returncode:
            log.seek(0)
            said = b" | ".join(log.read().splitlines()[-5:]).decode(errors="replace")
            raise LayerfsError(f"building OpenZFS: {' '.join(command[:2])} ended with {done.returncode}: {said}")


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process at a time prepares; the others wait for what it makes."""
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)
