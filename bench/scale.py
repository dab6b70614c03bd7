"""Whether a store stays fast as it grows: prepare, stat and remove at few and at many layers, side by side.

``python -m layerfs.bench.scale`` makes two stores, writes the metadata of their layers in bulk, and times the three
operations in turns on both, so that whatever the machine does meets both alike.
"""

from __future__ import annotations

import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from layerfs.store import Store

_OPERATIONS = ("prepare", "stat", "remove")


def fill(root: Path, count: int) -> None:
    """Write ``count`` committed layers into the database of the store at ``root``; a base for new ones is there."""
    with sqlite3.connect(root / "layerfs.db") as database:
        first = database.execute("SELECT max(number) FROM volumes").fetchone()[0] + 1
        database.executemany("INSERT INTO volumes (number) VALUES (?)", ((first + n,) for n in range(count)))
        database.executemany(
            "INSERT INTO layers (key, kind, parent, volume, state, created, updated, labels)"
            " VALUES (?, 'committed', (SELECT number FROM layers WHERE key = 'base'), ?, 'ready', 0, 0, '{}')",
            ((f"layer {n}", first + n) for n in range(count)),
        )
    database.close()


def measure(stores: dict[int, Store], rounds: int) -> dict[tuple[str, int], list[float]]:
    """Seconds of each operation, by operation and number of layers."""
    samples: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds):
        for count in random.sample(sorted(stores), len(stores)):
            store, key = stores[count], f"new {number}"
            actions: tuple[Callable[[], object], ...] = (
                lambda store=store, key=key: store.prepare(key, "base"),  # type: ignore[misc]
                lambda store=store, key=key: store.stat(key),  # type: ignore[misc]
                lambda store=store, key=key: store.remove(key),  # type: ignore[misc]
            )
            for name, action in zip(_OPERATIONS, actions, strict=True):
                begin = time.perf_counter()
                action()
                samples.setdefault((name, count), []).append(time.perf_counter() - begin)
    return samples


@click.command()
@click.option("--few", default=1_000, show_default=True, help="Layers of the small store.")
@click.option("--many", default=100_000, show_default=True, help="Layers of the large one.")
@click.option("--rounds", default=200, show_default=True, help="Samples of each operation on each.")
@click.option("--driver", default="overlay2", show_default=True, help="The stores' driver.")
@click.option("--scratch", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Where to work.")
def main(few: int, many: int, rounds: int, driver: str, scratch: Path | None) -> None:
    """Time a store's operations at few and at many layers."""
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scratch, prefix="layerfs-scale-")))
        stores = {}
        for count in (few, many):
            stores[count] = store = stack.enter_context(Store(work / str(count), driver))
            store.prepare("making", "")
            store.commit("base", "making")
            fill(store.root, count)
        samples = measure(stores, rounds)
    table = Table("", f"{few:,} layers", f"{many:,} layers", "ratio", title=f"Medians of {rounds} on {driver}")
    for name in _OPERATIONS:
        small, large = (statistics.median(samples[name, count]) for count in (few, many))
        table.add_row(name, f"{small * 1e6:.0f} µs", f"{large * 1e6:.0f} µs", f"{large / small:.2f} x")
    Console().print(table)


if __name__ == "__main__":
    main()
