"""Files of the branches that the kernel reads and writes itself (FUSE passthrough, Linux 6.12 and newer)."""

from __future__ import annotations

import os
import stat
from typing import Final

from layerfs.drivers.aufs.tree import Node
from layerfs.kernel import capabilities, fuse

SPECIAL_BITS: Final = stat.S_ISUID | stat.S_ISGID


class Passthrough:
    """Which open files the kernel passes through, of one union.

    All who have a file open have to agree, and on one real file. So what lies in a lower branch and may yet be copied
    up is read through the kernel's cache: who reads it is to see what others write then.
    Writing takes set-user-ID and set-group-ID bits from a file where who writes has no CAP_FSETID. The kernel writes
    with our credentials, and as if without CAP_FSETID; a file that has such bits it does not write itself.

    Args:
        device: /dev/fuse, to tell the kernel of real files.
        granted: the kernel has agreed to it; otherwise nothing is passed through.
        read_only: nothing is ever copied up.
    """

    def __init__(self, device: int, *, granted: bool, read_only: bool) -> None:
        self.granted = granted
        self._device = device
        self._read_only = read_only
        self._as_any_writer = capabilities.Without(capabilities.FSETID)

    def begin(self, node: Node, fd: int, flags: int) -> bool:
        """Whether the kernel is to read and write a file itself that is being opened, as it is told then.

        Raises `OSError` where it would, and the real file cannot be opened with these ``flags``.
        """
        if not self.granted:
            return False
        if not node.backing:
            suits = self._read_only if node.lower else not os.fstat(fd).st_mode & SPECIAL_BITS
            if node.fds or not suits:
                return False
            try:
                with self._as_any_writer:
                    node.backing = fuse.backing_open(self._device, fd)
            except OSError:  # a directory of the branch may be on another file system
                return False
        if flags & os.O_DIRECT:  # which not every file system can
            os.close(os.open(b"/proc/self/fd/%d" % fd, flags & (os.O_ACCMODE | os.O_DIRECT) | os.O_CLOEXEC))
        return True

    def end(self, node: Node) -> None:
        """Have the kernel drop the real file of a node when nobody has it open any more."""
        if node.backing and not node.fds:
            fuse.backing_close(self._device, node.backing)
            node.backing = 0
