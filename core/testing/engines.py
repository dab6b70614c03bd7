"""Real container engines and servers on private directories, for tests: started, waited for, and ended by their ids."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from layerfs import registry
from layerfs.testing.images import MadeImage, MadeLayout, tar_of

BUSYBOX = Path("/bin/busybox")
"""A static program with many names (Debian's package busybox-static), which an image can be made of."""

# What is installed beside this interpreter (layerfs-aufs) is found by engines that the tests start.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"

_NAMES = ("sh", "ls", "cat", "echo", "sleep", "true", "false", "touch", "rm", "mkdir", "mv", "dd", "ln", "stat", "id")


def wait_until(done: Callable[[], object], what: str, *, seconds: float = 60) -> None:
    """Wait until ``done`` says so. Raises `TimeoutError`, naming ``what`` was waited for."""
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.02)


def listens(path: Path) -> bool:
    """Whether somebody listens at a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def running(command: Sequence[str | Path], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has ended when the context has: by SIGTERM, or else by SIGKILL. ``log`` takes what it says."""
    with open(log, "ab") as out:
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=os.environ | environment
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Served:
    """A store that ``layerfs serve ENGINE`` serves, in a process that can be stopped, killed and started again.

    Args:
        place: a directory; the store is made in it, with a backing where the driver needs one.
        socket: where it is to listen, if not there as well.
    """

    def __init__(self, engine: str, driver: str, place: Path, *options: str, socket: Path | None = None) -> None:
        self.root = place / "store"
        self.socket = socket or place / "layerfs.sock"
        self.log = place / "layerfs.log"
        self.process: subprocess.Popen[bytes] | None = None
        if filesystems := registry.load(driver).needs.filesystems:
            layerfs("init", "--root", self.root, "--driver", driver, "--backing", f"{filesystems[0]}:1G")
        store = ("--root", str(self.root), "--driver", driver)
        self.command = [*program(), "serve", engine, *store, "--socket", str(self.socket), *options]

    def start(self) -> None:
        """Start it, and wait until it listens."""
        with open(self.log, "ab") as out:
            process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self.process = process
        wait_until(lambda: listens(self.socket) or process.poll() is not None, "the server listens")
        assert process.poll() is None, self.log.read_text()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)


def program() -> list[str]:
    """The command line of layerfs itself."""
    return [sys.executable, "-m", "layerfs.cli"]


def layerfs(*arguments: str | Path) -> str:
    """Run layerfs and return what it prints. Raises `AssertionError` with its error where it fails."""
    done = subprocess.run([*program(), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def busybox_layer() -> bytes:
    """A layer's tar that a container can run on."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(folder)
        tar.add(BUSYBOX, "bin/busybox")
        for name in _NAMES:
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for name, text in {"passwd": "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n"}.items():
            member = tarfile.TarInfo(f"etc/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


def busybox_image(path: Path, name: str, *more: bytes, config: Mapping[str, object] | None = None) -> Path:
    """Write an OCI layout as a tar at ``path`` with one image: busybox, a layer that deletes and adds, and ``more``."""
    top = tar_of({"etc/greeting": b"hello\n", "etc/.wh.passwd": b"", "data": None, "data/file": b"lower\n"})
    settings = {"Cmd": ["/bin/cat", "/etc/greeting"], "Env": ["PATH=/bin", "FLAVOUR=plain"], **(config or {})}
    layout = MadeLayout(path.with_suffix(".oci"))
    diffs = [busybox_layer(), top, *more]
    layout.add(MadeImage(diffs, ["none"] * len(diffs), config={"config": settings}), name)
    return layout.to_tar(path)
