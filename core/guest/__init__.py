"""Guests: a command in a kernel of its own that sees the host's file tree, for what the host's kernel lacks.

`run` is the way in, as ``layerfs guest`` is on the command line. `launch` starts a guest on the host, `sandbox` is why
nothing of the host can change, `uml` and `qemu` are the two kinds of kernel, and `inside` is the guest's init.
"""

from __future__ import annotations

from layerfs.guest.launch import run
from layerfs.guest.request import KINDS, Request, TimedOut

__all__ = ["KINDS", "Request", "TimedOut", "run"]
