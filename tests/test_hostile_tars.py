"""Archives made to escape, to damage or to exhaust: each is refused by name, and nothing outside the root changes.

The ideas of the escapes are those of containerd's ``TestBreakouts`` and of the CVEs on container and Python tar
extraction; each runs against a canary tree that stands beside the root.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import resource
import stat
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest

from layerfs.apply import Applied, apply
from layerfs.errors import BadLayer, LayerfsError
from layerfs.volume_dirs import opened

Member = tuple[tarfile.TarInfo, bytes]


def entry(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object) -> Member:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data)
    info.mode = 0o755
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def symlink(name: str, target: str) -> Member:
    return entry(name, kind=tarfile.SYMTYPE, linkname=target)


def hard(name: str, target: str) -> Member:
    return entry(name, kind=tarfile.LNKTYPE, linkname=target)


def folder(name: str) -> Member:
    return entry(name, kind=tarfile.DIRTYPE)


def device(name: str, major: int, minor: int, kind: bytes = tarfile.CHRTYPE) -> Member:
    return entry(name, kind=kind, devmajor=major, devminor=minor)


def archive(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _picture(base: Path) -> dict[str, tuple[object, ...]]:
    """Everything about the canary tree that an escape could change."""
    found: dict[str, tuple[object, ...]] = {}
    for path, dirs, files in os.walk(base):
        for name in [".", *dirs, *files]:
            full = os.path.join(path, name)
            status = os.lstat(full)
            content = Path(full).read_bytes() if stat.S_ISREG(status.st_mode) else b""
            found[full] = (status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_mtime_ns,
                           status.st_ctime_ns, content, tuple(os.listxattr(full, follow_symlinks=False)))  # fmt: skip
    return found


class Jail:
    """A root with a lower layer in it, and a canary beside and above."""

    def __init__(self, base: Path) -> None:
        self.canary = base / "canary"
        self.root = base / "canary/inner/root"
        self.root.mkdir(parents=True)
        (self.canary / "passwd").write_text("root:x:0:0")
        (self.canary / "inner/secret").write_text("secret")
        (self.canary / "dir/sub").mkdir(parents=True)
        (self.canary / "dir/file").write_text("outside")
        (self.root / "etc").mkdir()
        (self.root / "etc/passwd").write_text("inside")
        (self.root / "to-root").symlink_to("/")
        (self.root / "to-canary").symlink_to(self.canary)
        (self.root / "to-passwd").symlink_to(self.canary / "passwd")
        (self.root / "climb").symlink_to("../../..")
        (self.root / "proc").symlink_to("/proc/self/root")

    def outside(self) -> dict[str, tuple[object, ...]]:
        inside = str(self.root)
        return {name: value for name, value in _picture(self.canary).items() if not name.startswith(inside)}

    def apply(self, data: bytes, **options: object) -> Applied:
        before = self.outside()
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return apply(io.BytesIO(data), fd, **options)  # type: ignore[arg-type]
        finally:
            os.close(fd)
            assert self.outside() == before

    def refusal(self, data: bytes) -> LayerfsError | None:
        try:
            self.apply(data)
        except LayerfsError as error:
            return error
        return None


@pytest.fixture
def jail(tmp_path: Path) -> Jail:
    return Jail(tmp_path)


REFUSED: dict[str, list[Member]] = {
    "absolute name": [entry("/etc/evil", b"x")],
    "absolute name, many slashes": [entry("///evil", b"x")],
    "dot-dot": [entry("../evil", b"x")],
    "dot-dot in the middle": [entry("etc/../../evil", b"x")],
    "dot-dot that stays inside": [entry("etc/../evil", b"x")],
    "dot-dot at the end": [entry("etc/..", b"x")],
    "dot-dot directory": [folder("..")],
    "dot-dot directory deeper": [folder("etc/../..")],
    "no name": [entry("", b"x")],
    "a dot as a file": [entry(".", b"x")],
    "through an absolute link": [symlink("l", "/canary"), entry("l/evil", b"x")],
    "through a climbing link": [symlink("l", ".."), entry("l/evil", b"x")],
    "through a deep climbing link": [folder("a"), symlink("a/l", "../../.."), entry("a/l/evil", b"x")],
    "through a chain of links": [symlink("a", "b"), symlink("b", "../dir"), entry("a/evil", b"x")],
    "through a link that goes in and out": [folder("d"), symlink("l", "d/../../x"), entry("l/evil", b"x")],
    "through a lower link and then an own one": [symlink("etc/up", "../../.."), entry("to-root/etc/up/evil", b"x")],
    "a directory through a climbing link": [symlink("l", "../.."), folder("l/evil")],
    "a link through a climbing link": [symlink("l", "../.."), symlink("l/evil", "x")],
    "a hard link through a climbing link": [entry("f"), symlink("l", "../.."), hard("l/evil", "f")],
    "a link loop": [symlink("a", "b"), symlink("b", "a"), entry("a/evil", b"x")],
    "a dangling own link": [symlink("a", "nowhere"), entry("a/evil", b"x")],
    "below a file": [entry("f", b"x"), entry("f/evil", b"x")],
    "link in /proc of the lower layer": [entry("proc/evil", b"x"), entry("proc/self/root/evil", b"x"), folder("../x")],
    "hard link to an absolute name": [hard("l", "/etc/passwd")],
    "whiteout of the root": [entry("/.wh.")],
    "hard link to dot-dot": [hard("l", "../secret")],
    "hard link to dot-dot that stays inside": [hard("l", "etc/../etc/passwd")],
    "hard link to nothing": [hard("l", "missing")],
    "hard link to a missing directory's file": [hard("l", "missing/file")],
    "hard link to a directory": [hard("l", "etc")],
    "hard link to the root": [hard("l", ".")],
    "hard link to the root's absolute name": [hard("l", "/")],
    "hard link to an empty name": [hard("l", "")],
    "hard link to outside through an own link": [symlink("s", "../.."), hard("l", "s/passwd")],
    "hard link to outside through an absolute link": [symlink("s", "/"), hard("l", "s/etc/passwd")],
    "hard link to a later file": [hard("l", "later"), entry("later")],
    "bare whiteout": [entry(".wh.")],
    "bare whiteout deeper": [entry("etc/.wh.")],
    "whiteout of dot": [entry("etc/.wh..")],
    "whiteout of dot-dot": [entry("etc/.wh...")],
    "whiteout by an absolute name": [entry("/etc/.wh.passwd")],
    "whiteout through dot-dot": [entry("../.wh.secret")],
    "whiteout through an own link": [symlink("l", "../.."), entry("l/.wh.passwd")],
    "whiteout through a lower link": [entry("to-canary/.wh.passwd")],
    "opaque through a lower link": [entry("to-root/.wh..wh..opq")],
    "opaque through an own link": [symlink("l", "../../dir"), entry("l/.wh..wh..opq")],
    "below a whiteout": [entry(".wh.x/file")],
    "overlay's own whiteout": [device("w", 0, 0)],
    "a disk": [device("disk", 8, 0, tarfile.BLKTYPE)],
    "memory": [device("mem", 1, 1)],
    "kernel log": [device("kmsg", 1, 11)],
    "a symbolic link to nothing": [symlink("l", "")],
    "a long component": [entry("x" * 300)],
    "a long path": [entry("/".join(["x" * 100] * 60))],
    "a link's target too long": [symlink("l", "x" * 5000)],
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_escapes_are_refused_by_name_and_change_nothing_outside(what: str, jail: Jail) -> None:
    members = REFUSED[what]
    with pytest.raises(BadLayer, match="entry ") as caught:
        jail.apply(archive(*members))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("with_devices", [False, True])
def test_the_overlay_whiteout_device_is_refused_whatever_is_asked_for(with_devices: bool, jail: Jail) -> None:
    with pytest.raises(BadLayer, match="0:0"):
        jail.apply(archive(device("w", 0, 0)), devices=with_devices)


def test_devices_when_asked_for(jail: Jail) -> None:
    jail.apply(archive(device("disk", 8, 1, tarfile.BLKTYPE), device("mem", 1, 1)), devices=True)
    assert (jail.root / "disk").stat().st_rdev == os.makedev(8, 1)
    with pytest.raises(BadLayer, match="'far'"):
        jail.apply(archive(device("far", 1 << 20, 1)), devices=True)


CONFINED: dict[str, list[Member]] = {
    "absolute link, not used": [symlink("l", "/etc/passwd")],
    "file over an escaping link": [symlink("l", "/canary/passwd"), entry("l", b"now a file")],
    "file over a lower link to outside": [entry("to-passwd", b"now a file")],
    "directory over a lower link to outside": [folder("to-canary"), entry("to-canary/evil", b"x")],
    "mode of a lower link's target": [symlink("to-passwd", "elsewhere")],
    "below a lower absolute link": [entry("to-root/evil", b"x")],
    "below a lower climbing link": [entry("climb/evil", b"x")],
    "hard link to a link": [symlink("s", "/canary/passwd"), hard("l", "s")],
    "hard link to a lower link": [hard("l", "to-passwd")],
    "hard link over a link": [entry("f", b"f"), hard("to-passwd", "f")],
    "whiteout through an own link": [symlink("l", "etc"), entry("l/.wh.passwd"), entry("l/.wh..wh..opq")],
    "whiteout below an own file": [entry("f"), entry("f/.wh.x")],
    "whiteout below a lower file": [entry("etc/passwd/.wh.x")],
    "whiteout of a link": [entry(".wh.to-canary"), entry(".wh.climb")],
    "opaque root with links in it": [entry(".wh..wh..opq")],
    "a link takes a directory's place": [folder("d"), entry("d/f"), symlink("d", "../..")],
    "fifo over a link": [entry("to-passwd", kind=tarfile.FIFOTYPE)],
    "the root, as umoci calls it": [folder("/"), folder("//"), entry("/", b"what is called so is a directory")],
}


@pytest.mark.parametrize("what", CONFINED)
def test_what_is_allowed_stays_inside(what: str, jail: Jail) -> None:
    jail.apply(archive(*CONFINED[what]))
    if what == "below a lower absolute link":
        assert (jail.root / "evil").read_bytes() == b"x"
    if what.startswith("whiteout through"):
        assert (jail.root / "etc/passwd").read_text() == "inside"
    if what.startswith("hard link to a l"):
        assert (jail.root / "l").is_symlink()


def test_times_of_a_directory_that_became_a_link_do_not_reach_its_target(jail: Jail) -> None:
    outside = os.path.relpath(jail.canary / "dir", jail.root)
    jail.apply(archive(folder("a"), folder("a/b"), entry("a/b/f"), symlink("a", outside)))
    jail.apply(archive(folder("c"), folder("c/sub"), symlink("c", outside), entry("c/.wh..wh.x")))


def test_a_pax_name_with_a_nul(jail: Jail) -> None:
    with pytest.raises(BadLayer, match="NUL"):
        jail.apply(archive(entry("short", pax_headers={"path": "etc/passwd\0.png"})))


def _patched(data: bytes, at: int, field: bytes) -> bytes:
    """The archive with a header field replaced, and the checksum made right again."""
    block = bytearray(data)
    block[at : at + len(field)] = field
    start = at // 512 * 512
    block[start + 148 : start + 156] = b" " * 8
    block[start + 148 : start + 156] = b"%06o\0 " % sum(block[start : start + 512])
    return bytes(block)


@pytest.mark.parametrize(
    ("place", "field"),
    [
        (124, b"\xff" * 12), (124, b"\x80" + b"\x7f" * 11), (124, b"77777777777\0"), (124, b"-0000000001\0"),
        (124, b"0x000000001\0"), (124, b"0_0_0_0_001\0"), (124, b"\x80" + bytes(3) + b"\xff" * 8),
        (108, b"\xff" * 8), (108, b"garbage\0"), (100, b"9999999\0"), (136, b"\x80" + b"\xff" * 11), (156, b"Z"),
        (156, b"M"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_and_unknown_types_name_the_entry(place: int, field: bytes, jail: Jail) -> None:
    with pytest.raises(LayerfsError, match="'victim'"):
        jail.apply(_patched(archive(entry("victim", b"x"), form=tarfile.USTAR_FORMAT), place, field))


@pytest.mark.parametrize(
    "pax",
    [
        {"size": "-1"}, {"size": "99999999999999999999"}, {"size": "1e9"}, {"size": "0x10"}, {"mtime": "nan"},
        {"mtime": "1" * 70}, {"uid": "-5"}, {"uid": "4294967295"}, {"GNU.sparse.map": "0,1,0"},
        {"GNU.sparse.map": "5,1", "GNU.sparse.size": "3"}, {"GNU.sparse.map": "0,1"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1"},
        {"GNU.sparse.map": "10,-5,5,6", "GNU.sparse.size": "100"}, {"LIBARCHIVE.xattr.user.x": "!!"},
        {"SCHILY.xattr.user.x\0y": "z"}, {"SCHILY.xattr.system.posix_acl_access": "\2\0\0\0junk"},
        {"SCHILY.xattr.security.capability": "junk"}, {"SCHILY.xattr.user.large": "x" * 70000},
    ],
)  # fmt: skip
def test_hostile_extended_headers_name_the_entry(pax: dict[str, str], jail: Jail) -> None:
    with pytest.raises(BadLayer, match="'victim'"):
        jail.apply(archive(entry("victim", b"x", pax_headers=pax)))


def test_an_extended_header_of_many_mebibytes_is_refused(jail: Jail) -> None:
    with pytest.raises(BadLayer, match="too long"):
        jail.apply(archive(entry("victim", pax_headers={"comment": "x" * (2 << 20)})))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize("count", [3, 3000])
def test_many_extended_headers_of_one_entry_are_refused(jail: Jail, kind: bytes, count: int) -> None:
    """Each by itself may be as long, or there may be as many."""
    size = (2 << 20) // count
    record = b"%d %d=" % (size, count)
    data = record + b"x" * (size - len(record) - 1) + b"\n"
    with pytest.raises(BadLayer, match="extended headers are too long"):
        jail.apply(archive(*(entry("victim", data, kind) for _ in range(count)), entry("victim")))


def test_pieces_of_a_sparse_file_in_many_extended_headers_are_refused(jail: Jail) -> None:
    pair = b"23 GNU.sparse.offset=0\n" + b"25 GNU.sparse.numbytes=0\n"
    headers = (entry("victim", pair * 10_000, tarfile.XHDTYPE) for _ in range(4))
    with pytest.raises(BadLayer, match="extended headers are too long"):
        jail.apply(archive(*headers, entry("victim")))


def test_a_sparse_map_without_lines_is_refused_at_its_beginning(jail: Jail) -> None:
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1"}
    with pytest.raises(BadLayer, match=r"'victim': .* a line that is no number"):
        jail.apply(archive(entry("victim", b"1" * 100_000, pax_headers=pax)))


def test_a_sparse_file_cannot_be_larger_than_a_file_can_be(jail: Jail) -> None:
    huge = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str((1 << 63) - 1)}
    error = jail.refusal(archive(entry("victim", b"x", pax_headers=huge)))
    if error is None:  # some file systems can: it is all holes then
        assert (jail.root / "victim").stat().st_blocks < 100
    else:
        assert "'victim'" in str(error)


def _sample() -> bytes:
    return archive(
        folder("d"), entry("d/file", b"content" * 200), symlink("d/link", "file"), hard("d/hard", "d/file"),
        entry("long/" * 30 + "name", b"x"), entry("d/.wh.gone"),
        entry("utf8-é", b"y", pax_headers={"SCHILY.xattr.user.x": "1"}),
    )  # fmt: skip


def test_a_layer_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    data = _sample()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512  # the first block of the end mark
    assert end > 10 * 512
    for size in [*range(0, end + 1, 512), *range(100, end, 1536)]:
        jail = Jail(tmp_path / str(size))
        with pytest.raises(BadLayer, match="cut off"):
            jail.apply(data[:size])
    Jail(tmp_path / "whole").apply(data[: end + 512])


def test_the_end_may_be_missing_where_the_digest_is_verified(tmp_path: Path) -> None:
    """As umoci writes archives, without the last payload's padding. What is cut off before is refused all the same."""
    data = _sample()
    bare = len(data.rstrip(b"\0"))
    end = -(-bare // 512) * 512
    for size in (bare, end):
        place = tmp_path / str(size)
        place.mkdir()
        with opened(place) as root:
            applied = apply(io.BytesIO(data[:size]), root, verified=True)
        assert (applied.size, applied.diff_id) == (size, f"sha256:{hashlib.sha256(data[:size]).hexdigest()}")
        assert (place / "utf8-é").read_bytes() == b"y"
    for size in (0, 100, bare - 1, end - 1, end - 512):
        with opened(place) as root, pytest.raises(BadLayer, match="cut off"):
            apply(io.BytesIO(data[:size]), root, verified=True)


def test_garbage_after_the_end_is_refused_and_padding_is_not(jail: Jail) -> None:
    data = _sample()
    for garbage in (b"x", bytes(511) + b"x", archive(entry("second"))):
        with pytest.raises(BadLayer, match="garbage"):
            jail.apply(data + garbage)
    jail.apply(data + bytes(100_000))
    jail.apply(data + bytes(7))


@pytest.mark.parametrize(
    "junk", [b"", b"x", b"garbage" * 1000, bytes(range(256)) * 40, b"\x1f\x8b", b"\x28\xb5\x2f\xfd"]
)
def test_junk_is_refused(junk: bytes, jail: Jail) -> None:
    with pytest.raises(BadLayer):
        jail.apply(junk)


def test_flipped_bits_are_refused_or_stay_inside(tmp_path: Path) -> None:
    data = _sample()
    dice = random.Random(7)
    refused = 0
    for number in range(400):
        damaged = bytearray(data)
        for _ in range(dice.choice([1, 1, 3, 20])):
            damaged[dice.randrange(len(data) if number % 2 else 2048)] ^= 1 << dice.randrange(8)
        jail = Jail(tmp_path / str(number))
        error = jail.refusal(bytes(damaged))
        refused += error is not None
        assert error is None or isinstance(error, BadLayer), error
    assert refused > 100


def test_flipped_bits_with_right_checksums_stay_inside(tmp_path: Path) -> None:
    data = _sample()
    starts = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    dice = random.Random(11)
    for number in range(400):
        start = dice.choice(starts)
        at = start + dice.randrange(0, 345)
        damaged = _patched(data, at, bytes([data[at] ^ 1 << dice.randrange(8)]))
        error = Jail(tmp_path / str(number)).refusal(damaged)
        assert error is None or isinstance(error, BadLayer), error


_MEASURE = """
    import os, sys
    from layerfs.apply import apply

    class Stream:
        def __init__(self, prefix, zeros, suffix):
            self.parts = [prefix, zeros, suffix]
        def read(self, size):
            while self.parts:
                part = self.parts[0]
                if isinstance(part, int):
                    now = min(part, size)
                    self.parts[0] -= now
                    if now:
                        return bytes(now)
                    self.parts.pop(0)
                else:
                    self.parts.pop(0)
                    if part:
                        return part
            return b""

    root, prefix, zeros = os.open(sys.argv[1], os.O_RDONLY), sys.stdin.buffer.read(), int(sys.argv[2])
    apply(Stream(prefix, zeros, bytes(1024)), root)
    # Not ru_maxrss: that of the parent process lives on in it.
    print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
"""


def test_memory_stays_bounded_on_a_large_layer(jail: Jail) -> None:
    """One file of 1 GiB: nothing of it may pile up in memory."""
    info = tarfile.TarInfo("large")
    info.size = 1 << 30
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MEASURE), jail.root, str(info.size)],
        input=info.tobuf(), capture_output=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert int(result.stdout) < 150 * 1024
    (jail.root / "large").unlink()


def test_many_entries_do_not_exhaust_descriptors(jail: Jail) -> None:
    soft, top = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, top))
    try:
        jail.apply(archive(*(entry(f"d{number}/{'s/' * (number % 7)}f") for number in range(500))))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, top))
