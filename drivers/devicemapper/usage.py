"""What volumes occupy, as the pool's own metadata say: read from a snapshot of them, with the pool's tools."""

from __future__ import annotations

import re
import subprocess

from layerfs.errors import LayerfsError
from layerfs.programs import tool
from layerfs.thinpool import CHUNK

_PACKAGE = "thin-provisioning-tools"
_OWN = re.compile(rb'<(?:different|right_only) begin="\d+" length="(\d+)"')


def own_bytes(metadata: str, parent: int, child: int) -> int:
    """The bytes of a thin device's blocks that another one does not have at the same place. Raises `LayerfsError`."""
    command = ["thin_delta", "--metadata-snap", "--snap1", str(parent), "--snap2", str(child), metadata]
    return sum(map(int, _OWN.findall(_output(command)))) * CHUNK


def numbers(metadata: str) -> set[int]:
    """The numbers of all thin devices. Raises `LayerfsError`."""
    return set(map(int, _output(["thin_ls", "--metadata-snap", "--no-headers", "--format", "DEV", metadata]).split()))


def defects(metadata: str) -> str:
    """What thin_check(8) finds wrong with the metadata; "" where all is well."""
    result = _run(["thin_check", "--metadata-snap", metadata])
    words = " ".join((result.stderr or result.stdout).decode(errors="replace").split())
    return (words or f"thin_check ended with {result.returncode}") if result.returncode else ""


def _output(command: list[str]) -> bytes:
    result = _run(command)
    if result.returncode:
        words = " ".join((result.stderr or result.stdout).decode(errors="replace").split())
        raise LayerfsError(f"{command[0]} on {command[-1]!r} failed: {words or result.returncode}")
    return result.stdout


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    whole = [tool(command[0], _PACKAGE), *command[1:]]
    return subprocess.run(whole, stdin=subprocess.DEVNULL, capture_output=True, check=False)
