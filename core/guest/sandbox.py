"""Why a guest cannot change the host: its kernel runs as a process that sees the host read-only.

bubblewrap gives it a mount namespace of its own, where only named directories can be written, and a process namespace,
all of which dies with the launcher, however that ends.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from layerfs.guest.kind import find_program

PRIVATE = Path("/run")
"""An empty directory in memory in the sandbox. The host's is of no use in a guest, which has one of its own too."""

JOB = PRIVATE / "layerfs-guest.json"
"""What `layerfs.guest.inside` shall do."""


def command(program: Sequence[str], *, job: int, writable: Sequence[Path], readable: Sequence[Path]) -> list[str]:
    """The command line that runs ``program`` in a sandbox.

    Args:
        job: the descriptor that the contents of `JOB` are read from.
        writable: directories that it may change; it finds them at the same paths.
        readable: directories that must be there although something else covers them.
    """
    line = [find_program("bwrap", "bubblewrap"), "--unshare-pid", "--die-with-parent"]
    if os.geteuid() == 0:
        line += ["--cap-add", "ALL"]
    line += ["--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--dev-bind-try", "/dev/kvm", "/dev/kvm"]
    line += ["--tmpfs", str(PRIVATE), "--file", str(job), str(JOB)]
    for path in readable:
        line += ["--ro-bind", str(path), str(path)] if path.is_relative_to(PRIVATE) else []
    for path in writable:
        line += ["--bind", str(path), str(path)]
    return [*line, "--chdir", "/", "--", *program]
