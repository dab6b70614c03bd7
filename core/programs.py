"""Programs of other packages: where they are, and running one to its end."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess

from layerfs.errors import EnvironmentUnfit, LayerfsError, OutOfSpace

CANNOT_RUN, NO_SUCH = 126, 127
"""The exit codes by which shells say that a command cannot be run, and that there is none."""

_SYSTEM_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"  # a user's PATH often lacks them


def find(name: str) -> str | None:
    """Where a program is, None where it is not installed."""
    return shutil.which(name, path=search_path())


def search_path() -> str:
    """PATH with the folders of the system's own programs."""
    return f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_FOLDERS}"


def tool(name: str, package: str) -> str:
    """Where a program is, or `EnvironmentUnfit` naming the Debian package that has it."""
    path = find(name)
    if path is None:
        raise EnvironmentUnfit(f"{name} is not installed; install the package {package}")
    return path


def run(command: list[str], package: str) -> None:
    """Run a tool to its end, quietly. Raises `EnvironmentUnfit`, `OutOfSpace` or plain `LayerfsError`."""
    result = subprocess.run(
        [tool(command[0], package), *command[1:]], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    corrected = command[0] == "e2fsck" and result.returncode == 1  # which is a success
    if result.returncode and not corrected:
        words = " ".join((result.stderr or result.stdout).decode(errors="replace").split())
        if os.strerror(errno.ENOSPC) in words:
            raise OutOfSpace(f"{command[0]} on {command[-1]!r}: {words}")
        raise LayerfsError(f"{command[0]} on {command[-1]!r} failed: {words or result.returncode}")


def shell_code(code: int) -> int:
    """The exit code of a process as shells say it: 128 and the signal's number (-``code``) where one ended it."""
    return 128 - code if code < 0 else code
