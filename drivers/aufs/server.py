"""The daemon's loop: reads the kernel's requests, has them carried out, and answers.

One thread reads and answers; what may take long, which is reading from a disk, syncing and copying up large files, is
done by others. After an answer the next request often follows within microseconds, so the loop looks for it for a
moment before it sleeps, as long as that has paid lately: waking up costs more than most requests do. Where the
processors are busy, though, it takes the time from who asks, and the kernel takes the processor from it; then it sleeps
at once.

No error ends the loop but that the mount is gone: what goes wrong in one operation is its answer.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from layerfs.drivers.aufs.jobs import Job, Pending, Workers
from layerfs.drivers.aufs.operations import Aside, Operations, Payload, Request
from layerfs.drivers.aufs.tree import Tree
from layerfs.kernel import fuse

_SPIN: Final = 30e-6
"""Seconds to look for the next request before sleeping."""
_SAMPLE: Final = 256
_CROWDED: Final = 16
"""How often the processor is taken away, in so many requests: next to never where one is idle, else in most of them."""
_LONG: Final = 16
"""Samples for which nothing is tried again after that."""
_HEADER: Final = fuse.IN_HEADER.size


class Server:
    """Serves one union over the descriptor ``device`` of /dev/fuse."""

    def __init__(self, device: int, tree: Tree, work: int | None, *, passthrough: bool) -> None:
        self._device = device
        self._tree = tree
        self._operations = Operations(device, tree, work, passthrough=passthrough)
        self._workers = Workers()
        self._parked: dict[Job, list[Request]] = {}
        self._buffer = bytearray(fuse.BUFFER_SIZE)

    # The loop

    def run(self) -> None:
        """Serve until the mount is gone."""
        device, buffer = self._device, self._buffer
        view, buffers = memoryview(buffer), (buffer,)
        readv, unpack, clock = os.readv, fuse.IN_HEADER.unpack_from, time.perf_counter
        serve, relax = self._serve, self._tree.places.relax
        poll = select.poll()
        poll.register(device, select.POLLIN)
        poll.register(self._workers.ready, select.POLLIN)
        look = poll.poll
        spin = _SPIN if len(os.sched_getaffinity(0)) > 1 else 0.0
        paid, crowded, served, taken = True, False, 0, _times_taken()
        while True:
            events = look(0)
            if not events:
                began = clock()
                while paid and not crowded and not events and clock() - began < spin:
                    events = look(0)
                events = events or look()
                paid = clock() - began < spin
            if len(events) > 1 or events[0][0] != device:
                self._finish_jobs()
                continue
            try:
                length = readv(device, buffers)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                # EAGAIN, ENOENT: whoever asked has given up meanwhile.
                if error.errno not in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    raise
                continue
            served += 1
            if served >= (_LONG * _SAMPLE if crowded else _SAMPLE):
                before, taken = taken, _times_taken()
                crowded = not crowded and taken - before > _CROWDED
                served = 0
            _, opcode, unique, node, uid, gid, _ = unpack(buffer)
            relax()
            serve(Request(opcode, unique, node, uid, gid, view[_HEADER:length]))

    def _serve(self, request: Request) -> None:
        """Carry out a request and answer it, or put it aside until a job is done."""
        handler = self._operations.handlers.get(request.opcode)
        try:
            if handler is None:
                if request.opcode == fuse.INTERRUPT:
                    self._interrupt(request)
                else:
                    self._answer(request.unique, errno.ENOSYS)
                return
            payload = handler(request)
            if payload is not None:
                self._send(request.unique, payload)
        except Aside as aside:
            self._workers.start(Job(partial(self._work, request.unique, aside.work)))
        except Pending as pending:
            self._park(request, pending.job)
        except OSError as error:
            self._answer(request.unique, error.errno or errno.EIO)
        except Exception as error:  # a fault of ours must not take the mount down
            complain(f"request {request.opcode} on {request.node}: {type(error).__name__}: {error}")
            self._answer(request.unique, errno.EIO)

    def _send(self, unique: int, payload: Payload) -> None:
        try:
            if isinstance(payload, bytes):
                os.write(self._device, fuse.OUT_HEADER.pack(16 + len(payload), 0, unique) + payload)
            else:
                size = 16 + sum(map(len, payload))
                os.writev(self._device, [fuse.OUT_HEADER.pack(size, 0, unique), *payload])
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # its caller is gone, or the mount
                complain(f"answering the request {unique}: {error.strerror}")

    def _answer(self, unique: int, number: int) -> None:
        try:
            os.write(self._device, fuse.OUT_HEADER.pack(16, -number, unique))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                complain(f"answering the request {unique}: {error.strerror}")

    # Jobs

    def _park(self, request: Request, job: Job) -> None:
        request.data = memoryview(bytes(request.data))
        if job in self._parked:
            self._parked[job].append(request)
        else:
            self._parked[job] = [request]
            self._workers.start(job)

    def _finish_jobs(self) -> None:
        for job in self._workers.finished():
            requests = self._parked.pop(job, [])
            try:
                if job.then is not None:
                    job.then(job)
            except Pending as pending:
                for request in requests:
                    self._park(request, pending.job)
                continue
            except OSError as error:
                job.error = job.error or error
            except Exception as error:  # see _serve
                complain(f"after a job: {type(error).__name__}: {error}")
                job.error = job.error or error
            for request in requests:
                if job.error is None:
                    self._serve(request)
                else:
                    self._answer(request.unique, getattr(job.error, "errno", None) or errno.EIO)

    def _work(self, unique: int, work: Callable[[], Payload]) -> None:
        """Answer a request with what ``work`` returns, in a thread."""
        try:
            payload = work()
        except OSError as error:
            self._answer(unique, error.errno or errno.EIO)
        except Exception as error:  # see _serve
            complain(f"in a thread: {type(error).__name__}: {error}")
            self._answer(unique, errno.EIO)
        else:
            self._send(unique, payload)

    def _interrupt(self, request: Request) -> None:
        """Whoever waits for a request that has been put aside does not want to any more."""
        (unique,) = fuse.INTERRUPT_IN.unpack_from(request.data)
        for requests in self._parked.values():
            for parked in requests:
                if parked.unique == unique:
                    requests.remove(parked)
                    self._answer(unique, errno.EINTR)
                    return


def _times_taken() -> int:
    """How often the kernel took the processor from this thread that wanted to go on."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def complain(text: str) -> None:
    """Say on standard error, where the daemon still has one, what is not an answer to anybody."""
    print(f"layerfs-aufs: {text}", file=sys.stderr, flush=True)
