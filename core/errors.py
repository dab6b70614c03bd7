"""What can go wrong, as one small family of exceptions.

Every error that a user can meet is a `LayerfsError`. Its text is one sentence that names the layer or file, what the
system said and, where there is one, the remedy. Each class carries the exit code that the command line ends with; the
meanings of the four state errors are those of containerd's ``errdefs``, so that a server can pass them on unchanged.
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar, Final

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class LayerfsError(Exception):
    """Something failed that is no fault in layerfs itself."""

    exit_code: ClassVar[int] = 1


class InvalidArgument(LayerfsError):
    """The request itself is wrong, whatever state the store is in; correct it and call again."""

    exit_code = 2


class EnvironmentUnfit(LayerfsError):
    """This host lacks what the operation needs: a kernel feature, a package, a privilege; the text says which."""

    exit_code = 3


class NotFound(LayerfsError):
    """No layer, image or mount of that name exists."""

    exit_code = 4


class AlreadyExists(LayerfsError):
    """The key is taken; keys of active, view and committed layers share one name space."""

    exit_code = 5


class FailedPrecondition(LayerfsError):
    """The layer is in a state that forbids the operation: it has children, it is in use, it is not active."""

    exit_code = 6


class BadLayer(LayerfsError):
    """Layer data from outside is malformed or hostile, or does not have the digest that it should have."""

    exit_code = 7


class Damaged(LayerfsError):
    """Data in the store is not what was put there; ``layerfs check`` tells more."""

    exit_code = 8


class OutOfSpace(LayerfsError):
    """The backing, or the layer's own size limit, is full."""

    exit_code = 9


class KernelRefused(LayerfsError):
    """A system call failed: ``step`` is what was being done, ``errno`` what the kernel answered.

    Attributes:
        errno: the kernel's error number, as in ``errno(3)``.
    """

    exit_code = 10

    def __init__(self, step: str, error: OSError, remedy: str = "") -> None:
        self.errno = error.errno
        text = f"{step}: {error.strerror or error}"
        super().__init__(f"{text}; {remedy}" if remedy else text)


def refused(step: str, error: OSError, remedy: str = "") -> LayerfsError:
    """The member of the family that fits what the kernel answered to ``step`` (``mounting the layer "a"``).

    A full disk or quota is `OutOfSpace`, lacking privilege is `EnvironmentUnfit`, all else is `KernelRefused`.
    """
    reason = f"{step}: {error.strerror or error}"
    if error.errno in _FULL:
        return OutOfSpace(f"{reason}; {remedy or 'free some space or raise the limit'}")
    if error.errno in (errno.EPERM, errno.EACCES):
        return EnvironmentUnfit(f"{reason}; {remedy or 'run it as root or in a user namespace'}")
    return KernelRefused(step, error, remedy)


def told(error: Exception) -> LayerfsError | None:
    """The member of the family by which an error is told, None for a fault in layerfs.

    A full disk may be met wherever something is written, by other packages too, and is `OutOfSpace` all the same.
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        return refused(f"writing {os.fsdecode(error.filename)!r}" if error.filename else "writing", error)
    return error if isinstance(error, LayerfsError) else None
