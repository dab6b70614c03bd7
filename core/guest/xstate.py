"""Processors with AMX, on which Debian 12's User-Mode Linux (6.1) does not start by itself.

It sets a process's extended registers by ptrace(2) with as many bytes as those up to AVX-512 have. The host's kernel
takes all registers or none (``xstateregs_set`` in Linux, arch/x86/kernel/fpu/regset.c), and says EFAULT. A library that
is loaded before the C library fills up what is missing with what the process has.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import tempfile
from pathlib import Path

from layerfs.guest.debian import cache
from layerfs.guest.kind import find_program, processor_flags
from layerfs.programs import run


def library() -> Path | None:
    """The library for ``LD_PRELOAD``, compiled the first time; None where it is not needed.

    Raises `EnvironmentUnfit` where no compiler is there.
    """
    if "amx_tile" not in processor_flags():
        return None
    source = importlib.resources.files(__package__).joinpath("xstate.c").read_bytes()
    made = cache() / f"xstate-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if not made.exists():
        compiler = find_program("gcc", "gcc")
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as place:
            given, output = Path(place, "xstate.c"), Path(place, made.name)
            given.write_bytes(source)
            run([compiler, "-O2", "-shared", "-fPIC", "-o", str(output), str(given)], "gcc")
            os.replace(output, made)
    return made
