"""Calling the C library and raw system calls through ctypes."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)

_syscall = libc.syscall
_syscall.restype = ctypes.c_long


def fail(*, detail: str = "", path: str | bytes | None = None) -> OSError:
    """The `OSError` of the call that just failed in this thread; ``detail`` is appended to the system's own words."""
    number = ctypes.get_errno()
    text = os.strerror(number)
    return OSError(number, f"{text} ({detail})" if detail else text, *([os.fsdecode(path)] if path else []))


def check(result: int, *, path: str | bytes | None = None) -> int:
    """Hand ``result`` through, or raise `OSError` when it is -1."""
    if result < 0:
        raise fail(path=path)
    return result


def syscall(number: int, *args: Any) -> int:
    """Make system call ``number``; ints go as C longs, bytes as pointers. Returns -1 on error (see `fail`)."""
    return int(_syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in args)))


def encoded(path: str | bytes | os.PathLike[str]) -> bytes:
    """A path or option as C wants it. Raises `OSError` (EINVAL) where it holds a NUL, which C would cut it at."""
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise OSError(errno.EINVAL, "name with a NUL byte", os.fsdecode(raw))
    return raw
