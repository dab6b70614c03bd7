"""Guests: a command in a kernel of its own that sees the host's file tree, for what the host's kernel lacks.

`run` is the way in, as ``layerfs guest`` is on the command line, and `here` tells a program whether it runs in a guest.
Of the modules, `launch` starts a guest on the host, `sandbox` is why nothing of the host can change, `uml` and `qemu`
are the two kinds of kernel, `system` is what QEMU boots, and `inside` is the guest's init.
"""

from __future__ import annotations

from layerfs.guest.environment import Here, here
from layerfs.guest.launch import run
from layerfs.guest.request import KINDS, Request, TimedOut

__all__ = ["KINDS", "Here", "Request", "TimedOut", "here", "run"]
