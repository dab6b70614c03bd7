"""Which extended attributes belong to a layer, and how they are read.

Container engines keep only ``security.capability``; here what users set themselves and ACLs are kept too. What a
storage backend or a security module keeps for its own use (``trusted.*``, ``security.selinux``, ``user.overlay.*``)
says nothing about the file and is not part of a diff.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from layerfs.kernel import xattr

CAPABILITY: Final = "security.capability"

_KEPT: Final = frozenset((CAPABILITY, "system.posix_acl_access", "system.posix_acl_default"))
_BACKENDS: Final = ("user.overlay.", "user.fuseoverlayfs.", "user.containers.", "user.layerfs.")

# struct vfs_ns_cap_data in linux/capability.h: revision 3 is revision 2 with the root uid of a user namespace after it.
_REVISION_2: Final = b"\x02"
_REVISION_3: Final = b"\x03"
_REVISION_2_SIZE: Final = 20
_REVISION_3_SIZE: Final = 24


def kept(name: str) -> bool:
    """Whether the attribute ``name`` is part of a layer."""
    return name in _KEPT or (name.startswith("user.") and not name.startswith(_BACKENDS))


def read(file: int | bytes) -> dict[str, bytes]:
    """The kept attributes of a descriptor, or of a path whose last part is not followed, sorted by name.

    Capabilities that are bound to one user namespace come without that namespace's root, as a layer is not bound to
    it. Raises `OSError`.
    """
    follow = isinstance(file, int)
    try:
        names = os.listxattr(file, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise
    if not names:
        return {}
    found = {name: xattr.get(file, name, follow_symlinks=follow) for name in sorted(filter(kept, names))}
    if CAPABILITY in found:
        found[CAPABILITY] = _unbound(found[CAPABILITY])
    return found


def _unbound(capability: bytes) -> bytes:
    if len(capability) == _REVISION_3_SIZE and capability[3:4] == _REVISION_3:
        return capability[:3] + _REVISION_2 + capability[4:_REVISION_2_SIZE]
    return capability
