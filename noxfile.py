"""Tasks of the project: ``nox -l`` lists them. What they need of the system, ``.ci/setup`` installs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "tests"]

TOP = Path(__file__).parent


def install(session: nox.Session, *extras: str) -> None:
    """Install layerfs as users get it, not editable, so that packaging faults show."""
    shutil.rmtree(TOP / "build" / "lib", ignore_errors=True)  # setuptools would pack modules that are no more
    session.install(f"{TOP}[{','.join(extras)}]" if extras else str(TOP))


ENGINES = [
    f"tests/test_{name}.py" for name in ("adopt", "containerd", "docker", "engine", "graphdriver", "podman", "serve")
]
# What takes its own time: suites of others, a real Debian, and the gate's runs of whole benchmarks.
SUITES = [f"tests/test_{name}.py" for name in ("debian", "suites", "suites_fs")]
GATE = [f"tests/test_{name}.py" for name in ("advise", "bench_runs", "claims", "gate")]


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but those of `debian`, `gate` and the suites; arguments go to pytest. As root everything is tried."""
    _test(session, *(f"--ignore={file}" for file in [*GATE, *SUITES]))


@nox.session
def engines(session: nox.Session) -> None:
    """The tests with real engines alone, and all of them on the slow drivers too; arguments go to pytest."""
    session.env["LAYERFS_TEST_ENGINES"] = "all"
    _test(session, *ENGINES)


@nox.session
def suites(session: nox.Session) -> None:
    """containerd's and Docker's own test suites for storage drivers; arguments go to pytest."""
    _test(session, "tests/test_suites.py")


@nox.session
def suites_fs(session: nox.Session) -> None:
    """stress-ng, fio, dbench and CPython's tests on a layer of every driver; arguments go to pytest."""
    _test(session, "tests/test_suites_fs.py")


@nox.session
def debian(session: nox.Session) -> None:
    """A Debian image imported, chrooted into, changed by apt-get and exported on every driver, here and in a guest."""
    install(session, "fuse", "test")
    place = Path(session.create_tmp()) / "debian"
    layout, packages = place / "debian.oci", place / "packages"
    if not packages.is_dir():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        session.run("debootstrap", "--variant=minbase", "bookworm", f"{place}/rootfs", external=True)
        session.run("umoci", "init", "--layout", str(layout), external=True)
        session.run("umoci", "new", "--image", f"{layout}:12", external=True)
        session.run("umoci", "insert", "--image", f"{layout}:12", f"{place}/rootfs", "/", external=True)
        shutil.rmtree(place / "rootfs")
        packages.mkdir()
        with session.chdir(packages):
            session.run("apt-get", "download", "hello", "less", external=True)
    given = {"LAYERFS_TEST_DEBIAN": str(place)}
    pytest = ("pytest", "-p", "no:cacheprovider", "tests/test_debian.py", *session.posargs)
    session.run(*pytest, f"--basetemp={session.create_tmp()}/pytest", env=given)
    session.run("layerfs", "guest", "--memory=4G", "--timeout=3000", "--", *pytest, env=given)


@nox.session
def gate(session: nox.Session) -> None:
    """Adaptive benchmark runs, compare and gate, claims and advice; arguments go to pytest."""
    _test(session, *GATE)


def _test(session: nox.Session, *arguments: str) -> None:
    install(session, "fuse", "serve", "test")
    # Not in /tmp, where the tests of others may be at work too, and which may lie in memory; and where no earlier run
    # has left anything, which would be in the way of all tests.
    place = Path(session.create_tmp()) / str(os.getpid())
    session.run("pytest", f"--basetemp={place}", *arguments, *session.posargs)
    shutil.rmtree(place, ignore_errors=True)


# Of the zfs tests those that ask OpenZFS for something that zfs-fuse does in another way or not at all;
# all of them take long where QEMU has no KVM.
OPENZFS = (
    "apply_of_a_diff",
    "block_copy",
    "changes_of_every_kind",
    "diffs_are_those",
    "engine_can_mount",
    "fork",
    "idempotent",
    "life_of",
    "lost_pool",
    "put_back",
    "read_only",
    "size_limit",
    "special_files",
    "store_of_its_own",
    "there_again",
    "usage",
    "xattrs",
    "zfs_diff",
)


@nox.session
def openzfs(session: nox.Session) -> None:
    """zfs tests on OpenZFS in a QEMU guest, which is prepared the first time; `-- tests/test_zfs.py` runs all."""
    install(session, "fuse", "guest", "test")
    processors = len(os.sched_getaffinity(0))
    guest = ("layerfs", "guest", "--kind=qemu", "--memory=3G", f"--cpus={processors}", "--timeout=2400", "--")
    session.run(*guest, "pytest", *(session.posargs or ["tests/test_zfs.py", "-k", " or ".join(OPENZFS)]))
    # Without KVM a start takes long, so what differs between the kinds of guest is tried in a few of them.
    these = "changes_only_what_it_may or byte_for_byte or killed_launcher or every_driver"
    session.run("pytest", "tests/test_guest.py", "-k", these, env={"LAYERFS_TEST_GUEST": "qemu"})


@nox.session
def lint(session: nox.Session) -> None:
    """ruff's rules and format, mypy in strict mode."""
    install(session, "fuse", "lint", "serve", "test")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "-p", "layerfs")
    session.run("mypy", "tests", "noxfile.py")


@nox.session
def bench(session: nox.Session) -> None:
    """`layerfs bench`; arguments go to it."""
    install(session, "fuse")
    session.run("layerfs", "bench", *session.posargs)


@nox.session
def peers(session: nox.Session) -> None:
    """Apply and diff, unions, and engines beside other programs and drivers, each in one run."""
    install(session, "fuse", "serve", "test")
    session.run("python", "-m", "layerfs.bench.peers")


@nox.session(venv_backend="none")
def dev(session: nox.Session) -> None:
    """An environment .venv-dev that follows the source as it is edited; run it again after adding a module."""
    session.run("python3", "-m", "venv", ".venv-dev")
    # Only strict mode makes links that mypy and editors can follow through package-dir.
    editable = ("-e", f"{TOP}[dev,fuse,lint,serve,test]", "--config-settings", "editable_mode=strict")
    session.run(".venv-dev/bin/python", "-m", "pip", "install", "--quiet", *editable)
