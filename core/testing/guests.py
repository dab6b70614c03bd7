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
from collections import defaultdict
from pathlib import Path

import pytest

_REPORTS, _TESTS = "--guest-reports", "--guest-tests"
_TIMEOUT = 570  # seconds; below what pytest-timeout gives the test that has to wait for the guest
_UNFIT = 3  # the exit code of EnvironmentUnfit

_Reports = dict[str, list[pytest.TestReport]]
_done = pytest.StashKey[dict[str, _Reports]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("guest", "inside a guest")
    group.addoption(_REPORTS, metavar="FILE", help="Write each test's reports to FILE, as lines of JSON.")
    group.addoption(_TESTS, metavar="FILE", help="Run only the tests that FILE names, one a line.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "guest(kind, unless): run in a guest kernel unless that says True")
    config.stash[_done] = {}


# Inside


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if named := config.getoption(_TESTS):
        wanted = frozenset(json.loads(Path(named).read_text()))
        items[:] = [item for item in items if item.nodeid in wanted]


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
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Report the test as it went in the guest, where it has to run in one."""
    kind = _guest_of(item)
    if kind is None:
        return None
    done = item.config.stash[_done]
    if kind not in done:
        done[kind] = _run(kind, [other for other in item.session.items if _guest_of(other) == kind])
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in done[kind][item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _guest_of(item: pytest.Item) -> str | None:
    """The kind of guest that a test has to run in, here and now."""
    mark = item.get_closest_marker("guest")
    if mark is None or item.config.getoption(_REPORTS) or mark.kwargs["unless"]():
        return None
    return str(mark.args[0])


def _run(kind: str, items: list[pytest.Item]) -> _Reports:
    """Run the tests in a guest; what was reported of each, which for one that the guest did not get to is a failure."""
    config = items[0].config
    with tempfile.TemporaryDirectory(prefix="layerfs-guest-") as place:
        reports, tests = Path(place, "reports"), Path(place, "tests")
        tests.write_text(json.dumps([item.nodeid for item in items]))
        guest = ["-m", "layerfs.cli", "guest", "--kind", kind, "--timeout", str(_TIMEOUT), "--write", place, "--"]
        inner = ["-m", "pytest", "-q", "-p", "no:cacheprovider", _REPORTS, str(reports), _TESTS, str(tests)]
        paths = sorted({str(item.path) for item in items})
        result = subprocess.run(
            [sys.executable, *guest, sys.executable, *inner, *paths],
            cwd=config.rootpath,
            env=os.environ | {"TMPDIR": "/var/tmp", "PYTHONDONTWRITEBYTECODE": "1"},  # noqa: S108 - /tmp is in memory
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        found: _Reports = defaultdict(list)
        for line in reports.read_text().splitlines() if reports.exists() else []:
            data = json.loads(line)
            report = config.hook.pytest_report_from_serializable(config=config, data=data)
            found[report.nodeid].append(report)
    for item in items:
        if not any(report.when == "teardown" for report in found[item.nodeid]):
            found[item.nodeid].append(_unreported(item, kind, result))
    return found


def _unreported(item: pytest.Item, kind: str, result: subprocess.CompletedProcess[str]) -> pytest.TestReport:
    last = "\n".join(result.stdout.splitlines()[-60:])
    place = (str(item.path), (item.location[1] or 0) + 1, "")
    if result.returncode == _UNFIT:
        where = (place[0], place[1], f"Skipped: no guest can be run here: {last}")
        return pytest.TestReport(item.nodeid, item.location, {}, "skipped", where, "setup")
    text = f"the {kind} guest ended with {result.returncode} and without a result of this test; its last words:\n{last}"
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")
