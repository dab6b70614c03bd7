"""Ctrl-C and termination at points where nothing is torn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Self

from layerfs import signals


class Interrupts:
    """Turns the first signal to end into one KeyboardInterrupt, and only where that is `allowed`.

    A store operation that is cut in its middle is undone by the next opening of the store. A benchmark's store has no
    next opening, so its operations are let finish, and so is the cleaning up, however often Ctrl-C is pressed. Threads
    are never interrupted: whoever starts them ends them.
    """

    def __init__(self) -> None:
        self._allowed = False
        self._pending = False
        self._raised = False
        self._previous: dict[signal.Signals, Any] = {}
        self._kept = ExitStack()

    def __enter__(self) -> Self:
        for number in signals.ending():
            self._previous[number] = signal.signal(number, self._received)
        self._kept.enter_context(signals.not_lost(self._lost))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._kept.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending and (kind is None or not issubclass(kind, KeyboardInterrupt)):
            raise KeyboardInterrupt

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Where KeyboardInterrupt may come at any point; it comes at once if a signal is waiting."""
        with self._switched(True):
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Where it may not, inside `allowed`; a signal that came meanwhile is raised at the end."""
        with self._switched(False):
            yield
        self._check()

    @contextmanager
    def _switched(self, allowed: bool) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before, self._allowed = self._allowed, allowed
        try:
            self._check()
            yield
        finally:
            self._allowed = before

    def _received(self, _number: int, _frame: FrameType | None) -> None:
        self._pending = True
        self._check()

    def _lost(self, number: int, frame: FrameType | None) -> None:
        self._raised = False
        self._received(number, frame)

    def _check(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if self._pending and self._allowed and not self._raised:
            self._raised = True
            raise KeyboardInterrupt
