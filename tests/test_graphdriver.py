"""Docker's graph-driver plugin protocol as any client sees it: its calls, broken requests and a broken answer."""

from __future__ import annotations

import http.client
import io
import json
import os
import random
import signal
import socket
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from layerfs import mount_table, registry
from layerfs.serve.graphdriver import GraphDriver
from layerfs.store import Store
from layerfs.testing.engines import Served, layerfs, wait_until
from layerfs.testing.guests import every_driver
from layerfs.testing.images import sha256, tar_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="serving Docker needs root")

MIB = 1 << 20


class Client:
    """Calls the plugin: ``client("Create", ID="a")``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost", timeout=120)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(120)
        connection.sock.connect(str(self.path))
        return connection

    def post(self, path: str, body: Any = b"") -> tuple[int, bytes]:
        """The answer's status and body."""
        connection = self.connect()
        try:
            connection.request("POST", path, body, encode_chunked=not isinstance(body, bytes))
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def __call__(self, name: str, *, error: str = "", **request: object) -> dict[str, Any]:
        status, body = self.post(f"/GraphDriver.{name}", json.dumps(request).encode())
        answer: dict[str, Any] = json.loads(body)
        assert status == 200
        assert error in answer["Err"] if error else answer["Err"] == "", answer
        return answer

    def apply(self, key: str, parent: str, tar: bytes) -> dict[str, Any]:
        pieces = (tar[start : start + 5000] for start in range(0, len(tar), 5000))  # as Go sends what has no length
        answer: dict[str, Any] = json.loads(self.post(f"/GraphDriver.ApplyDiff?id={key}&parent={parent}", pieces)[1])
        return answer

    def diff(self, key: str, parent: str = "") -> bytes:
        status, body = self.post("/GraphDriver.Diff", json.dumps({"ID": key, "Parent": parent}).encode())
        assert status == 200, body
        return body

    def changes(self, key: str, parent: str = "") -> set[tuple[str, int]]:
        return {(change["Path"], change["Kind"]) for change in self("Changes", ID=key, Parent=parent)["Changes"]}


@pytest.fixture(scope="module", params=every_driver())
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("served")
    probe = registry.load(request.param).probe(place)
    if not probe.usable:
        pytest.skip(f"{request.param}: {probe.reason}; {probe.remedy}")
    served = Served("docker", request.param, place)
    served.start()
    yield served
    assert served.stop() == 0
    assert not served.socket.exists()
    assert not [point for point in mount_table.read() if point.target.is_relative_to(place)]


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    client = Client(served.socket)
    yield client
    client("Cleanup")
    with Store(served.root) as store:
        for layer in reversed(list(store.list())):
            store.remove(layer.key)


LARGE = tar_of({"large": b"x" * (2 * MIB)})
HALF = len(LARGE) // 2  # more than waits in a socket: who has sent that much is being listened to
TAR = tar_of({"etc": None, "etc/a": b"one" * 1000, "big": b"x" * 300_000})


def test_a_driver_introduces_itself(client: Client) -> None:
    assert json.loads(client.post("/Plugin.Activate")[1])["Implements"] == ["GraphDriver"]
    client("Init", Home="/somewhere", Opts=[])
    client("Init", Opts=["a=b"], error="no storage options")
    client("Init", UIDMaps=[{"container_id": 0, "host_id": 1, "size": 2}], error="userns-remap")
    assert client("Capabilities")["Capabilities"] == {"ReproducesExactDiffs": True}
    assert "Driver" in dict(client("Status")["Status"])


def test_a_client_that_waits_for_leave_to_send_gets_it(client: Client) -> None:
    connection = client.connect()
    connection.putrequest("POST", "/GraphDriver.Exists")
    connection.putheader("Expect", "100-continue")
    body = b'{"ID": "none"}'
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    assert connection.sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.send(body)
    assert json.loads(connection.getresponse().read())["Exists"] is False
    connection.close()


def test_the_case_of_headers_does_not_matter(client: Client) -> None:
    body = b'{"ID": "lower"}'
    lengths = {"content-length": str(len(body))}, {"CONTENT-LENGTH": str(len(body)), "expect": "100-Continue"}
    chunked = {"transfer-encoding": "Chunked"}
    for name, headers in zip(("Create", "Exists", "Exists"), (*lengths, chunked), strict=True):
        with closing(client.connect()) as connection:
            connection.putrequest("POST", f"/GraphDriver.{name}")
            for header, value in headers.items():
                connection.putheader(header, value)
            connection.endheaders()
            connection.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if headers is chunked else body)
            answer = json.loads(connection.getresponse().read())
            assert answer == {"Err": "", **({"Exists": True} if name == "Exists" else {})}


