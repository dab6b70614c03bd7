"""layerfs.treecopy on real file systems."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from layerfs import mounts
from layerfs.driver import Mount
from layerfs.errors import FailedPrecondition
from layerfs.treecopy import copy_file, copy_tree, remove_tree

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="devices, owners and mounts need root")


def describe(root: Path) -> dict[str, Any]:
    """Everything that a copy has to keep, by path; inode numbers as the set of names that share one."""
    seen: dict[int, list[str]] = {}
    result: dict[str, Any] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        info = path.lstat()
        name = str(path.relative_to(root))
        kind = stat.S_IFMT(info.st_mode)
        content: object = None
        if stat.S_ISREG(info.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(info.st_mode):
            content = os.readlink(path)
        xattrs = {
            key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
        }
        if not stat.S_ISDIR(info.st_mode):
            seen.setdefault(info.st_ino, []).append(name)
        owner = (info.st_uid, info.st_gid)
        result[name] = (kind, stat.S_IMODE(info.st_mode), owner, info.st_mtime_ns, info.st_rdev, content, xattrs)
    result["links"] = sorted(names for names in seen.values() if len(names) > 1)
    return result


def copied(source: Path, target: Path) -> dict[str, Any]:
    target.mkdir(exist_ok=True)
    src, dst = os.open(source, os.O_RDONLY), os.open(target, os.O_RDONLY)
    try:
        before = sorted(os.listdir("/proc/self/fd"))
        copy_tree(src, dst)
        assert sorted(os.listdir("/proc/self/fd")) == before
    finally:
        os.close(src)
        os.close(dst)
    return describe(target)


def removed(parent: Path, name: str | bytes) -> None:
    fd = os.open(parent, os.O_RDONLY)
    try:
        remove_tree(fd, name)
    finally:
        os.close(fd)


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """A tree with one of everything."""
    root = tmp_path / "source"
    (root / "dir" / "inner").mkdir(parents=True)
    (root / os.fsdecode(b"\xff name\n")).write_bytes(b"odd name")
    (root / "small").write_bytes(b"abc")
    (root / "empty").touch()
    (root / "large").write_bytes(os.urandom(300_000))
    os.link(root / "small", root / "dir" / "hard link")
    os.link(root / "small", root / "dir" / "inner" / "hard link 2")
    (root / "link").symlink_to("dir/../../elsewhere")
    (root / "dangling").symlink_to("/nowhere/at all")
    os.mkfifo(root / "fifo", 0o620)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "socket"))
    (root / "setuid").write_bytes(b"#!")
    os.setxattr(root / "small", "user.note", b"\0binary")
    os.setxattr(root / "dir", "user.of-a-dir", b"x")
    if os.geteuid() == 0:
        os.mknod(root / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(root / "block", stat.S_IFBLK | 0o600, os.makedev(7, 200))
        os.mknod(root / "whiteout", stat.S_IFCHR, 0)
        os.chown(root / "setuid", 12, 34)
        os.chown(root / "link", 56, 78, follow_symlinks=False)
        os.chown(root / "dir" / "inner", 90, 12)
        os.setxattr(root / "setuid", "security.capability", bytes.fromhex("0100000200000400000000000000000000000000"))
        os.setxattr(root / "dir", "trusted.overlay.opaque", b"y")
        os.setxattr(root / "link", "trusted.note", b"on a link", follow_symlinks=False)
        os.setxattr(root / "device", "trusted.note", b"on a device")
        acl = bytes.fromhex("0200000001000700ffffffff02000500e803000004000500ffffffff10000700ffffffff20000500ffffffff")
        os.setxattr(root / "dir", "system.posix_acl_default", acl)
        os.setxattr(root / "dir", "system.posix_acl_access", acl)
    os.chmod(root / "setuid", 0o6755)
    os.chmod(root / "dir" / "inner", 0o3500)
    os.chmod(root / "small", 0o004)
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        os.utime(path, ns=(number, 1_000_000_000 * number + 123_456_789), follow_symlinks=False)
    os.utime(root, ns=(5, -5_000_000_001))
    return root


def test_everything_is_kept(rich: Path, tmp_path: Path) -> None:
    assert copied(rich, tmp_path / "target") == describe(rich)


def test_what_the_target_would_hand_down_is_not_inherited(rich: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    expected = describe(rich)
    acl = bytes.fromhex("0200000001000700ffffffff04000700ffffffff20000700ffffffff")
    os.setxattr(target, "system.posix_acl_default", acl)
    os.chown(target, -1, 0 if os.geteuid() else 77)
    os.chmod(target, 0o2777)
    assert copied(rich, target) == expected


def test_holes_stay_holes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "sparse", "wb") as file:
        file.seek(5 << 20)
        file.write(b"x" * 5000)
        file.truncate(64 << 20)
    with open(source / "all hole", "wb") as file:
        file.truncate(10 << 20)
    assert copied(source, tmp_path / "target")["sparse"] == describe(source)["sparse"]
    for name in ("sparse", "all hole"):
        assert (tmp_path / "target" / name).stat().st_size == (source / name).stat().st_size
        assert (tmp_path / "target" / name).stat().st_blocks <= (source / name).stat().st_blocks


@needs_root
def test_from_one_file_system_to_another(rich: Path, tmp_path: Path) -> None:
    (rich / "dir" / "big").write_bytes(os.urandom(3 << 20))
    for key in os.listxattr(rich / "device"):
        os.removexattr(rich / "device", key)
    target = tmp_path / "target"
    target.mkdir()
    mounts.attach([Mount("tmpfs", "tmpfs")], target)
    try:
        assert copied(rich, target / "copy") == describe(rich)
    finally:
        mounts.unmount(target)


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("s")
    source = tmp_path / "source"
    source.mkdir()
    (source / "link").symlink_to(outside)
    assert copied(source, tmp_path / "target")["link"][5] == str(outside)
    removed(tmp_path, "target")
    assert (outside / "secret").exists()
    assert not (tmp_path / "target").exists()


def test_copy_file(rich: Path, tmp_path: Path) -> None:
    src, dst = os.open(rich, os.O_RDONLY), os.open(tmp_path, os.O_RDONLY)
    try:
        for name in ("setuid", b"\xff name\n", "link", "fifo"):
            copy_file(src, name, dst, b"copy")
            expected, found = os.lstat(os.path.join(os.fsencode(rich), os.fsencode(name))), os.lstat(tmp_path / "copy")
            for attribute in ("st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns"):
                assert getattr(found, attribute) == getattr(expected, attribute)
            with pytest.raises(FileExistsError):
                copy_file(src, name, dst, b"copy")
            os.unlink("copy", dir_fd=dst)
    finally:
        os.close(src)
        os.close(dst)


def deep_tree(parent: Path, depth: int) -> None:
    fd = os.open(parent, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * 50, dir_fd=fd)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd))
        fd, old = os.open("d" * 50, os.O_RDONLY, dir_fd=fd), fd
        os.close(old)
    os.close(fd)


def test_trees_deeper_than_a_path_can_name(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    deep_tree(tmp_path / "source", 200)
    src, dst = os.open(tmp_path / "source", os.O_RDONLY), os.open(tmp_path / "target", os.O_RDONLY)
    copy_tree(src, dst)
    os.close(src)
    depth = 0
    while True:
        names = sorted(os.listdir(dst))
        if not names:
            break
        assert names == ["d" * 50, "file"]
        depth += 1
        dst, old = os.open("d" * 50, os.O_RDONLY, dir_fd=dst), dst
        os.close(old)
    os.close(dst)
    assert depth == 200
    removed(tmp_path, "source")
    removed(tmp_path, b"target")
    assert os.listdir(tmp_path) == []


def test_remove_of_anything(rich: Path, tmp_path: Path) -> None:
    removed(tmp_path, "absent")
    (tmp_path / "link").symlink_to(rich)
    removed(tmp_path, "link")
    assert rich.exists()
    removed(tmp_path, "source")
    assert os.listdir(tmp_path) == []


@needs_root
def test_remove_clears_immutable_flags(tmp_path: Path) -> None:
    (tmp_path / "t" / "d").mkdir(parents=True)
    (tmp_path / "t" / "d" / "file").touch()
    (tmp_path / "t" / "d" / "log").touch()
    if subprocess.run(["chattr", "+i", tmp_path / "t" / "d" / "file"], check=False, capture_output=True).returncode:
        pytest.skip("this file system has no immutable flag")
    subprocess.run(["chattr", "+a", tmp_path / "t" / "d" / "log"], check=True)
    subprocess.run(["chattr", "+i", tmp_path / "t" / "d", tmp_path / "t"], check=True)
    removed(tmp_path, "t")
    assert os.listdir(tmp_path) == []


@needs_root
def test_remove_never_enters_a_mount(tmp_path: Path) -> None:
    inside = tmp_path / "t" / "mounted"
    inside.mkdir(parents=True)
    mounts.attach([Mount("tmpfs", "tmpfs")], inside)
    try:
        (inside / "precious").touch()
        with pytest.raises(FailedPrecondition, match="mounted"):
            removed(tmp_path, "t")
        assert (inside / "precious").exists()
    finally:
        mounts.unmount(inside)
    removed(tmp_path, "t")


def test_remove_without_root_past_closed_modes() -> None:
    code = """
import os, sys; from layerfs.treecopy import remove_tree
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
os.makedirs("t/a/b"); open("t/a/f", "w").close(); open("t/a/b/f", "w").close()
os.chmod("t/a/b", 0o000); os.chmod("t/a", 0o500); os.chmod("t", 0o400)
remove_tree(os.open(".", os.O_RDONLY), "t")
assert os.listdir(".") == [], os.listdir(".")
"""
    with tempfile.TemporaryDirectory() as base:  # pytest's own directories are closed to other users
        os.chmod(base, 0o777)
        subprocess.run([sys.executable, "-c", code], check=True, cwd=base)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    root = tmp_path / "many"
    for number in range(5):
        (root / str(number)).mkdir(parents=True)
        for file in range(1200):
            (root / str(number) / str(file)).touch()
    return root


def test_many_entries(many: Path, tmp_path: Path) -> None:
    assert copied(many, tmp_path / "target") == describe(many)
    removed(tmp_path, "target")
    assert os.listdir(tmp_path) == ["many"]
