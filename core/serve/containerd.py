"""The server for containerd: the snapshots service by gRPC on a unix socket, until it is told to stop."""

from __future__ import annotations

import logging
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import grpc

from layerfs.errors import InvalidArgument
from layerfs.serve import listening
from layerfs.serve.requests import Requests
from layerfs.serve.snapshots import Snapshots
from layerfs.store import Store

log = logging.getLogger("layerfs.serve")

_THREADS: Final = 16
"""Requests at work at once; more wait. Most of one is waiting for the kernel."""
_LARGEST: Final = 16 << 20
"""Bytes of a message, as containerd's own limit."""
_GRACE: Final = 30.0
"""Seconds that requests under way have when the server is told to stop, before they are broken off."""


def serve(store: Store, socket: Path, requests: Requests) -> None:
    """Serve until a signal to end, then finish the requests under way. Called in the main thread.

    Where one of them does not end, the process does, see `listening.break_off`.

    Where systemd hands a socket over, that one is served and ``socket`` is left alone.
    Raises `AlreadyExists` (another server is there), `InvalidArgument` (no place for a socket, or a store whose path
    engines cannot write into mount options).
    """
    _check_root(store.root)
    with ExitStack() as stack:
        given = listening.handed_over()
        if given is not None:
            stack.enter_context(given)
            # gRPC opens its sockets itself: a relay stands between.
            socket = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="layerfs-"))) / "socket"
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="request")
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        sizes = [(f"grpc.max_{way}_message_length", _LARGEST) for way in ("receive", "send")]
        server = grpc.server(pool, handlers=[Snapshots(store, requests).handler()], options=sizes)
        wait_for_stop = stack.enter_context(listening.stop_signals())
        with listening.bound(socket, partial(_bind, server)):
            server.start()
            if given is not None:
                listening.Relay(given, socket).start()
            listening.notify("READY=1")
            at = "the socket of systemd" if given else socket
            log.info("ready: %s on %s at %s", store.driver.name, store.root, at)
            wait_for_stop()
            listening.notify("STOPPING=1")
            log.info("stopping; requests under way are finished")
            finished = server.stop(_GRACE)
        finished.wait()
        # Those that have not begun are not waited for.
        ending = threading.Thread(target=pool.shutdown, kwargs={"cancel_futures": True}, daemon=True, name="end")
        ending.start()
        ending.join(listening.LAST)
    if ending.is_alive():
        listening.break_off()
    log.info("stopped")


def _check_root(root: Path) -> None:
    if wrong := set(str(root)).intersection(",:\\"):
        raise InvalidArgument(
            f"the path of the store, {str(root)!r}, has {' '.join(sorted(wrong))} in it, which engines do not escape "
            "in mount options; choose another --root"
        )


def _bind(server: grpc.Server, socket: Path) -> None:
    if not server.add_insecure_port(f"unix:{socket}"):
        raise InvalidArgument(f"a socket cannot be made at {str(socket)!r}; choose another path")