def test_layers_are_written_to_until_they_are_parents(client: Client) -> None:
    client("Create", ID="base", Parent="")
    client("Create", ID="base", error="already")
    place = Path(client("Get", ID="base")["Dir"])
    assert place.stat().st_mode & 0o7777 == 0o755
    (place / "file").write_text("one")
    assert client("Get", ID="base")["Dir"] == str(place)
    client("Put", ID="base")
    assert (place / "file").exists()
    client("Put", ID="base")
    wait_until(lambda: not (place / "file").exists(), "the unmount that was answered")
    client("CreateReadWrite", ID="top", Parent="base")
    place = Path(client("Get", ID="top")["Dir"])
    (place / "file").write_text("two!")
    (place / "new").touch()
    assert client.changes("top", "base") == {("/file", 0), ("/new", 1)}
    assert client("DiffSize", ID="top", Parent="base")["Size"] == 4
    assert client.changes("top") == {("/file", 1), ("/new", 1)}  # against nothing
    client("Put", ID="top")
    shown = Path(client("Get", ID="base")["Dir"])
    assert (shown / "file").read_text() == "one"
    client("Put", ID="base")
    client("Remove", ID="base", error="remove")
    assert client("Exists", ID="top")["Exists"]
    for key in ("top", "base", "base"):
        client("Remove", ID=key)
    assert not client("Exists", ID="top")["Exists"]
    for call in ("Get", "GetMetadata", "Changes", "DiffSize"):
        client(call, ID="top", error="there is no layer")


def test_tars_go_both_ways_and_come_back_byte_by_byte(client: Client) -> None:
    client("Create", ID="base")
    assert client.apply("base", "", TAR) == {"Err": "", "Size": 303_000}
    assert client.diff("base") == TAR
    assert client("DiffSize", ID="base")["Size"] == 303_000
    client("Create", ID="top", Parent="base")
    client.apply("top", "base", tar_of({"etc/.wh.a": b"", "etc/b": b"two"}))
    assert client.changes("top", "base") == {("/etc", 0), ("/etc/a", 2), ("/etc/b", 1)}
    place = Path(client("Get", ID="top")["Dir"])
    assert os.listdir(place / "etc") == ["b"]
    client("Put", ID="top")
    with tarfile.open(fileobj=io.BytesIO(client.diff("top", ""))) as whole:
        assert {"big", "etc", "etc/b"} <= {name.rstrip("/") for name in whole.getnames()}


def test_a_tar_may_lack_its_end_mark(client: Client) -> None:
    """As umoci writes it, and Docker hands it on."""
    client("Create", ID="base")
    tar = tar_of({"a": b"1"})[:1024]
    assert client.apply("base", "", tar) == {"Err": "", "Size": 1}
    assert client.diff("base") == tar


def test_a_bad_tar_is_refused_and_the_layer_stays_empty(client: Client) -> None:
    client("Create", ID="base")
    for tar in (TAR[:1500], b"junk" * 1000, tar_of({"../evil": b"x"})):
        assert client.apply("base", "", tar)["Err"]
        assert client.changes("base") == set()
    assert client.apply("none", "", TAR)["Err"] == "there is no layer 'none'"
    assert client.apply("base", "", TAR)["Err"] == ""


def test_a_client_that_breaks_off_leaves_the_layer_as_it_was(client: Client) -> None:
    client("Create", ID="base")
    connection = client.connect()
    connection.putrequest("POST", "/GraphDriver.ApplyDiff?id=base&parent=")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    connection.send(b"%x\r\n%b\r\n" % (5000, TAR[:5000]))
    connection.close()
    assert client.changes("base") == set()
    assert client.apply("base", "", TAR)["Err"] == ""


def test_requests_that_are_none(client: Client) -> None:
    for body in (b"{", b"[]", b"[" * 100_000, b"\xff", b'{"ID": 3}', b"{}"):
        status, answer = client.post("/GraphDriver.Get", body)
        assert status == 200
        assert json.loads(answer)["Err"]
    assert client.post("/GraphDriver.Format", b"{}")[0] == 404
    assert client.post("/GraphDriver.Diff", b'{"ID": "none"}')[0] == 500
    client("Create", ID="a", StorageOpt={"colour": "red"}, error="storage option")
    client("Create", ID="a", StorageOpt={"size": "huge"}, error="size")
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(client.path))
        raw.sendall(random.randbytes(1000))
    assert client("Exists", ID="a")["Exists"] is False


def test_hostile_keys(client: Client) -> None:
    for key in ("../../etc", "a b:c,d", "new\nline", "ünï ☃", "x" * 10_000):
        client("Create", ID=key)
        (Path(client("Get", ID=key)["Dir"]) / "file").touch()
        client("Put", ID=key)
        assert client.changes(key) == {("/file", 1)}
        client("Remove", ID=key)


def test_a_damaged_layer_ends_the_tar_before_its_time(client: Client, served: Served) -> None:
    """The answer has begun when the damage is found: what came must not look whole."""
    client("Create", ID="base")
    tar = tar_of({"a": b"1" * MIB, "z": b"2" * MIB})
    client.apply("base", "", tar)
    files = [path for path in (served.root / "data").rglob("z") if path.stat().st_size == MIB]
    if not files or os.statvfs(files[0]).f_flag & os.ST_RDONLY:
        pytest.skip("the driver's layer cannot be damaged from outside")
    try:
        files[0].write_bytes(b"3" * MIB)
    except OSError as error:
        pytest.skip(f"the driver's layer cannot be damaged from outside: {error}")
    with pytest.raises(http.client.IncompleteRead):
        client.diff("base")


