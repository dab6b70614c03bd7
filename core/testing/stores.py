"""A store filled and looked at, in few words."""

from __future__ import annotations

from layerfs.store import Store


def committed(store: Store, name: str, parent: str = "", **files: bytes) -> None:
    """Make a committed layer of these files."""
    store.prepare(f"{name} making", parent)
    with store.mounted(f"{name} making") as root:
        for file, content in files.items():
            (root / file).write_bytes(content)
    store.commit(name, f"{name} making")


def keys(store: Store, *filters: str) -> list[str]:
    """Of the layers that the filters choose."""
    return [layer.key for layer in store.list(*filters)]
