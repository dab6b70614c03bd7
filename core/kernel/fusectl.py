"""The kernel's file system of FUSE connections (fusectl): whether one has requests open."""

from __future__ import annotations

import os
import time

from layerfs import mounts
from layerfs.driver import Mount


def settle(device: str, seconds: float) -> bool:
    """Wait until a FUSE file system has answered all that it was asked; False where it has not within ``seconds``.

    That includes what nobody waits for, such as the last close of a file.

    Args:
        device: ``major:minor`` of the file system, as `mount_table.MountPoint.device` has it.
    """
    deadline = time.monotonic() + seconds
    with mounts.opened([Mount("fusectl", "fusectl")]) as top:
        while True:
            try:
                fd = os.open(f"{device.partition(':')[2]}/waiting", os.O_RDONLY | os.O_CLOEXEC, dir_fd=top)
            except FileNotFoundError:  # the connection is gone
                return True
            try:
                waiting = os.read(fd, 32)
            finally:
                os.close(fd)
            if int(waiting or b"0") == 0:  # nothing is read when the connection has gone meanwhile
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
