"""Work that takes long is done in threads, while the daemon goes on answering.

An operation that needs such work raises `Pending` before it has changed anything. Its request is put aside until the
job is done, and then carried out from its beginning, which finds the work done.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import Final

_THREADS: Final = 8


class Job:
    """One piece of work.

    Args:
        work: what is done in a thread; what it returns is of no account, what it raises is kept in `error`.
        then: what is done after it in the main thread, also when it has failed.
    """

    def __init__(self, work: Callable[[], None] | None, then: Callable[[Job], None] | None = None) -> None:
        self.work = work
        self.then = then
        self.error: Exception | None = None


class Pending(Exception):
    """The operation is to be repeated once the job is done."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job


class Workers:
    """Threads that are started when they are needed.

    Attributes:
        ready: a descriptor that can be read when a job is done.
    """

    def __init__(self) -> None:
        self.ready, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._threads = 0
        self._outstanding = 0

    def start(self, job: Job) -> None:
        self._outstanding += 1
        if job.work is None:
            self._finish(job)
            return
        if self._threads < min(self._outstanding, _THREADS):
            self._threads += 1
            threading.Thread(target=self._serve, daemon=True).start()
        self._todo.put(job)

    def finished(self) -> list[Job]:
        """The jobs that are done since the last call."""
        try:
            os.read(self.ready, 4096)
        except BlockingIOError:
            return []
        jobs = []
        while not self._done.empty():
            jobs.append(self._done.get())
        self._outstanding -= len(jobs)
        return jobs

    def _serve(self) -> None:
        while True:
            job = self._todo.get()
            try:
                assert job.work is not None
                job.work()
            except Exception as error:  # for whoever asked for it
                job.error = error
            self._finish(job)

    def _finish(self, job: Job) -> None:
        self._done.put(job)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"\0")
