"""What the store says of a layer: its kind, ancestry, labels and digests."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


class Kind(enum.StrEnum):
    """The three kinds of layer, as in containerd's snapshotter interface."""

    ACTIVE = "active"
    """Writable."""
    VIEW = "view"
    """A read-only look at a committed layer; never a parent."""
    COMMITTED = "committed"
    """Finished and immutable; the only kind that can be a parent."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a store.

    Attributes:
        key: its name, any string; one name space for all kinds.
        kind: active, view or committed.
        parent: key of its parent, or ``""``.
        labels: the user's or engine's own facts about it.
        created, updated: in UTC; both are set anew by a commit.
        diff_id: ``sha256:…`` of its uncompressed diff (OCI image spec), or ``""`` where none was computed.
        chain_id: as the OCI image spec defines it, or ``""`` where the diff ID of it or of an ancestor is unknown.
        size_limit: bytes that an active layer may hold, or None.
    """

    key: str
    kind: Kind
    parent: str
    created: datetime
    updated: datetime
    labels: Mapping[str, str] = field(default_factory=dict)
    diff_id: str = ""
    chain_id: str = ""
    size_limit: int | None = None
