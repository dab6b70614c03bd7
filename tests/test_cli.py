"""The program as users run it: real stores, each call a process of its own."""

from __future__ import annotations

import array
import contextlib
import fcntl
import hashlib
import io
import json
import os
import pty
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from layerfs import mount_table, mounts
from layerfs.cli.app import cli as program
from layerfs.testing.images import MadeImage, MadeLayout, tar_of
from layerfs.testing.trees import read_tree

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root; test_rootless.py has what works without")

DRIVERS = ("overlay2", "btrfs", "vfs")
BASE = tar_of({"etc": None, "etc/passwd": b"root\n", "etc/motd": b"hello\n", "usr": None, "usr/big": b"x" * 100_000})
TOP = tar_of({"etc/.wh.motd": b"", "etc/host name": b"one\n"})


class Cli:
    """Runs layerfs on one store.

    Every call says which exit code it expects. Where that is not 0, the standard error must be one line, which is
    kept as `said`.
    """

    def __init__(self, root: Path, driver: str = "vfs") -> None:
        self.root, self.driver = root, driver
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("LAYERFS_")}
        self.said = ""

    def __call__(self, *arguments: str | Path, code: int = 0, feed: bytes = b"", **environment: str) -> str:
        given = self.command(*arguments)
        done = subprocess.run(
            given, input=feed, capture_output=True, env={**self.environment, **environment}, timeout=120, check=False
        )
        self.said = os.fsdecode(done.stderr)
        assert done.returncode == code, (given, self.said)
        if code:
            assert self.said.startswith("layerfs: "), self.said
            assert self.said.count("\n") == 1, self.said
        else:
            assert not self.said, self.said
        return os.fsdecode(done.stdout)

    def command(self, *arguments: str | Path) -> list[str]:
        store = ("--root", str(self.root), "--driver", self.driver)
        return [sys.executable, "-m", "layerfs.cli", *store, *map(str, arguments)]

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", code=code))

    def start(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command(*arguments), stdin=pipe, stdout=pipe, stderr=pipe, env=self.environment)