def test_many_requests_at_once(client: Client, served: Served) -> None:
    client("Create", ID="base")
    client.apply("base", "", TAR)

    def work(who: int) -> None:
        for number in range(3):
            key = f"{who}-{number}"
            client("CreateReadWrite", ID=key, Parent="base")
            (Path(client("Get", ID=key)["Dir"]) / "file").write_text(key)
            client("Put", ID=key)
            assert ("/file", 1) in client.changes(key, "base")
            client("Remove", ID=key)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(12)))
    assert sha256(client.diff("base")) == sha256(TAR)
    assert "nothing is wrong" in layerfs("check", "--root", served.root)


def test_a_layer_that_is_being_sent_can_be_a_parent(client: Client) -> None:
    client("Create", ID="base")
    client.apply("base", "", LARGE)
    with closing(client.connect()) as sending:
        sending.request("POST", "/GraphDriver.Diff", b'{"ID": "base"}')
        tar = sending.getresponse()  # its beginning; the rest waits for who reads it
        client("CreateReadWrite", ID="top", Parent="base")
        assert tar.read() == LARGE


def test_a_layer_that_is_in_use_does_not_keep_others_mounted(client: Client) -> None:
    places = {}
    for key in ("one", "two", "three"):
        client("Create", ID=key)
        places[key] = Path(client("Get", ID=key)["Dir"])
    with open(places["two"] / "file", "w"):
        client("Cleanup", error="in use")
        mounted = {point.target for point in mount_table.read()}
        assert [key for key, place in places.items() if place in mounted] == ["two"]
    client("Cleanup")


def test_locks_are_not_kept(make_store: Callable[..., Store]) -> None:
    driver = GraphDriver(make_store("overlay2"))
    for number in range(10):
        driver.create({"ID": f"layer {number}"})
    assert not driver._locks


def test_a_server_killed_in_the_middle_of_an_apply(tmp_path: Path) -> None:
    served = Served("docker", "vfs", tmp_path)
    served.start()
    client = Client(served.socket)
    client("Create", ID="base")
    connection = client.connect()
    connection.putrequest("POST", "/GraphDriver.ApplyDiff?id=base&parent=")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    connection.send(b"%x\r\n%b\r\n" % (200_000, TAR[:200_000]))
    served.stop(signal.SIGKILL)
    connection.close()
    served.start()
    assert client.changes("base") == set()
    assert client.apply("base", "", TAR)["Err"] == ""
    assert client.diff("base") == TAR
    assert served.stop() == 0
    assert "nothing is wrong" in layerfs("check", "--root", served.root)


# -- the end of the server ---------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Served]:
    """A server of its own for a test that ends it, on the driver that needs least."""
    served = Served("docker", "vfs", tmp_path)
    yield served
    if served.process is not None and served.process.poll() is None:
        served.stop(signal.SIGKILL)


def half_sent(client: Client) -> http.client.HTTPConnection:
    """An ApplyDiff to the layer ``base`` that is at work, and waits for the rest of its tar."""
    client("Create", ID="base")
    connection = client.connect()
    connection.putrequest("POST", "/GraphDriver.ApplyDiff?id=base&parent=")
    connection.putheader("Content-Length", str(len(LARGE)))
    connection.endheaders()
    connection.send(LARGE[:HALF])
    return connection


def test_a_server_that_stops_finishes_what_it_does_and_takes_no_more(plain: Served) -> None:
    plain.start()
    client = Client(plain.socket)
    with closing(client.connect()) as kept, closing(half_sent(client)) as applying:
        kept.request("POST", "/GraphDriver.Exists", b'{"ID": "none"}')
        assert kept.getresponse().read()
        assert plain.process is not None
        plain.process.terminate()
        wait_until(lambda: not plain.socket.exists(), "the server takes no more")
        kept.request("POST", "/GraphDriver.Create", b'{"ID": "late"}')
        answer = kept.getresponse()
        assert (answer.status, answer.getheader("Connection")) == (503, "close")
        assert "is stopping" in json.loads(answer.read())["Err"]
        applying.send(LARGE[HALF:])
        assert json.loads(applying.getresponse().read()) == {"Err": "", "Size": 2 * MIB}
    assert plain.process.wait(60) == 0
    assert "fault" not in plain.log.read_text()
    with Store(plain.root) as store:
        assert {layer.key for layer in store.list()} == {"base", "base (shown)"}
    assert "nothing is wrong" in layerfs("check", "--root", plain.root)


IMPATIENT = "from layerfs.serve import docker; docker._GRACE = 0; from layerfs.cli import main; main()"


def test_a_client_that_keeps_a_stopping_server_waiting_is_broken_off(plain: Served) -> None:
    at = plain.command.index("serve")
    plain.command[:at] = [sys.executable, "-c", IMPATIENT]
    plain.start()
    with closing(half_sent(Client(plain.socket))):
        assert plain.stop() == 0
    log = plain.log.read_text()
    assert "ApplyDiff 'base'" in log  # the request came to its end before the store was closed
    assert log.index("ApplyDiff 'base'") < log.index("stopped")
