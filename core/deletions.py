"""The whiteouts of one layer: remembered while it is applied, carried out when it is known what it brings.

Sources: the OCI image spec, "Representing Changes" (whiteouts, opaque whiteouts), and aufs(5) for the names that
begin with ``.wh..wh.``.
"""

from __future__ import annotations

import os
from typing import Final

from layerfs.confined import ConfinedTree, Directory, NotADirectory, Refused, Through, exists
from layerfs.driver import Whiteouts

PREFIX: Final = b".wh."
_META: Final = b".wh..wh."
_OPAQUE: Final = b".wh..wh..opq"


class Deletions:
    """What a layer hides of its parents.

    Args:
        whiteouts: the marks of a union's upper; None where deletions are real.
    """

    def __init__(self, tree: ConfinedTree, whiteouts: Whiteouts | None) -> None:
        self._tree = tree
        self._whiteouts = whiteouts
        self._hidden: list[tuple[Directory, bytes]] = []
        self._opaque: list[Directory] = []

    def note(self, name: bytes) -> bool:
        """Remember what the entry ``name`` hides; False where it is an ordinary entry. Raises `Refused`."""
        *above, base = [part for part in name.split(b"/") if part not in (b"", b".")] or [b""]
        for part in above:
            if part.startswith(_META):
                return True
            if part.startswith(PREFIX):
                raise Refused("is below a whiteout")
        if not base.startswith(PREFIX):
            return False
        if base != _OPAQUE and base.startswith(_META):
            return True
        hidden = base[len(PREFIX) :]
        if hidden in (b"", b".", b".."):
            raise Refused("is a whiteout of nothing")
        parent, slash, _ = name.rpartition(b"/")
        try:
            directory, through = self._tree.find(parent or slash)
        except NotADirectory:
            through = Through.OWN
        if through is Through.OWN:
            return True  # umoci lists what is gone with a directory that became a file or a link
        if through is Through.LOWER:
            raise Refused("is a whiteout that leads through a link")
        if base == _OPAQUE:
            self._opaque.append(directory)
        else:
            self._hidden.append((directory, hidden))
        return True

    def carry_out(self) -> None:
        """Take away or mark what is hidden, and nothing that the layer itself has brought."""
        for directory in self._opaque:
            if not directory.gone:
                self._cut_off(directory)
        for directory, name in self._hidden:
            if not directory.gone:
                self._tree.relax()
                self._hide(directory, name)

    def _hide(self, directory: Directory, name: bytes) -> None:
        fd = self._tree.fd(directory)
        child = directory.children.get(name)
        if child is not None and child.kept:
            if not child.entry:
                self._tree.make_plain(child)
            child.cut = True
            self._cut_off(child)
        elif directory.has(name) and exists(fd, name):
            pass  # a file of the layer's own
        elif self._whiteouts is not None:
            self._whiteouts.hide(fd, name)
        else:
            self._tree.remove(directory, name)

    def _cut_off(self, top: Directory) -> None:
        """Leave nothing in a directory but what the layer brought."""
        todo = [top]
        while todo:
            directory = todo.pop()
            if not directory.fresh:
                self._tree.relax()
                for name in map(os.fsencode, os.listdir(self._tree.fd(directory))):
                    child = directory.children.get(name)
                    if not (name in directory.names or (child is not None and child.kept)):
                        self._tree.remove(directory, name)
            for child in directory.children.values():
                child.cut = True
                if not (child.fresh or child.entry):
                    self._tree.make_plain(child)
                todo.append(child)
        if self._whiteouts is not None:
            self._whiteouts.make_opaque(self._tree.fd(top))
