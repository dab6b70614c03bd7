"""A pytest plugin: tests that need what this machine's kernel lacks run in a guest kernel, as part of the same run.

In a conftest.py: ``pytest_plugins = ["layerfs.testing.guests"]``. A test says what it needs by the mark
``guest(kind, unless=CALLABLE)``: where the callable says no, all such tests of a run go to one guest of that kind
together. Each is then reported here as it was reported there, with its output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from layerfs import registry
from layerfs.backings import thinpool

_REPORTS, _TESTS = "--guest-reports", "--guest-tests"
_TIMEOUT = 1800  # seconds for all tests together
_SILENCE = 660  # seconds for one: longer than pytest-timeout gives it, which cannot end what the guest's kernel holds
_PLACE = "/var/tmp"  # noqa: S108 - a plain file system of the guest's own
_UNFIT = 3  # the exit code of EnvironmentUnfit

_guests = pytest.StashKey[dict[str, "_Guest"]]()


def has_thin_pools() -> bool:
    """Whether this kernel has what the driver devicemapper needs."""
    return thinpool.missing() is None


needs_thin_pools = pytest.mark.guest("uml", unless=has_thin_pools)
"""The mark of tests of the driver devicemapper."""


def every_driver() -> list[ParameterSet]:
    """The names of all drivers, as parameters; tests of what this kernel lacks run in a guest that has it."""
    return [
        pytest.param(name, marks=[needs_thin_pools] if "thinpool" in registry.load(name).needs.filesystems else [])
        for name in registry.names()
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("guest", "inside a guest")
    group.addoption(_REPORTS, metavar="FILE", help="Write each test's reports to FILE, as lines of JSON.")
    group.addoption(_TESTS, metavar="FILE", help="Run only the tests that FILE names, one a line.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "guest(kind, unless): run in a guest kernel unless that says True")
    config.stash[_guests] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if named := config.getoption(_TESTS):
        wanted = frozenset(json.loads(Path(named).read_text()))
        items[:] = [item for item in items if item.nodeid in wanted]
    for item in items:
        if _guest_of(item) is not None:
            item.add_marker(pytest.mark.timeout(0))  # the first has to wait for all; inside, each has its own time


# Inside


class _Recorder:
    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config = config
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with open(self._path, "a") as file:
            file.write(json.dumps(data) + "\n")


def pytest_sessionstart(session: pytest.Session) -> None:
    if path := session.config.getoption(_REPORTS):
        session.config.pluginmanager.register(_Recorder(session.config, path))


# Outside


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Start the guests before any test: a guest's sandbox holds on to what is mounted when it is made."""
    if session.config.option.collectonly:
        return
    tests = defaultdict(list)
    for item in session.items:
        if kind := _guest_of(item):
            tests[kind].append(item)
    for kind, items in tests.items():
        guest = session.config.stash[_guests][kind] = _Guest(kind, items)
        session.config.add_cleanup(guest.end)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Report the test as it went in the guest, where it has to run in one."""
    kind = _guest_of(item)
    if kind is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in item.config.stash[_guests][kind].reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What the last test here left set up for this one, its module's fixtures, is not to outlive the module.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def _guest_of(item: pytest.Item) -> str | None:
    """The kind of guest that a test has to run in, here and now."""
    mark = item.get_closest_marker("guest")
    if mark is None or item.config.getoption(_REPORTS) or mark.kwargs["unless"]():
        return None
    return str(mark.args[0])


class _Guest:
    """A guest that runs tests, and what it has reported so far."""

    def __init__(self, kind: str, items: list[pytest.Item]) -> None:
        self._kind = kind
        self._config = items[0].config
        self._found: dict[str, list[pytest.TestReport]] = defaultdict(list)
        self._heard = time.monotonic()
        self._place = tempfile.TemporaryDirectory(prefix="layerfs-guest-")
        place = self._place.name
        (tests := Path(place, "tests")).write_text(json.dumps([item.nodeid for item in items]))
        (reports := Path(place, "reports")).touch()
        self._reports = open(reports)  # noqa: SIM115 - for as long as the guest runs
        self._output = open(Path(place, "output"), "w+", errors="replace")  # noqa: SIM115
        guest = ["-m", "layerfs.cli", "guest", "--kind", kind, "--timeout", str(_TIMEOUT), "--write", place, "--"]
        inner = ["-m", "pytest", "-q", "-p", "no:cacheprovider", _REPORTS, str(reports), _TESTS, str(tests)]
        self._process = subprocess.Popen(
            [sys.executable, *guest, sys.executable, *inner, *sorted({str(item.path) for item in items})],
            cwd=self._config.rootpath,
            env=os.environ | {"TMPDIR": _PLACE, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        """What was reported of the test, once it is done; for one that the guest did not get to, a failure."""
        while True:
            ended = self._process.poll() is not None
            self._read()
            found = self._found[item.nodeid]
            if any(report.when == "teardown" for report in found):
                return found
            if ended:
                return [*found, self._unreported(item)]
            if time.monotonic() - self._heard > _SILENCE:
                self._process.terminate()
                self._process.wait()
            time.sleep(0.1)

    def end(self) -> None:
        """End the guest, where the tests were broken off, and take away what it left."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        self._reports.close()
        self._output.close()
        self._place.cleanup()

    def _read(self) -> None:
        while True:
            start = self._reports.tell()
            line = self._reports.readline()
            if not line.endswith("\n"):  # it is still being written
                self._reports.seek(start)
                return
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=json.loads(line))
            if isinstance(report.longrepr, list):  # where a test was skipped; JSON knows no tuples
                report.longrepr = tuple(report.longrepr)
            self._found[report.nodeid].append(report)
            self._heard = time.monotonic()

    def _unreported(self, item: pytest.Item) -> pytest.TestReport:
        self._output.seek(0)
        last = "\n".join(self._output.read().splitlines()[-60:])
        place = (str(item.path), (item.location[1] or 0) + 1, "")
        if self._process.returncode == _UNFIT:
            where = (place[0], place[1], f"Skipped: no guest can be run here: {last}")
            return pytest.TestReport(item.nodeid, item.location, {}, "skipped", where, "setup")
        text = (
            f"the {self._kind} guest ended with {self._process.returncode} and without a result of this test; "
            f"its last words:\n{last}"
        )
        return pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")
