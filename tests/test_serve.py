"""containerd's snapshots service as any client sees it: its protocol, its refusals, its socket and its end."""

from __future__ import annotations

import errno
import json
import os
import random
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from layerfs import registry
from layerfs.driver import Capability
from layerfs.store import Store
from layerfs.testing.engines import Served, layerfs, listens, program, wait_until
from layerfs.testing.guests import every_driver

grpc = pytest.importorskip("grpc", reason="layerfs[serve] is not installed")

from layerfs.serve import api, listening  # noqa: E402 - needs grpc's companion protobuf

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="serving containerd needs root")

REF = "containerd.io/snapshot.ref"
MIB = 1 << 20


class Client:
    """Calls the service: ``client.prepare(key="a", parent="")``."""

    def __init__(self, path: Path) -> None:
        self.channel = grpc.insecure_channel(f"unix:{path}")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = name.capitalize()
        request, response = api.METHODS[method]
        kind = self.channel.unary_stream if method == "List" else self.channel.unary_unary
        call = kind(
            f"/{api.SERVICE}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        return lambda **fields: call(request(**fields), timeout=120, wait_for_ready=True)

    def keys(self, *filters: str) -> list[str]:
        return [info.name for block in self.list(filters=filters) for info in block.info]


@pytest.fixture(scope="module", params=every_driver())
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("served")
    probe = registry.load(request.param).probe(place)
    if not probe.usable:
        pytest.skip(f"{request.param}: {probe.reason}; {probe.remedy}")
    served = Served("containerd", request.param, place)
    served.start()
    yield served
    assert served.stop() == 0
    assert not served.socket.exists()


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    """A client, and a service without snapshots when the test begins."""
    client = Client(served.socket)
    while keys := client.keys():
        for key in reversed(keys):
            client.remove(key=key)
    yield client
    client.channel.close()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Served]:
    """A server of its own for a test that ends it, on the driver that needs least."""
    served = Served("containerd", "vfs", tmp_path)
    yield served
    if served.process is not None and served.process.poll() is None:
        served.stop()


