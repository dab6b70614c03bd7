"""The signals that tell a program to end."""

from __future__ import annotations

import signal


def ending() -> tuple[signal.Signals, ...]:
    """SIGINT, SIGTERM and SIGHUP: of a closed terminal; not where it is ignored, as nohup(1) wants it."""
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hangup)
