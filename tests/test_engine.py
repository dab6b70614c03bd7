"""Containers run by `layerfs.engine` and `layerfs run`, with real runc."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from layerfs import engine, mount_table, programs, registry
from layerfs.errors import AlreadyExists, BadLayer, InvalidArgument, LayerfsError, NotFound
from layerfs.layer import Kind
from layerfs.store import Store
from layerfs.testing.engines import BUSYBOX, busybox_image, program, wait_until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
    pytest.mark.skipif(shutil.which("runc") is None, reason="runc is not installed"),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="busybox-static is not installed"),
]

MakeStore = Callable[..., Store]


@pytest.fixture
def store(make_store: MakeStore, tmp_path: Path) -> Store:
    return filled(make_store("overlay2"), tmp_path)


def filled(store: Store, place: Path, **config: object) -> Store:
    store.images.import_(busybox_image(place / "busybox.tar", "busybox", config=config or None))
    return store


@pytest.fixture(params=registry.names())
def any_store(request: pytest.FixtureRequest, make_store: MakeStore, tmp_path: Path) -> Store:
    probe = registry.load(request.param).probe(tmp_path)
    if not probe.usable:
        pytest.skip(f"{request.param}: {probe.reason}; {probe.remedy}")
    return filled(make_store(request.param), tmp_path)


def read(store: Store, key: str, name: str) -> str:
    with store.mounted(key) as root:
        return (root / name).read_text()


def shell(store: Store, script: str, *, image: str = "busybox", name: str = "") -> int:
    return engine.run(store, image, ["sh", "-c", script], name=name)


def test_an_engine_in_a_few_lines(any_store: Store, tmp_path: Path) -> None:
    """Import, run, commit, run on what was committed, export, import elsewhere, list, remove."""
    store = any_store
    script = "cat /etc/greeting > /data/copy; rm /data/file; test ! -e /etc/passwd; echo $FLAVOUR >> /data/copy"
    assert shell(store, script, name="a container") == 0
    assert read(store, "a container", "data/copy") == "hello\nplain\n"
    assert store.stat("a container").labels[engine.IMAGE_LABEL] == "busybox"
    store.commit("mine", "a container")
    store.images.export("mine", tmp_path / "mine.oci")
    store.images.import_(tmp_path / "mine.oci", name="mine:1")
    assert shell(store, "cat /data/copy > /again; ls /data >> /again", image="mine:1", name="second") == 0
    assert read(store, "second", "again") == "hello\nplain\ncopy\n"
    assert {layer.key for layer in store.list("kind==active")} == {"second"}
    store.remove("second")
    for image in ("mine:1", "busybox"):
        store.images.remove(image)
    assert "mine" in [layer.key for layer in store.list()]  # with what it stands on
    assert store.check() == []


def test_exit_codes_are_passed_on_and_layers_go_where_wanted(store: Store) -> None:
    assert engine.run(store, "busybox", remove=True) == 0
    assert engine.run(store, "busybox", ["sh", "-c", "exit 42"], remove=True) == 42
    assert engine.run(store, "busybox", ["sh", "-c", "sleep 60 & kill -9 $!; wait $!"], remove=True) == 137
    assert list(store.list("kind==active")) == []
    assert [programs.shell_code(code) for code in (0, 3, -9)] == [0, 3, 137]
    assert engine.run(store, "busybox", ["false"]) == 1
    (left,) = store.list("kind==active")
    assert left.key.startswith("run-")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["nothing-there"], 127),
        (["/bin/nothing-there"], 127),
        (["/etc/greeting"], 126),
        (["/etc"], 126),
        (["sh", "-c", "echo 'exec: no such file or directory' >&2; exit 1"], 1),
    ],
)
def test_a_command_that_cannot_be_run_ends_as_in_a_shell(store: Store, words: list[str], code: int) -> None:
    assert engine.run(store, "busybox", words, remove=True) == code


def test_what_is_refused_leaves_no_layer(store: Store, make_store: MakeStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        engine.run(store, "none", ["true"])
    store.prepare("taken")
    with pytest.raises(AlreadyExists):
        engine.run(store, "busybox", ["true"], name="taken", remove=True)
    assert store.stat("taken").kind is Kind.ACTIVE
    store.remove("taken")
    refused: list[tuple[dict[str, object], type[LayerfsError]]] = [
        ({"Cmd": None}, InvalidArgument),
        ({"User": "nobody-there"}, InvalidArgument),
        ({"User": "0:nobody-there"}, InvalidArgument),
        ({"Cmd": "text"}, BadLayer),
        ({"Env": [1]}, BadLayer),
    ]
    for number, (config, error) in enumerate(refused):
        place = tmp_path / str(number)
        place.mkdir()
        other = filled(make_store("overlay2", f"store{number}"), place, **config)
        with pytest.raises(error):
            engine.run(other, "busybox")
        assert list(other.list("kind==active")) == []
    assert list(store.list("kind==active")) == []


def test_the_entry_point_directory_and_environment_of_the_image(make_store: MakeStore, tmp_path: Path) -> None:
    config = {"Entrypoint": ["/bin/sh", "-c"], "Cmd": ["pwd > out; echo $A $HOME >> out"], "WorkingDir": "/srv/here"}
    store = filled(make_store("overlay2"), tmp_path, **config, Env=["A=one two"])
    assert engine.run(store, "busybox", name="c") == 0
    assert read(store, "c", "srv/here/out") == "/srv/here\none two /\n"


def test_a_relative_directory_begins_at_the_root_and_variables_without_a_value_are_dropped(
    make_store: MakeStore, tmp_path: Path
) -> None:
    config = {"Cmd": ["sh", "-c", "pwd > /out; echo $A >> /out"], "WorkingDir": "srv/here"}
    store = filled(make_store("overlay2"), tmp_path, **config, Env=["PATH", "A=b=c", "", "=d"])
    assert engine.run(store, "busybox", name="c") == 0
    assert read(store, "c", "out") == "/srv/here\nb=c\n"


def test_users_are_looked_up_in_the_containers_own_files(tmp_path: Path) -> None:
    etc = tmp_path / "etc"
    etc.mkdir()
    (etc / "passwd").write_text("root:x:0:0::/root:/bin/sh\nbroken\nann:x:1000:100::/home/ann:/bin/sh\nx:y:z:1:::\n")
    (etc / "group").write_text("users:x:100:ann\nwheel:x:10:bob,ann\n")
    find = engine.find_user
    assert find(tmp_path, "") == engine.User(0, 0, (), "/root")
    assert find(tmp_path, "ann") == find(tmp_path, "1000") == engine.User(1000, 100, (100, 10), "/home/ann")
    assert find(tmp_path, "ann:wheel") == engine.User(1000, 10, (), "/home/ann")
    assert find(tmp_path, "7:8") == engine.User(7, 8, (), "/")
    for wrong in ("x", "bob", "4294967295", "-1", "0:none", "²"):
        with pytest.raises(InvalidArgument):
            find(tmp_path, wrong)


def test_a_hostile_passwd_is_not_followed_out_of_the_container(tmp_path: Path) -> None:
    """CVE-2024-9676: a link to a file of the host, a device or a pipe."""
    (tmp_path / "etc").mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.write_text("ann:x:1000:100::/home/ann:/bin/sh\n")
    for target in (outside, "/dev/zero", "../../../../../../../../dev/zero"):
        (tmp_path / "etc/passwd").symlink_to(target)
        with pytest.raises(InvalidArgument):
            engine.find_user(tmp_path, "ann")
        (tmp_path / "etc/passwd").unlink()
    os.mkfifo(tmp_path / "etc/passwd")
    with pytest.raises(InvalidArgument):
        engine.find_user(tmp_path, "ann")
    outside.unlink()


def test_several_containers_at_once_in_threads(store: Store) -> None:
    with ThreadPoolExecutor(4) as pool:
        codes = pool.map(lambda n: shell(store, f"echo {n} > /data/file; exit {n}", name=f"c{n}"), range(8))
        assert list(codes) == list(range(8))
    assert [read(store, f"c{n}", "data/file") for n in range(8)] == [f"{n}\n" for n in range(8)]


# -- on the command line ---------------------------------------------------------------------------------------------


def command(store: Store, *arguments: str) -> list[str]:
    return [*program(), "--root", str(store.root), "run", *arguments]


def test_the_command_passes_input_output_and_exit_code_on(store: Store) -> None:
    done = subprocess.run(
        command(store, "--rm", "-i", "busybox", "sh", "-c", "cat; echo bad >&2; exit 3"),
        input=b"in\n",
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, b"in\n", b"bad\n")
    done = subprocess.run(
        command(store, "--name", "kept", "busybox", "ls", "-d", "/data"), capture_output=True, check=True
    )
    assert done.stdout == b"/data\n"
    assert [layer.key for layer in store.list("kind==active")] == ["kept"]
    done = subprocess.run(command(store, "-t", "busybox"), stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"no terminal" in done.stderr


def test_a_container_can_have_the_terminal(store: Store) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, command(store, "--rm", "-it", "busybox", "sh"))  # noqa: S606
    said = b""
    os.write(terminal, b"test -t 0 && echo it is a $((40 + 2)); exit 9\n")
    with contextlib.suppress(OSError):  # the other end has gone
        while data := os.read(terminal, 4096):
            said += data
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert b"it is a 42" in said
    assert os.waitstatus_to_exitcode(status) == 9


@pytest.mark.parametrize(
    ("number", "script"),
    [
        (signal.SIGTERM, "trap 'exit 0' TERM; while true; do sleep 0.1; done"),
        (signal.SIGTERM, "trap '' TERM; sleep 1000"),
        (signal.SIGHUP, "sleep 1000"),
    ],
)
def test_an_interrupted_run_ends_the_container_and_leaves_nothing(
    store: Store, number: signal.Signals, script: str
) -> None:
    mark = f"/data/{time.monotonic_ns()}"
    process = subprocess.Popen(
        command(store, "--rm", "--name", "c", "busybox", "sh", "-c", f"touch {mark}; {script}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def has_begun() -> bool:
        places = (point.target for point in mount_table.read() if point.target.parent == store.root / "mnt")
        return any((place / mark[1:]).exists() for place in places)

    wait_until(has_begun, "the container runs")
    process.send_signal(number)
    assert process.wait(60) == 130
    assert list(store.list("kind==active")) == []
    assert not [point for point in mount_table.read() if point.target.is_relative_to(store.root / "mnt")]
    commands = [Path("/proc", pid, "cmdline") for pid in os.listdir("/proc") if pid.isdigit()]
    texts = []
    for file in commands:
        with contextlib.suppress(OSError):
            texts.append(file.read_bytes())
    assert not [text for text in texts if mark.encode() in text]
