"""The signals that tell a program to end, and that none of them is lost."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]

_SOON = 0.02  # seconds


def ending() -> tuple[signal.Signals, ...]:
    """SIGINT, SIGTERM and SIGHUP: of a closed terminal; not where it is ignored, as nohup(1) wants it."""
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hangup)


@contextmanager
def not_lost(handler: Handler) -> Iterator[None]:
    """Call the handler again, a moment later, where the KeyboardInterrupt that it raised was lost.

    Python prints an exception in the callback of a weak reference, as every import has one, or in a finalizer, and goes
    on. SIGALRM is used for it.
    """

    def lost(what: sys.UnraisableHookArgs) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, _SOON)
        else:
            before(what)

    before, sys.unraisablehook = sys.unraisablehook, lost
    try:
        yield
    finally:
        sys.unraisablehook = before
        if signal.getsignal(signal.SIGALRM) is handler:
            signal.setitimer(signal.ITIMER_REAL, 0)


def is_interruption(error: BaseException | None) -> bool:
    """Whether a KeyboardInterrupt is behind an error, as Python and others wrap what falls into a call of theirs."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__
    return error is not None
