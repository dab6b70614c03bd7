"""Many things at a time, as an engine does them that starts and stops many containers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import trio

Item = TypeVar("Item")


def at_once(work: Callable[[Item], object], items: Iterable[Item], tasks: int) -> None:
    """Do ``work`` for each item in a thread of its own, at most ``tasks`` at a time, in no certain order.

    Raises the first thing that one of them raised; then, and where the caller is interrupted, those that have not begun
    are left, and those that have are waited for.
    """
    scope = trio.CancelScope()
    tokens: list[trio.lowlevel.TrioToken] = []

    async def crowd() -> None:
        tokens.append(trio.lowlevel.current_trio_token())
        limit = trio.CapacityLimiter(tasks)
        with scope:
            async with trio.open_nursery() as nursery:
                for item in items:
                    nursery.start_soon(partial(trio.to_thread.run_sync, work, item, limiter=limit))

    # In a thread, because an interruption may hit this one anywhere, and trio in its middle would not survive it.
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(trio.run, crowd)
        try:
            future.result()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        except BaseException:
            for token in tokens:
                token.run_sync_soon(scope.cancel)
            raise
