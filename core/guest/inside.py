"""The guest's init: runs the command where the host's files are, and tells how it ended."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import traceback
import tty
from pathlib import Path
from typing import Any

from layerfs.guest.furnish import furnish
from layerfs.guest.sandbox import JOB
from layerfs.kernel.libc import libc
from layerfs.programs import CANNOT_RUN, NO_SUCH, shell_code

_POWER_OFF = 0x4321FEDC
_GATHER = 0.01  # seconds between two passings on; a switch of threads costs much in User-Mode Linux
_PIPE = 1 << 20


def main() -> None:
    """Run the job as process 1, and switch the guest off."""
    try:
        job = json.loads(JOB.read_text())
        furnish(job)
        _run(job)
    except BaseException:  # the launcher shows what the console said last
        traceback.print_exc()
    sys.stderr.flush()
    os.sync()
    libc.reboot(_POWER_OFF)


def _run(job: dict[str, Any]) -> None:
    """Run the command, with its output on the wires, and report the exit code."""
    control = _wire(job["devices"]["control"])
    pumps = []
    ends = []
    for name in ("output", "errors"):
        wire = _wire(job["devices"][name])
        ours, theirs = pty.openpty() if job["terminal"][name] else _wide_pipe()
        if job["terminal"][name]:
            columns, lines = job["window"]
            termios.tcsetwinsize(theirs, (lines, columns))
        ends.append(theirs)
        pumps.append(threading.Thread(target=_pump, args=(ours, wire)))
        pumps[-1].start()
    code = _status(job, ends, control)
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # whatever the command left running holds the pipes open
    for pump in pumps:
        pump.join()
    os.sync()
    _write(control, f"exit {code}\n".encode())
    if os.isatty(control):
        termios.tcdrain(control)


def _status(job: dict[str, Any], ends: list[int], control: int) -> int:
    """Start the command, and wait for it and for every orphan."""
    environment = job["environment"]
    try:
        os.chdir(job["directory"])  # where a relative path to the command begins
        program = shutil.which(job["command"][0], path=environment.get("PATH", os.defpath))
        if program is None:
            raise FileNotFoundError(2, os.strerror(2))
        child = subprocess.Popen(
            job["command"],
            executable=program,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=ends[0],
            stderr=ends[1],
            start_new_session=True,
        )
    except OSError as error:
        os.write(ends[1], f"layerfs: running {job['command'][0]!r}: {error.strerror}\n".encode())
        return NO_SUCH if isinstance(error, FileNotFoundError) else CANNOT_RUN
    finally:
        for end in ends:
            os.close(end)
    threading.Thread(target=_obey, args=(control, child.pid), daemon=True).start()
    while True:
        process, status = os.wait()
        if process == child.pid:
            return shell_code(os.waitstatus_to_exitcode(status))


def _obey(control: int, child: int) -> None:
    """Pass on the signals that the launcher sends, one number a line."""
    with open(control, closefd=False) as orders:
        for line in orders:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.killpg(child, int(line))


def _wire(device: str) -> int:
    """Open the end of a wire. A serial line is made to carry bytes as they are."""
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == device:
            device = f"/dev/{name.parent.name}"
    descriptor = os.open(device, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    if os.isatty(descriptor):
        tty.setraw(descriptor)
    return descriptor


def _wide_pipe() -> tuple[int, int]:
    ends = os.pipe()
    fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, _PIPE)
    return ends


def _pump(source: int, wire: int) -> None:
    with contextlib.suppress(OSError):  # EIO: the last user of a terminal has gone
        while data := os.read(source, _PIPE):
            _write(wire, data)
            time.sleep(_GATHER)
    if os.isatty(wire):
        termios.tcdrain(wire)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    main()
