"""The program as a user without privileges runs it: in a user namespace that it makes by itself."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from layerfs.testing.images import MadeImage, MadeLayout, tar_of
from layerfs.treecopy import remove_tree

USER = os.geteuid() or 65534
"""The user to be: the one that runs the tests, or where that is root, nobody."""

BASE = tar_of({"etc": None, "etc/motd": b"hello\n", "etc/passwd": b"root\n", "old": None, "old/file": b"x"})


def _as_user(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    if os.geteuid() == 0:
        options |= {"user": USER, "group": USER, "extra_groups": []}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload]
    assert isinstance(done, subprocess.CompletedProcess)
    return done


@cache
def _python() -> tuple[str, dict[str, str]]:
    """An interpreter that the user may run, with layerfs, and what the environment has to have for it.

    Ours may be in root's home; the system's does with our libraries then.
    """
    libraries = os.pathsep.join(path for path in sys.path if path and not path.endswith(".zip"))
    needed = "import layerfs.store, layerfs.cli, rich, isal, zstandard"
    for python, variables in ((sys.executable, {}), ("/usr/bin/python3", {"PYTHONPATH": libraries})):
        with contextlib.suppress(OSError):
            if _as_user([python, "-c", needed], env={**os.environ, **variables}).returncode == 0:
                return python, variables
    pytest.skip("there is no Python that a user without privileges could run layerfs with")


class Rootless:
    """Runs layerfs as `USER`, whose home is a directory made for it."""

    def __init__(self, home: Path) -> None:
        python, variables = _python()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LAYERFS_", "XDG_"))}
        self.home = home
        self.environment = {**kept, **variables, "HOME": str(home)}
        self.program = [python, "-m", "layerfs.cli"]
        self.said = ""

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = _as_user([*self.program, *arguments], env=self.environment, cwd=self.home)
        self.said = done.stderr
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        return done.stdout

    def inside(self, script: str) -> str:
        """Run a shell script in ``layerfs unshare``; ``$LFS`` in it is the program."""
        self.environment["LFS"] = " ".join(self.program)
        return self("unshare", "--", "sh", "-euc", script)


@pytest.fixture
def home() -> Iterator[Path]:
    """Not below pytest's own directories, which only root may enter."""
    path = Path(tempfile.mkdtemp(prefix="layerfs-rootless-"))
    path.chmod(0o755)
    os.chown(path, USER, -1)
    yield path
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        remove_tree(parent, os.fsencode(path.name))
    finally:
        os.close(parent)


@pytest.fixture
def user(home: Path) -> Rootless:
    user = Rootless(home)
    if _as_user(["unshare", "--user", "--mount", "true"]).returncode:
        pytest.skip("this host lets no user make a user namespace")
    return user


@pytest.fixture
def image(home: Path) -> Path:
    layout = MadeLayout(home / "image")
    layout.add(MadeImage([BASE]), "base")
    return layout.path


def test_the_store_is_in_the_user_s_home(user: Rootless) -> None:
    assert user("init", "--driver", "vfs").strip() == str(user.home / ".local/share/layerfs")
    user.environment["XDG_DATA_HOME"] = str(user.home / "data")
    assert user("init", "--driver", "vfs").strip() == str(user.home / "data/layerfs")
    user.environment["XDG_DATA_HOME"] = "relative"  # to be ignored, as the specification says
    assert user("init", "--driver", "vfs").strip() == str(user.home / ".local/share/layerfs")


@pytest.mark.parametrize("driver", ["overlay2", "vfs"])
def test_import_change_commit_export_without_root(user: Rootless, image: Path, driver: str) -> None:
    user("import", str(image), "--driver", driver)
    user("prepare", "work", "--parent", "base")
    printed = user.inside(
        """
        at=$($LFS mount work)
        cat "$at/etc/motd"
        echo changed > "$at/etc/passwd"
        rm -r "$at/old"
        mkdir "$at/new"
        """
    )
    assert printed == "hello\n"
    changed = user("changes", "work").splitlines()
    assert {"M /etc/passwd", "D /old", "A /new"} <= set(changed)
    diff_id = user("commit", "work", "done").strip()
    user("export", "done", str(user.home / "out"))
    user("check")

    # The same layers as another driver keeps them.
    other = {"overlay2": "vfs", "vfs": "overlay2"}[driver]
    user("import", str(user.home / "out"), "--name", "again", "--root", str(user.home / "other"), "--driver", other)
    layers = json.loads(user("layers", "--json", "--root", str(user.home / "other")))
    assert diff_id in {layer["diff_id"] for layer in layers}


def test_a_mount_that_would_vanish_is_refused_with_the_way_to_do_it(user: Rootless) -> None:
    user("prepare", "work", "--driver", "overlay2")
    user("mount", "work", code=3)
    assert "layerfs unshare" in user.said


def test_the_command_of_unshare_gets_its_arguments_as_they_are_and_its_exit_code_is_kept(user: Rootless) -> None:
    assert user("unshare", "sh", "-c", 'echo "$0" "$@"', "--root", "a  b") == "--root a  b\n"
    user("unshare", "--", "sh", "-c", "exit 42", code=42)
    user("unshare", "--", "/none/such", code=2)
    assert "/none/such" in user.said


def test_nothing_stays_mounted_when_unshare_ends(user: Rootless) -> None:
    user("prepare", "work", "--driver", "overlay2")
    user.inside('touch "$($LFS mount work)/file"')
    assert str(user.home) not in Path("/proc/self/mountinfo").read_text()
    assert user("changes", "work").splitlines()[-1] == "A /file"
    user("rm", "work")
    user("check")


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_bench_runs_without_root(user: Rootless) -> None:
    output = user.home / "run.json"
    scratch = user.home / "scratch"
    user("unshare", "mkdir", str(scratch))
    user(
        "bench",
        "--driver",
        "overlay2",
        "--size",
        "1M",
        "--rounds",
        "1",
        "--scratch",
        str(scratch),
        "--output",
        str(output),
    )
    assert json.loads(output.read_text())["benchmarks"]
    assert not list(scratch.iterdir())


def test_advice_asks_what_works_here_as_the_other_commands_would_use_it(user: Rootless) -> None:
    run = user.home / "run.json"
    shutil.copy(Path(__file__).parent.parent / "results" / "claims-default-run.json", run)
    usable = {d["name"] for d in json.loads(user("drivers", "--json")) if d["usable"]}
    advice = json.loads(user("advise", "--builds", "--json", str(run)))
    assert {entry["driver"] for entry in advice["ranking"]} <= usable
    assert not usable & advice["left_out"].keys()
