"""Processes that are killed in the middle of what they do."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable

# What changes something outside the process, as sys.audit() tells it; openat(2) is left out, which is most of it.
_CHANGES = "chmod chown link mkdir mkfifo remove removexattr rename rmdir setxattr symlink truncate utime"
CHANGES = frozenset(f"os.{name}" for name in _CHANGES.split()) | {"fcntl.ioctl"}
"""The audit events of system calls that change something."""


def killed(action: Callable[[], None], step: int, events: Iterable[str] = CHANGES) -> bool:
    """Run ``action`` in a process that is killed just before its event number ``step``; False if it got to its end."""
    pid = os.fork()
    if pid == 0:
        counted = frozenset(events)
        left = step

        def count(event: str, _: object) -> None:
            nonlocal left
            if event in counted:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    if status not in (0, signal.SIGKILL):
        raise AssertionError(f"the process neither ended well nor was killed: status {status}")
    return status != 0
