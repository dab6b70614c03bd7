"""The numbers of ioctl(2) requests, put together as include/uapi/asm-generic/ioctl.h does."""

from __future__ import annotations

_WRITE, _READ = 1, 2


def io(group: int, number: int) -> int:
    """A request without an argument."""
    return group << 8 | number


def iow(group: int, number: int, size: int) -> int:
    """A request that hands the kernel ``size`` bytes."""
    return _WRITE << 30 | size << 16 | group << 8 | number


def ior(group: int, number: int, size: int) -> int:
    """A request that the kernel answers with ``size`` bytes."""
    return _READ << 30 | size << 16 | group << 8 | number


def iowr(group: int, number: int, size: int) -> int:
    """A request with ``size`` bytes in both directions."""
    return (_READ | _WRITE) << 30 | size << 16 | group << 8 | number