def code_of(call: Callable[..., Any], **fields: object) -> Any:
    """The error code with which a call is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call(**fields)
    return caught.value.code()


def test_the_life_of_snapshots(client: Client) -> None:
    made = client.prepare(key="ns/1/work", labels={"a": "1"}).mounts
    assert [(m.type, m.target) for m in made] == [(m.type, m.target) for m in client.mounts(key="ns/1/work").mounts]
    assert "rw" in made[0].options
    client.commit(name="ns/2/base", key="ns/1/work", labels={"b": "2"})
    info = client.stat(key="ns/2/base").info
    assert (info.name, info.parent, info.kind, dict(info.labels)) == ("ns/2/base", "", api.COMMITTED, {"b": "2"})
    assert abs(info.created_at.seconds - time.time()) < 60
    client.prepare(key="child", parent="ns/2/base")
    (view,) = client.view(key="look", parent="ns/2/base").mounts
    assert "ro" in view.options
    assert {i.name: i.kind for block in client.list() for i in block.info} == {
        "ns/2/base": api.COMMITTED,
        "child": api.ACTIVE,
        "look": api.VIEW,
    }
    assert client.usage(key="child").inodes >= 0
    client.cleanup()
    for key in ("look", "child", "ns/2/base"):
        client.remove(key=key)
    assert client.keys() == []


def test_mounts_are_what_mount_8_takes(client: Client, tmp_path: Path) -> None:
    """Mounted without layerfs, written to, committed and seen in a child."""

    def mounted(key: str, work: Callable[[], object]) -> None:
        (mount,) = client.mounts(key=key).mounts
        options = ["-o", ",".join(mount.options)]
        if mount.type.startswith("fuse3."):  # as containerd does it
            kind = mount.type.removeprefix("fuse3.")
            command = ["mount.fuse3", mount.source, str(tmp_path), *options, "-t", kind]
        else:
            command = ["mount", *([] if mount.type == "bind" else ["-t", mount.type]), *options, mount.source]
            command.append(str(tmp_path))
        subprocess.run(command, check=True)
        try:
            work()
        finally:
            subprocess.run(["umount", tmp_path], check=True)

    client.prepare(key="work")
    mounted("work", lambda: (tmp_path / "file").write_text("one"))
    client.commit(name="base", key="work")
    client.prepare(key="child", parent="base")
    mounted("child", (tmp_path / "file").unlink)
    client.commit(name="top", key="child")
    for name, found in (("base", ["file"]), ("top", [])):
        client.view(key=f"look {name}", parent=name)
        seen: list[str] = []
        mounted(f"look {name}", lambda: seen.extend(os.listdir(tmp_path)))  # noqa: B023
        assert seen == found


def test_refusals_have_containerds_codes(client: Client) -> None:
    codes = grpc.StatusCode
    client.prepare(key="work")
    client.commit(name="base", key="work")
    client.prepare(key="active", parent="base")
    client.view(key="view", parent="base")
    for make in (client.prepare, client.view):
        for key in ("base", "active", "view"):
            assert code_of(make, key=key) is codes.ALREADY_EXISTS
        assert code_of(make, key="new", parent="none") is codes.NOT_FOUND
        assert code_of(make, key="new", parent="active") is codes.INVALID_ARGUMENT
        assert code_of(make, key="") is codes.INVALID_ARGUMENT
    assert code_of(client.commit, name="new", key="view") is codes.FAILED_PRECONDITION
    assert code_of(client.commit, name="base", key="active") is codes.ALREADY_EXISTS
    assert code_of(client.commit, name="new", key="none") is codes.NOT_FOUND
    assert code_of(client.commit, name="new", key="active", parent="other") is codes.UNIMPLEMENTED
    assert code_of(client.remove, key="base") is codes.FAILED_PRECONDITION
    assert code_of(client.mounts, key="base") is codes.FAILED_PRECONDITION
    for call in (client.remove, client.stat, client.mounts, client.usage):
        assert code_of(call, key="none") is codes.NOT_FOUND
    assert code_of(client.update, info=api.Info(name="none")) is codes.NOT_FOUND
    with pytest.raises(grpc.RpcError) as caught:
        client.keys("kind=active")
    assert caught.value.code() is codes.INVALID_ARGUMENT


def test_labels_change_by_field_mask(client: Client) -> None:
    client.prepare(key="work", labels={"a": "1", "b": "2"})

    def update(labels: dict[str, str], *paths: str) -> dict[str, str]:
        info = api.Info(name="work", labels=labels)
        return dict(client.update(info=info, update_mask={"paths": paths}).info.labels)

    assert update({"a": "x"}, "labels.a", "labels.b") == {"a": "x"}
    assert update({"c": "3"}) == {"c": "3"}
    assert code_of(client.update, info=api.Info(name="work"), update_mask={"paths": ["parent"]}) is (
        grpc.StatusCode.INVALID_ARGUMENT
    )


def test_long_lists_come_in_blocks_and_filters_choose(client: Client) -> None:
    client.prepare(key="work")
    client.commit(name="base", key="work")
    for number in range(230):
        client.view(key=f"view {number}", parent="base", labels={"even": str(number % 2 == 0)})
    blocks = [len(block.info) for block in client.list()]
    assert sum(blocks) == 231
    assert max(blocks) == 100
    assert len(client.keys('kind==view,labels.even=="True"')) == 115
    assert client.keys('name=="view 7"', "name==base") == ["base", "view 7"]


def test_a_snapshot_that_was_unpacked_before_is_not_unpacked_again(client: Client) -> None:
    client.prepare(key="unpack", labels={REF: "sha256:abc"})
    client.commit(name="one/1/sha256:abc", key="unpack", labels={REF: "sha256:abc"})
    assert code_of(client.prepare, key="again", labels={REF: "sha256:abc"}) is grpc.StatusCode.ALREADY_EXISTS
    assert client.keys(f'labels."{REF}"=="sha256:abc",parent==""') == ["one/1/sha256:abc"]
    client.prepare(key="other", labels={REF: "sha256:def"})
    client.prepare(key="on it", parent="one/1/sha256:abc", labels={REF: "sha256:abc"})


def test_a_size_limit_is_a_label(client: Client, served: Served) -> None:
    with Store(served.root) as store:
        can = bool(store.driver.capabilities & Capability.SIZE_LIMIT)
    client.prepare(key="work", labels={"containerd.io/snapshot/max-size": "16M"})
    with Store(served.root) as store:
        assert store.stat("work").size_limit == (16 * MIB if can else None)


HOSTILE = ["../../etc/passwd", "a b:c,d=e", "new\nline", "ünï ☃ " * 400, "x" * 100_000, "%s%n", "'; DROP TABLE layers;"]


def test_hostile_keys_and_labels(client: Client) -> None:
    for key in HOSTILE:
        client.prepare(key=key, labels={key: key})
        assert client.stat(key=key).info.labels[key] == key
        assert code_of(client.prepare, key=key) is grpc.StatusCode.ALREADY_EXISTS
        client.commit(name=f"{key}!", key=key)
    assert client.keys() == [f"{key}!" for key in HOSTILE]
    for key in HOSTILE:
        client.remove(key=f"{key}!")


def test_a_request_that_is_no_message_harms_nobody(client: Client) -> None:
    call = client.channel.unary_unary(f"/{api.SERVICE}/Prepare")
    for junk in (b"\xff" * 100, b"\x12\x02\xff\xfe"):  # nonsense; a key that is no UTF-8
        with pytest.raises(grpc.RpcError):
            call(junk, timeout=30)
    with pytest.raises(grpc.RpcError) as caught:
        client.channel.unary_unary(f"/{api.SERVICE}/Format")(b"", timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert client.keys() == []


def test_hundreds_of_requests_at_once_from_several_clients(client: Client, served: Served) -> None:
    client.prepare(key="work")
    client.commit(name="base", key="work")

    def work(who: int) -> None:
        mine = Client(served.socket)
        begin = time.monotonic()
        for number in range(5):
            if time.monotonic() > begin + 10:  # ZFS in user space takes its time
                break
            key = f"{who}-{number}"
            mine.prepare(key=key, parent="base")
            mine.commit(name=f"{key} done", key=key)
            mine.remove(key=f"{key} done")
        mine.channel.close()

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(work, range(24)))
    assert client.keys() == ["base"]
    assert json.loads(layerfs("check", "--root", served.root, "--json")) == []


# -- the server itself -----------------------------------------------------------------------------------------------


def test_the_socket_is_private_and_served_once(plain: Served) -> None:
    plain.start()
    assert stat.S_IMODE(plain.socket.stat().st_mode) == 0o600
    second = subprocess.run(plain.command, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 5
    assert "is listening at" in second.stderr.splitlines()[-1]
    assert Client(plain.socket).keys() == []
    plain.stop(signal.SIGKILL)
    assert plain.socket.exists()
    plain.start()  # what a killed server has left is no obstacle
    assert Client(plain.socket).keys() == []


@pytest.mark.parametrize("engine", ["containerd", "docker"])
def test_a_server_leaves_alone_the_socket_of_one_that_came_after_it(engine: str, tmp_path: Path) -> None:
    before, after = (Served(engine, "vfs", tmp_path) for _ in range(2))
    before.start()
    before.socket.unlink()
    try:
        after.start()
        assert before.stop() == 0
        assert listens(after.socket)
    finally:
        assert after.stop() == 0
    assert os.listdir(tmp_path) == ["layerfs.log", "store"]


def test_what_is_no_socket_is_left_alone(plain: Served) -> None:
    plain.socket.write_text("mine")
    done = subprocess.run(plain.command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert plain.socket.read_text() == "mine"


def test_a_path_that_engines_cannot_mount_is_refused(tmp_path: Path) -> None:
    command = [*program(), "serve", "containerd", "--root", str(tmp_path / "a,b"), "--driver", "vfs"]
    command += ["--socket", str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "--root" in done.stderr


def test_requests_under_way_are_finished_before_the_end(plain: Served) -> None:
    plain.start()
    with Store(plain.root) as store:
        store.prepare("work")
        with store.mounted("work") as root:
            for number in range(3000):
                (root / f"f{number}").write_bytes(b"x")
        store.commit("base", "work", digest=False)
    client = Client(plain.socket)
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.append(client.prepare(key="copy", parent="base")))
    asking.start()
    with Store(plain.root) as store:
        wait_until(lambda: len(list(store.driver.volumes())) > 1 or answers, "the copy begins")
    assert plain.stop() == 0
    asking.join()
    assert len(answers) == 1
    with Store(plain.root) as store:
        assert [layer.key for layer in store.list()] == ["base", "copy"]
    assert "stopped" in plain.log.read_text()


ENDLESS = """
import threading
from layerfs.cli import main
from layerfs.serve import containerd, listening
from layerfs.store import Store
containerd._GRACE = listening.LAST = 0
Store.cleanup = lambda self: print("endless", flush=True) or threading.Event().wait()
main()
"""


def test_a_request_that_does_not_end_does_not_keep_the_server(plain: Served) -> None:
    plain.command[: plain.command.index("serve")] = [sys.executable, "-c", ENDLESS]
    plain.start()
    client = Client(plain.socket)
    client.prepare(key="work")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.cleanup)
        wait_until(lambda: "endless" in plain.log.read_text(), "the request is at work")
        assert plain.stop() == 1
        assert isinstance(asked.exception(), grpc.RpcError)
    assert "broken off" in plain.log.read_text()
    assert not plain.socket.exists()
    with Store(plain.root) as store:
        assert [layer.key for layer in store.list()] == ["work"]
        assert store.check() == []


def test_slow_and_broken_clients_harm_nobody(plain: Served) -> None:
    plain.start()
    idle = []
    for _ in range(20):
        slow = socket.socket(socket.AF_UNIX)
        slow.connect(str(plain.socket))
        slow.sendall(random.randbytes(random.randrange(50)))
        idle.append(slow)
    client = Client(plain.socket)
    client.prepare(key="work")
    for slow in idle[::2]:
        slow.close()
    assert client.keys() == ["work"]
    for slow in idle:
        slow.close()


ACTIVATE = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(sys.argv[1])
    listening.listen()
    os.dup2(listening.fileno(), 3)
    os.set_inheritable(3, True)
    os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def test_systemd_can_hand_over_the_socket_and_is_told_of_readiness(plain: Served, tmp_path: Path) -> None:
    at = tmp_path / "systemd.sock"
    environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(str(tmp_path / "notify"))
        notices.settimeout(60)
        process = subprocess.Popen([sys.executable, "-c", ACTIVATE, str(at), *plain.command[1:]], env=environment)
        try:
            assert notices.recv(100) == b"READY=1"
            client = Client(at)
            client.prepare(key="work", labels={"long": "x" * 500_000})
            assert client.keys() == ["work"]
        finally:
            process.terminate()
            code = process.wait(60)
        assert code == 0
        assert notices.recv(100) == b"STOPPING=1"
    assert at.exists()  # it is systemd's
    assert not plain.socket.exists()


def test_metrics_are_counted_where_they_are_wanted(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    served = Served("containerd", "vfs", tmp_path, "--metrics", address)
    served.start()
    try:
        client = Client(served.socket)
        client.prepare(key="work")
        code_of(client.prepare, key="work")
        with urllib.request.urlopen(f"http://{address}/metrics") as page:
            text = page.read().decode()
        assert 'layerfs_request_seconds_count{method="Prepare"} 2.0' in text
        assert 'layerfs_failed_requests_total{error="AlreadyExists",method="Prepare"} 1.0' in text
    finally:
        served.stop()


def test_the_log_names_what_a_request_was_about(plain: Served) -> None:
    plain.start()
    client = Client(plain.socket)
    client.prepare(key="k\n1")
    code_of(client.stat, key="none")
    wait_until(lambda: "Stat" in plain.log.read_text(), "it is logged")
    lines = plain.log.read_text().splitlines()
    assert any("Prepare 'k\\n1'" in line and line.endswith(" ms") for line in lines)
    assert any("Stat 'none'" in line and "NotFound: there is no layer 'none'" in line for line in lines)


def test_the_relay_outlasts_a_shortage_of_descriptors(tmp_path: Path) -> None:
    class Short(socket.socket):
        """Begins as where the process, and then the system, has too many files open."""

        errors = (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED)
        met = 0

        def accept(self) -> tuple[socket.socket, Any]:
            if self.met < len(self.errors):
                self.met += 1
                raise OSError(self.errors[self.met - 1], "short")
            return super().accept()

    kind = socket.AF_UNIX
    with socket.socket(kind) as behind, Short(kind) as front, socket.socket(kind) as client:
        behind.bind(str(tmp_path / "behind"))
        behind.listen()
        front.bind(str(tmp_path / "front"))
        front.listen()
        listening.Relay(front, tmp_path / "behind").start()
        client.connect(str(tmp_path / "front"))
        client.sendall(b"question")
        behind.settimeout(60)
        client.settimeout(60)
        server, _ = behind.accept()
        with server:
            assert server.recv(100) == b"question"
            server.sendall(b"answer")
        assert client.recv(100) == b"answer"
        assert front.met == len(front.errors)
        front.shutdown(socket.SHUT_RDWR)


def test_printed_units_and_configuration_hold_every_option_and_any_path(tmp_path: Path) -> None:
    place = tmp_path / 'a "b" \\n $c %d é'
    where = ("--root", place / "store", "--socket", place / "s.sock")
    config = tomllib.loads(layerfs("serve", "containerd", "--print-config", *where))["proxy_plugins"]["layerfs"]
    assert (config["address"], config["exports"]["root"]) == (str(place / "s.sock"), str(place / "store"))
    printed = json.loads(layerfs("serve", "docker", "--print-config", "--socket", place / 'x"y.sock'))
    assert printed["storage-driver"] == 'x"y'
    options = ("--driver", "btrfs", "--sync", "commit", "--metrics", "localhost:9000")
    for engine in ("containerd", "docker"):
        text = layerfs("serve", engine, "--print-unit", *where, *options)
        (start,) = (line for line in text.splitlines() if line.startswith("ExecStart="))
        words = shlex.split(start.partition("=")[2].replace("$$", "$").replace("%%", "%"))
        assert words[1:3] == ["serve", engine]
        given = dict(zip(words[3::2], words[4::2], strict=True))
        assert given == dict(zip([*where[::2], *options[::2]], map(str, [*where[1::2], *options[1::2]]), strict=True))
        assert f"ListenStream={str(place / 's.sock').replace('%', '%%')}" in text.splitlines()
    for name in ("a\nb", "a\udcffb"):
        for wanted in ("--print-unit", "--print-config"):
            command = [*program(), "serve", "containerd", wanted, "--socket", f"/{name}/s.sock"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


def test_printed_configuration_is_what_engines_read(tmp_path: Path) -> None:
    where = ("--root", tmp_path / "store", "--socket", tmp_path / "s.sock")
    config = tomllib.loads(layerfs("serve", "containerd", "--print-config", *where))
    plugin = config["proxy_plugins"]["layerfs"]
    assert plugin["type"] == "snapshot"
    assert plugin["address"] == str(tmp_path / "s.sock")
    assert not (tmp_path / "store").exists()
    text = layerfs("serve", "containerd", "--print-unit", *where)
    assert f"ListenStream={tmp_path / 's.sock'}" in text
    assert "TimeoutStartSec=infinity" in text.splitlines()
    verify = shutil.which("systemd-analyze")
    if verify:
        service, listening = text.split("# /etc/systemd/system/layerfs-containerd.socket")
        (tmp_path / "layerfs-containerd.service").write_text(service)
        (tmp_path / "layerfs-containerd.socket").write_text(listening)
        files = [tmp_path / f"layerfs-containerd.{kind}" for kind in ("service", "socket")]
        done = subprocess.run([verify, "verify", *files], capture_output=True, text=True, check=False)
        assert "Unknown" not in done.stderr, done.stderr
