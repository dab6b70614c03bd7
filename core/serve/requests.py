"""What a server says of the requests that it answered: a log line each, and metrics where they are wanted."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from layerfs.errors import InvalidArgument, told

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram

log = logging.getLogger("layerfs.serve")


class Requests:
    """Logs requests with what they were about and how long they took.

    Args:
        metrics: also count them for `serve_metrics`.
    """

    def __init__(self, *, metrics: bool = False) -> None:
        self._failures: Counter | None = None
        self._seconds: Histogram | None = None
        if metrics:
            from prometheus_client import Counter, Histogram

            self._seconds = Histogram("layerfs_request_seconds", "Time that requests took", ["method"])
            self._failures = Counter("layerfs_failed_requests", "Requests that were refused", ["method", "error"])

    def done(self, method: str, subject: str, seconds: float) -> None:
        """A request was answered."""
        log.info("%s %r %.1f ms", method, subject, seconds * 1000)
        self._count(method, seconds)

    def failed(self, method: str, subject: str, seconds: float, error: Exception) -> None:
        """A request was refused, or met a fault in layerfs, whose traceback is logged."""
        known = told(error)
        if known is not None:
            text = " ".join(str(known).split())
            log.info("%s %r %.1f ms %s: %s", method, subject, seconds * 1000, type(known).__name__, text)
        else:
            log.error("%s %r: a fault in layerfs", method, subject, exc_info=error)
        self._count(method, seconds)
        if self._failures is not None:
            self._failures.labels(method, type(known or error).__name__).inc()

    def _count(self, method: str, seconds: float) -> None:
        if self._seconds is not None:
            self._seconds.labels(method).observe(seconds)


def serve_metrics(address: str) -> None:
    """Serve metrics in Prometheus's text format at ``http://HOST:PORT/metrics`` for as long as this process lives.

    Raises `InvalidArgument` for what is no ``HOST:PORT``, and for one that cannot be listened at.
    """
    from prometheus_client import start_http_server

    host, _, port = address.rpartition(":")
    try:
        start_http_server(int(port), host or "127.0.0.1")
    except (ValueError, OverflowError, OSError) as error:
        raise InvalidArgument(
            f"--metrics {address!r}: {error}; write it as HOST:PORT, with a port that is free"
        ) from error