def _loops(below: Path) -> list[str]:
    files = Path("/sys/block").glob("loop*/loop/backing_file")
    return [text for file in files if (text := file.read_text().strip()).startswith(str(below))]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory in which nothing stays mounted, and no loop device, once the test's mounts are taken down."""
    yield tmp_path
    below = [point.target for point in mount_table.read() if point.target.is_relative_to(tmp_path)]
    for target in sorted(below, reverse=True):
        mounts.unmount(target, lazy=True)
    deadline = time.monotonic() + 20  # the kernel frees loop devices a moment later
    while _loops(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _loops(tmp_path)


@pytest.fixture
def cli(place: Path) -> Cli:
    return Cli(place / "store")


@pytest.fixture
def image(place: Path) -> Path:
    layout = MadeLayout(place / "image")
    layout.add(MadeImage([BASE, TOP]), "debian:12")
    return layout.path


def _diff_ids(layers: list[dict[str, Any]]) -> set[str]:
    return {layer["diff_id"] for layer in layers}


# -- the whole story ---------------------------------------------------------------------------------------------------


@root_only
@pytest.mark.parametrize(("driver", "other"), [*zip(DRIVERS, DRIVERS[1:] + DRIVERS[:1], strict=True)])
def test_an_image_goes_in_is_changed_and_goes_out_into_another_driver(
    place: Path, image: Path, driver: str, other: str
) -> None:
    key, name = "a key/with: odd\tthings", "my app"
    cli = Cli(place / "store", driver)
    assert cli("import", image) == "debian:12\n"
    cli("prepare", key, "--parent", "debian:12")
    tree = Path(cli("mount", key).removesuffix("\n"))
    assert (tree / "etc/host name").read_text() == "one\n"
    assert not (tree / "etc/motd").exists()
    (tree / "etc/host name").write_text("two\n")
    (tree / "usr/big").unlink()
    (tree / "srv").mkdir()
    os.link(tree / "etc/passwd", tree / "srv/users")
    lines = cli("changes", key).splitlines()
    assert {"M /etc/host name", "D /usr/big", "A /srv", "A /srv/users"} <= set(lines)
    cli("unmount", key)
    diff_id = cli("commit", key, name).strip()
    assert diff_id.startswith("sha256:")
    cli("export", name, place / "out")

    second = Cli(place / "second", other)
    assert second("import", place / "out", "--name", "there") == "there\n"
    assert _diff_ids(second.json("layers")) == _diff_ids(cli.json("layers"))
    cli("view", "look", "--parent", name)
    second("view", "look", "--parent", "there")
    here, there = cli("mount", "look").strip(), second("mount", "look", place / "at").strip()
    assert there == str(place / "at")
    assert read_tree(here) == read_tree(there)
    for one in (cli, second):
        one("unmount", "look")
        one("rm", "look")
        one("check")
    assert not [point.target for point in mount_table.read() if point.type == "overlay" and str(place) in point.source]


@root_only
@pytest.mark.parametrize("driver", DRIVERS)
def test_what_was_imported_is_exported_with_the_same_diff_ids(place: Path, image: Path, driver: str) -> None:
    cli = Cli(place / "store", driver)
    cli("import", image, "--name", "x")
    cli("export", "x", place / "out.tar", "--compression", "none")
    with tarfile.open(place / "out.tar") as tar:
        contents = [file.read() for member in tar if (file := tar.extractfile(member))]
    digests = {f"sha256:{hashlib.sha256(content).hexdigest()}" for content in contents}
    assert {f"sha256:{hashlib.sha256(diff).hexdigest()}" for diff in (BASE, TOP)} <= digests


@root_only
def test_an_image_passes_through_a_pipe(place: Path, image: Path) -> None:
    cli, second, spool = Cli(place / "store"), Cli(place / "second"), place / "tmp"
    spool.mkdir()
    cli("import", image)
    whole = os.fsencode(cli("export", "debian:12", "-", TMPDIR=str(spool)))
    assert second("import", "-", feed=whole, TMPDIR=str(spool)) == "debian:12\n"
    assert _diff_ids(second.json("layers")) == _diff_ids(cli.json("layers"))
    second("import", "-", "--name", "cut", feed=whole[: len(whole) // 2], TMPDIR=str(spool), code=7)
    assert "standard-input" in second.said
    assert not [*spool.iterdir()]


# -- where the store is ------------------------------------------------------------------------------------------------


def test_root_and_driver_may_stand_before_or_after_and_the_last_one_wins(place: Path) -> None:
    base = [sys.executable, "-m", "layerfs.cli"]
    one, two = str(place / "one"), str(place / "two")

    def made(*arguments: str, **environment: str) -> str:
        given = {**os.environ, **environment}
        return subprocess.run([*base, *arguments], env=given, capture_output=True, text=True, check=True).stdout.strip()

    assert made("init", "--root", one, "--driver", "vfs") == one
    assert made("--root", one, "--driver", "overlay2", "init", "--root", two, "--driver", "vfs") == two
    three = str(place / "three")
    assert made("init", LAYERFS_ROOT=three, LAYERFS_DRIVER="vfs") == three
    assert made("--root", two, "layers", "--json", LAYERFS_ROOT=str(place / "none"), LAYERFS_DRIVER="vfs") == "[]"
    assert made("layers", "--json", LAYERFS_ROOT=three) == "[]"  # a root remembers its driver


def test_no_store_is_made_by_looking_at_one(cli: Cli) -> None:
    for arguments in (
        ["layers"],
        ["images"],
        ["check"],
        ["gc"],
        ["usage"],
        ["rm", "x"],
        ["diff", "x"],
        ["inspect", "x"],
    ):
        cli(*arguments, code=4)
        assert not cli.root.exists()


def test_a_store_is_private(cli: Cli) -> None:
    cli("init")
    assert cli.root.stat().st_mode & 0o777 == 0o700


def test_a_store_keeps_its_driver(cli: Cli) -> None:
    cli("init")
    cli.driver = "overlay2"
    cli("layers", code=2)


# -- errors and exit codes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nonsense"], 2, "nonsense"),
        (["layers", "--nonsense"], 2, "--nonsense"),
        (["prepare"], 2, "KEY"),
        (["rm"], 2, "KEY"),
        (["prepare", "x", "--size", "ten"], 2, "'ten'"),
        (["prepare", "x", "--label", "bare"], 2, "KEY=VALUE"),
        (["init", "--device", "/dev/null"], 2, "--backing"),
        (["init", "--option", "bare"], 2, "KEY=VALUE"),
        (["--driver", "none-such", "init"], 2, "overlay2"),
        (["prepare", "x", "--parent", "none"], 4, "none"),
        (["mount", "none"], 4, "none"),
        (["apply", "none", "-"], 4, "none"),
        (["apply", "active", "/none/such"], 4, "/none/such"),
        (["import", "/none/such"], 4, "/none/such"),
        (["export", "none", "/none/such"], 4, "none"),
        (["inspect", "none"], 4, "none"),
        (["rm", "none"], 4, "none"),
        (["prepare", "active"], 5, "active"),
        (["rm", "base"], 6, "base"),
        (["commit", "base", "again"], 6, "base"),
        (["apply", "base", "-"], 6, "base"),
        (["apply", "active", "/dev/zero"], 7, ""),
    ],
)
def test_errors_are_one_line_and_their_exit_code_says_what_is_wrong(
    cli: Cli, arguments: list[str], code: int, words: str
) -> None:
    if arguments[:1] == ["mount"] and os.geteuid():
        pytest.skip("without root, mounting is refused before the key is looked at")
    cli("prepare", "first")
    cli("commit", "first", "base")
    cli("prepare", "active", "--parent", "base")
    cli(*arguments, code=code)
    assert words in cli.said


def test_a_fault_in_layerfs_is_one_line_and_its_place_is_shown_on_demand(cli: Cli) -> None:
    broken = "import sys; from layerfs.cli import main, store; store.open_store = lambda: 1 / 0; sys.exit(main())"
    for debug in ("", "1"):
        done = subprocess.run(
            [sys.executable, "-c", broken, "gc"],
            env={**cli.environment, "LAYERFS_DEBUG": debug},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 70
        assert "LAYERFS_DEBUG=1" in done.stderr.splitlines()[-1]
        assert ("Traceback" in done.stderr) == bool(debug)


def test_rm_goes_on_after_a_failure(cli: Cli) -> None:
    for key in ("one", "two"):
        cli("prepare", key)
    cli("rm", "one", "none", "two", code=4)
    assert cli.json("layers") == []


def test_rm_takes_images_where_no_layer_has_the_name(cli: Cli, image: Path) -> None:
    cli("import", image)
    cli("prepare", "debian:12")
    cli("rm", "debian:12")
    assert [found["name"] for found in cli.json("images")] == ["debian:12"]
    cli("rm", "debian:12")
    assert cli.json("images") == []


# -- output ------------------------------------------------------------------------------------------------------------


def test_everything_that_lists_speaks_json(cli: Cli, image: Path) -> None:
    (imported,) = cli.json("import", image)
    assert imported["name"] == "debian:12"
    shown = cli.json("prepare", "work", "--parent", "debian:12", "--label", "team=web")
    assert all(mount["type"] for mount in shown)
    assert [found["name"] for found in cli.json("images")] == ["debian:12"]
    layers = {layer["key"]: layer for layer in cli.json("layers")}
    assert len(layers) == 3
    assert layers["work"]["labels"] == {"team": "web"}
    assert [layer["key"] for layer in cli.json("layers", "kind==active")] == ["work"]
    assert json.loads(cli("inspect", "work"))["parent"] == layers["work"]["parent"]
    assert json.loads(cli("inspect", "debian:12"))["type"] == "image"
    assert {row["key"] for row in cli.json("usage")} == set(layers)
    assert cli.json("usage", "work")[0]["key"] == "work"
    assert cli.json("changes", "work") == []
    assert cli.json("check") == []
    assert isinstance(cli.json("gc"), list | dict)
    names = {row["name"]: row for row in cli.json("drivers")}
    assert set(DRIVERS) <= set(names)
    assert names["vfs"]["usable"]
    assert all(row["reason"] and (row["usable"] or row["remedy"]) for row in names.values())


def test_tables_have_a_line_for_each_thing(cli: Cli, image: Path) -> None:
    cli("import", image)
    cli("prepare", "work", "--parent", "debian:12")
    assert len(cli("layers").splitlines()) == 4
    assert "debian:12" in cli("images").splitlines()[1]
    assert "work" in cli("usage", "work").splitlines()[1]
    assert cli("drivers").splitlines()[0].split("  ")[0] == "NAME"


def test_names_from_outside_cannot_write_to_the_terminal(cli: Cli) -> None:
    cli("prepare", "evil\n\x1b[31mred\\")
    listed = cli("layers")
    assert r"evil\n\x1b[31mred\\" in listed
    assert [layer["key"] for layer in cli.json("layers")] == ["evil\n\x1b[31mred\\"]
    cli("mount" if os.geteuid() == 0 else "inspect", "no\x1b]0;such\n", code=4)
    assert "\x1b" not in cli.said


def test_changes_escapes_odd_names(cli: Cli) -> None:
    cli("prepare", "work")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", encoding="utf-8", errors="surrogateescape") as tar:
        for name in ("new\nline", "b\udcffyte", "back\\slash", "grün"):
            tar.addfile(tarfile.TarInfo(name))
    cli("apply", "work", "-", feed=content.getvalue())
    lines = set(cli("changes", "work").splitlines())
    assert {r"A /new\nline", r"A /b\xffyte", r"A /back\\slash", "A /grün"} <= lines
    assert "/b\udcffyte" in {change["path"] for change in cli.json("changes", "work")}


def _on_terminal(
    command: list[str], environment: dict[str, str], stdin: int | IO[bytes] = subprocess.DEVNULL, *, all_: bool = False
) -> tuple[int, str]:
    """Exit code and output of a command whose standard output is a terminal; with ``all_`` the standard error, too."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=stdin,
        stdout=follower,
        stderr=follower if all_ else subprocess.PIPE,
        env={**environment, "COLUMNS": "80"},
    )
    os.close(follower)
    seen = b""
    try:
        while block := os.read(leader, 65536):
            seen += block
    except OSError:  # EIO: the other side has been closed
        pass
    os.close(leader)
    with process:
        said = process.stderr.read() if process.stderr else b""
    return process.returncode, os.fsdecode(seen + said)


def test_a_terminal_gets_a_table_but_no_tar(cli: Cli) -> None:
    cli("prepare", "work " * 30)
    code, seen = _on_terminal(cli.command("layers"), cli.environment)
    assert code == 0
    assert seen.count("work") == 30
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", seen).splitlines())) <= 80
    code, seen = _on_terminal(cli.command("diff", "work " * 30), cli.environment)
    assert code == 2
    assert "-o FILE" in seen


def test_an_image_comes_through_a_pipe_with_progress_but_does_not_go_to_a_terminal(
    cli: Cli, image: Path, place: Path
) -> None:
    cli("import", image)
    cli("export", "debian:12", place / "image.tar")
    with open(place / "image.tar", "rb") as tar:
        code, seen = _on_terminal(cli.command("import", "-", "--name", "piped"), cli.environment, tar, all_=True)
    assert code == 0
    assert seen.splitlines()[-1].endswith("piped")
    code, seen = _on_terminal(cli.command("export", "debian:12", "-"), cli.environment)
    assert code == 2
    assert "DEST" in seen


# -- diff and apply ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
def test_apply_and_diff_tell_and_keep_the_diff_id(place: Path, driver: str) -> None:
    if driver == "btrfs" and os.geteuid():
        pytest.skip("a btrfs backing needs root")
    cli = Cli(place / "store", driver)
    cli("prepare", "work")
    (place / "layer.tar").write_bytes(BASE)
    told = cli("apply", "work", place / "layer.tar").strip()
    assert told == f"sha256:{hashlib.sha256(BASE).hexdigest()}"
    cli("diff", "work", "-o", place / "out.tar")
    piped = subprocess.run(cli.command("diff", "work"), capture_output=True, check=True).stdout
    assert piped == (place / "out.tar").read_bytes()
    with tarfile.open(place / "out.tar") as tar:
        assert "usr/big" in tar.getnames()


def test_a_look_at_a_layer_does_not_change_what_is_known_of_it(cli: Cli) -> None:
    cli("prepare", "work")
    cli("apply", "work", "-", feed=BASE)
    facts = json.loads(cli("inspect", "work"))
    assert facts["diff_id"] == f"sha256:{hashlib.sha256(BASE).hexdigest()}"
    assert ["ro" in mount["options"] for mount in facts["mounts"]] == [True]
    assert json.loads(cli("inspect", "work")) == facts


def test_source_date_epoch_limits_times(cli: Cli, place: Path) -> None:
    cli("prepare", "work")
    cli("apply", "work", "-", feed=BASE)
    cli("diff", "work", "-o", place / "out.tar", SOURCE_DATE_EPOCH="1000000000")
    with tarfile.open(place / "out.tar") as tar:
        times = {member.name: member.mtime for member in tar}
    assert times.pop(".") == 0  # an archive without an entry for the root leaves it as old as can be
    assert set(times.values()) == {1_000_000_000}
    for bad in ("yesterday", "-1", "1.5", "9" * 30, "9" * 5000):
        cli("diff", "work", "-o", place / "out.tar", code=2, SOURCE_DATE_EPOCH=bad)
        assert "SOURCE_DATE_EPOCH" in cli.said


def test_a_failed_diff_leaves_no_file_and_the_old_one_as_it_was(cli: Cli, place: Path) -> None:
    cli("prepare", "work")
    (place / "out.tar").write_text("old")
    cli("diff", "none", "-o", place / "out.tar", code=4)
    assert (place / "out.tar").read_text() == "old"
    cli("diff", "none", "-o", place / "new.tar", code=4)
    assert not [file for file in os.listdir(place) if "new.tar" in file]


def test_a_diff_through_a_link_leaves_the_link(cli: Cli, place: Path) -> None:
    """As /dev/stdout is one."""
    cli("prepare", "work")
    (place / "link.tar").symlink_to("out.tar")
    for _ in range(2):
        cli("diff", "work", "-o", place / "link.tar")
        assert (place / "link.tar").is_symlink()
        assert tarfile.is_tarfile(place / "out.tar")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_apply_ends_with_130_and_leaves_the_layer_as_it_was(cli: Cli, number: signal.Signals) -> None:
    cli("prepare", "work")
    cli("apply", "work", "-", feed=TOP)
    before = cli("changes", "work")
    with cli.start("apply", "work", "-") as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(BASE[: len(BASE) // 2])
        process.stdin.flush()
        _wait_until_read(process.stdin)
        process.send_signal(number)
        assert process.wait(60) == 130
        assert process.stderr.read() == b"layerfs: interrupted\n"
    assert cli("changes", "work") == before
    cli("check")


def test_a_hangup_that_is_ignored_stays_so(cli: Cli) -> None:
    """As nohup(1) wants it."""
    cli("prepare", "work")
    command = ["env", "--ignore-signal=HUP", *cli.command("apply", "work", "-")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=cli.environment) as process:
        assert process.stdin is not None
        process.stdin.write(BASE[: len(BASE) // 2])
        process.stdin.flush()
        _wait_until_read(process.stdin)
        process.send_signal(signal.SIGHUP)
        process.stdin.write(BASE[len(BASE) // 2 :])
        process.stdin.close()
        assert process.wait(60) == 0
    assert "etc/passwd" in cli("changes", "work")


_CALLBACK = "reference = weakref.ref(Thing(), lambda _: signal.raise_signal(signal.SIGTERM))"
_FINALIZER = "Thing.__del__ = lambda _: signal.raise_signal(signal.SIGINT); Thing()"
_WRAPPED = "Thing.__set_name__ = lambda *_: signal.raise_signal(signal.SIGTERM); type('Made', (), {'thing': Thing()})"
_BENCH = """
from layerfs.bench.interrupts import Interrupts
with Interrupts() as interrupts, interrupts.allowed():
    reference = weakref.ref(Thing(), lambda _: signal.raise_signal(signal.SIGTERM))
    time.sleep(60)
"""


@pytest.mark.parametrize("body", [_CALLBACK, _FINALIZER, _WRAPPED, _BENCH])
def test_an_interruption_is_heeded_where_python_would_lose_it(body: str) -> None:
    """As in the callbacks of weak references that every import has."""
    lines = ["import click, signal, sys, time, weakref", "from layerfs.cli.app import main"]
    lines += ["class Thing: pass", "@click.command()", "def command():"]
    lines += [f"    {line}" for line in [*body.splitlines(), "time.sleep(60)"]]
    lines += ["sys.exit(main(command))"]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr.strip()) == (130, "layerfs: interrupted")


def _wait_until_read(pipe: IO[bytes]) -> None:
    """Until the other side has taken all that was written to the pipe, so that it is at work on it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        waiting = array.array("i", [0])
        fcntl.ioctl(pipe.fileno(), termios.FIONREAD, waiting)
        if not waiting[0]:
            return
        time.sleep(0.02)
    raise AssertionError("the process does not read its standard input")


def test_a_reader_that_goes_away_ends_it_quietly(cli: Cli) -> None:
    cli("prepare", "work")
    cli("apply", "work", "-", feed=tar_of({f"file-{number:05}": b"" for number in range(5000)}))
    with cli.start("changes", "work") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_fault_and_what_cannot_be_said_is_no_success(cli: Cli, closed: str) -> None:
    cli("prepare", "work")
    cli("apply", "work", "-", feed=TOP)
    gone = 141 if ">&-" in closed.split() else 0
    for arguments, code in (
        (("diff", "work"), gone),
        (("layers",), gone),
        (("changes", "work", "--json"), gone),
        (("--version",), 1 if gone else 0),
        (("prepare", f"other {closed}"), 0),
        (("apply", "work", "-"), 7 if "<&-" in closed.split() else None),
        (("rm", "none"), 4),
    ):
        if code is not None:
            command = ["sh", "-c", f'exec "$@" {closed}', "sh", *cli.command(*arguments)]
            done = subprocess.run(command, capture_output=True, env=cli.environment, check=False)
            assert done.returncode == code, (arguments, done.stderr)
            assert b"fault" not in done.stderr
    assert cli("changes", "work")
    cli("check")


# -- check and gc ------------------------------------------------------------------------------------------------------


def test_check_finds_a_changed_file_and_ends_with_8(cli: Cli) -> None:
    cli("prepare", "work")
    cli("apply", "work", "-", feed=BASE)
    cli("commit", "work", "base")
    (file,) = cli.root.rglob("etc/passwd")
    file.write_text("evil\n")
    (found,) = cli.json("check", code=8)
    assert "base" in json.dumps(found)
    assert "base" in subprocess.run(cli.command("check"), capture_output=True, text=True, check=False).stdout


def test_gc_frees_what_an_interrupted_import_left_and_says_so(cli: Cli, image: Path) -> None:
    cli("import", image)
    assert len(cli.json("layers")) == 2
    with contextlib.closing(sqlite3.connect(cli.root / "layerfs.db")) as database, database:
        database.execute("DELETE FROM images")  # as if it had been killed before it wrote the image down
    assert sum("removed the layer" in line for line in cli("gc").splitlines()) == 2
    assert cli.json("layers") == []
    assert cli("gc") == ""


@root_only
def test_a_backing_grows_while_layers_are_in_use(cli: Cli) -> None:
    cli("init", "--backing", "xfs:320M")
    cli("prepare", "work")
    try:
        file = Path(cli("mount", "work").strip()) / "file"
        with pytest.raises(OSError, match="No space"):
            file.write_bytes(bytes(400 << 20))
        assert float(cli("grow", "640M").split()[0]) > 500  # the file system takes a part for itself
        file.write_bytes(bytes(400 << 20))
        cli("grow", "320M", code=2)
        assert "cannot shrink" in cli.said
        cli("grow", code=2)
        assert "grow 200G" in cli.said
    finally:
        cli("unmount", "work")


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*(name for name in program.commands if name != "serve"), "serve docker", "bench"])
def test_every_command_has_help_with_examples(name: str) -> None:
    command = [sys.executable, "-m", "layerfs.cli", *name.split(), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    if name != "completion":
        assert "--root" in done.stdout
        assert "--driver" in done.stdout
    if name != "bench":
        assert "Examples:" in done.stdout


def test_the_help_lists_every_command_with_one_line_each() -> None:
    done = subprocess.run([sys.executable, "-m", "layerfs.cli", "-h"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    for name in [*program.commands, "bench"]:
        (line,) = [line for line in lines if line.split()[:1] == [name] and line.startswith(f"  {name}  ")]
        assert line.endswith("."), line
        assert not line.endswith("..."), line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_the_shell_takes(shell: str) -> None:
    done = subprocess.run([sys.executable, "-m", "layerfs.cli", "completion", shell], capture_output=True, check=True)
    assert b"_LAYERFS_COMPLETE" in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n", "/dev/stdin"], input=done.stdout, check=True)


def test_completion_knows_commands_and_drivers() -> None:
    def completed(words: str) -> str:
        environment = {"_LAYERFS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-c", "from layerfs.cli import main; main()"]
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True).stdout  # noqa: PLW1510

    assert completed("layerfs unm").split() == ["plain,unmount"]
    assert completed("layerfs --driver ov").split() == ["plain,overlay2"]


def test_the_version_is_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "layerfs.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("layerfs ")
