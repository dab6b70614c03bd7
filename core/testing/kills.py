"""Processes that are killed in the middle of what they do."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

# What changes something outside the process, as sys.audit() tells it; openat(2) is left out, which is most of it.
_CHANGES = "chmod chown link mkdir mkfifo remove removexattr rename rmdir setxattr symlink truncate utime"
_EVENTS = frozenset(f"os.{name}" for name in _CHANGES.split()) | {"fcntl.ioctl"}


def changes(event: str, _args: tuple[Any, ...]) -> bool:
    """Whether the audit event is a system call that may change something."""
    return event in _EVENTS


def killed(action: Callable[[], None], step: int, counts: Callable[[str, tuple[Any, ...]], bool] = changes) -> bool:
    """Run ``action`` in a process that is killed just before its step of this number; False if it got to its end.

    ``counts`` says of an audit event and its arguments whether it is a step.
    """
    pid = os.fork()
    if pid == 0:
        left = step

        def count(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if counts(event, args):
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
