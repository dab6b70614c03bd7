"""User namespaces: being root over one's own files and mounts without being root on the host (user_namespaces(7))."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import shutil
import subprocess
from pathlib import Path

from layerfs.errors import EnvironmentUnfit
from layerfs.kernel.libc import check, libc

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_ALL_IDS = 0xFFFFFFFF


def in_user_namespace() -> bool:
    """Whether this process sees other user IDs than the host does."""
    return _ranges("uid") != [(0, 0, _ALL_IDS)]


def mapped(uid: int) -> bool:
    """Whether files can belong to user ``uid`` as this process sees users."""
    return any(first <= uid < first + count for first, _, count in _ranges("uid"))


def mapped_group(gid: int) -> bool:
    """Whether files can belong to group ``gid`` as this process sees groups."""
    return any(first <= gid < first + count for first, _, count in _ranges("gid"))


def enter() -> None:
    """Make this process, when it is not root, root of a new user and mount namespace; root stays as it is.

    With newuidmap(1) and ranges for the user in /etc/subuid and /etc/subgid it has as many IDs as they give, else only
    its own one, as 0. The process must have a single thread. Raises `EnvironmentUnfit` where the host forbids it.
    """
    if os.geteuid() == 0:
        return
    uid, gid = os.geteuid(), os.getegid()
    ranges = _subordinate("/etc/subuid", uid), _subordinate("/etc/subgid", uid)
    helped = all(ranges) and shutil.which("newuidmap") and shutil.which("newgidmap")
    ready, go = os.pipe()
    # The helper stays outside, where it may run the set-user-ID programs that write our maps.
    helper = os.fork() if helped else 0
    if helped and helper == 0:
        os.close(go)
        os._exit(_write_maps_from_outside(ready, os.getppid(), (uid, gid), ranges))
    os.close(ready)
    try:
        check(libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS))
    except OSError as error:
        raise EnvironmentUnfit(_forbidden(error)) from error
    else:
        if helped:
            os.write(go, b"1")
    finally:
        os.close(go)
        if helped:
            status = os.waitpid(helper, 0)[1]
    if not helped or status:
        _write_own_maps(uid, gid)


def _ranges(kind: str) -> list[tuple[int, int, int]]:
    """The namespace's map: first ID inside, first ID outside, how many."""
    lines = Path(f"/proc/self/{kind}_map").read_text().splitlines()
    return [(int(a), int(b), int(c)) for a, b, c in (line.split() for line in lines)]


def _subordinate(file: str, uid: int) -> list[tuple[int, int]]:
    """The ranges that subuid(5) gives a user: first ID, how many."""
    names = {str(uid)}
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(uid).pw_name)
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return []
    fields = [line.split(":") for line in lines]
    return [(int(f[1]), int(f[2])) for f in fields if len(f) == 3 and f[0] in names]


def _write_maps_from_outside(
    ready: int, pid: int, own: tuple[int, int], ranges: tuple[list[tuple[int, int]], list[tuple[int, int]]]
) -> int:
    """In the helper process: its exit code."""
    if os.read(ready, 1) != b"1":
        return 1
    for program, number, given in zip(("newuidmap", "newgidmap"), own, ranges, strict=True):
        arguments = ["0", str(number), "1"]
        inside = 1
        for first, count in given:
            arguments += [str(inside), str(first), str(count)]
            inside += count
        result = subprocess.run([program, str(pid), *arguments], capture_output=True, check=False)
        if result.returncode:
            return 1
    return 0


def _write_own_maps(uid: int, gid: int) -> None:
    """The map that a process may write for itself: its own IDs as 0. What the helper has written already stays."""
    for name, text in (("uid_map", f"0 {uid} 1"), ("setgroups", "deny"), ("gid_map", f"0 {gid} 1")):
        path = Path("/proc/self", name)
        if name.endswith("map") and path.read_text():
            continue
        try:
            path.write_text(text)
        except OSError as error:
            if name != "setgroups" or error.errno != errno.EPERM:
                raise EnvironmentUnfit(_forbidden(error)) from error


def _forbidden(error: OSError) -> str:
    return (
        f"making a user namespace: {error.strerror}; run as root, or allow it with "
        "sysctl kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0 "
        "user.max_user_namespaces=10000"
    )
