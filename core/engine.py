"""A small container engine on a store: it runs a command in a container of an image, with runc.

It is `layerfs run`, and the worked example of how an engine uses layerfs. All that it asks of a store::

    with layerfs.Store(root) as store:
        store.images.import_(Path("debian.oci"))            # OCI layout or docker archive
        store.prepare("my container", "debian:12")          # a writable layer on top of the image
        with store.mounted("my container") as rootfs:       # its files, as long as the container runs
            subprocess.run(["runc", "run", …])
        store.commit("my layer", "my container")            # it may have children then, and be exported
        store.images.export("my layer", Path("mine.oci"))
        for layer in store.list("kind==active"): …
        store.remove("my layer")

Calls may come from any thread and several at once; one that is interrupted leaves nothing half done.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import re
import secrets
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from layerfs.errors import BadLayer, EnvironmentUnfit, InvalidArgument
from layerfs.kernel.openat2 import RESOLVE_IN_ROOT, openat2
from layerfs.programs import CANNOT_RUN, NO_SUCH, shell_code
from layerfs.store import Store

IMAGE_LABEL: Final = "layerfs.image"
"""The label that tells which image a container's layer was made from."""

_PATH: Final = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PATIENCE: Final = 10.0
"""Seconds that a container has to end after SIGTERM."""
_LONGEST: Final = 1 << 20
"""Bytes of a container's /etc/passwd or /etc/group that are looked at."""
_NOT_RUN: Final = re.compile(
    r"\bexec\b.*(?:(?P<missing>executable file not found|no such file or directory)|permission denied|is a directory)"
)
"""What runc says of a command that cannot be run: ``exec: "name": executable file not found in $PATH``."""

# What installing packages and changing users takes, and nothing that reaches the host: the set that engines agree on.
_CAPABILITIES: Final = [
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP"),
        *("NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
    )
]


@dataclass(frozen=True, slots=True)
class User:
    """Whom a container's first process runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    home: str = "/"


def run(
    store: Store,
    image: str,
    command: Sequence[str] = (),
    *,
    name: str = "",
    remove: bool = False,
    interactive: bool = False,
    terminal: bool = False,
) -> int:
    """Run a command in a new container of ``image``, and return its exit code when it has ended.

    As with a shell: 128 and the signal's number where one ended it, 127 where there is no such command in the
    container, 126 where it cannot be run. runc says why on the standard error.

    The container has a network of its own, without a way out. Its layer is an active one called ``name``.

    Args:
        command: by default the image's; the image's entry point goes before it.
        name: of the layer; by default ``run-`` and a random number.
        remove: the layer, when the container has ended.
        interactive: pass the standard input on.
        terminal: give the container the terminal that the standard input is.

    Where the call is interrupted, the container is ended first (SIGTERM, then SIGKILL).

    Raises `NotFound` (the image), `AlreadyExists` (the name), `InvalidArgument` (no command, no such user, no
    terminal), `BadLayer` (the image's configuration), `EnvironmentUnfit` (runc is missing, or root).
    """
    runc = shutil.which("runc", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if runc is None:
        raise EnvironmentUnfit("running a container takes runc, which is not installed; apt-get install runc")
    if os.geteuid() != 0:
        raise EnvironmentUnfit("running a container takes root here; run it as root")
    if terminal and not os.isatty(0):
        raise InvalidArgument("the standard input is no terminal that a container could have; leave -t out")
    config = _config(store, image)
    name = name or f"run-{secrets.token_hex(4)}"
    store.prepare(name, image, labels={IMAGE_LABEL: image})
    has_run = False
    try:
        with store.mounted(name) as rootfs, _bundle(runc) as bundle:
            _write_spec(bundle, rootfs, config, command, terminal=terminal)
            has_run = True
            return _run(runc, bundle, stdin=interactive or terminal)
    finally:
        if remove or not has_run:
            store.remove(name)


def _config(store: Store, image: str) -> Mapping[str, Any]:
    """The part of an image's configuration that says how to run it. Raises `BadLayer` where it is malformed."""
    config = store.images.config(image).get("config") or {}
    what = f"the configuration of the image {image!r}"
    if not isinstance(config, dict):
        raise BadLayer(f"{what} says nothing of how to run it that could be understood")
    for key in ("Entrypoint", "Cmd", "Env"):
        value = config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise BadLayer(f"{what}: {key} has to be a list of strings")
    for key in ("User", "WorkingDir"):
        if not isinstance(config.get(key) or "", str):
            raise BadLayer(f"{what}: {key} has to be a string")
    return config


# The bundle: a directory with config.json, see the OCI runtime spec


@contextmanager
def _bundle(runc: str) -> Iterator[Path]:
    """A directory for one container, with what ``runc spec`` writes; and the place for runc's own state."""
    with tempfile.TemporaryDirectory(prefix="layerfs-run-") as directory:
        bundle = Path(directory)
        (bundle / "state").mkdir(mode=0o700)
        done = subprocess.run([runc, "spec", "--bundle", directory], capture_output=True, text=True, check=False)
        if done.returncode:
            raise EnvironmentUnfit(f"runc does not work here: {done.stderr.strip()}")
        yield bundle


def _write_spec(
    bundle: Path, rootfs: Path, config: Mapping[str, Any], command: Sequence[str], *, terminal: bool
) -> None:
    spec = json.loads((bundle / "config.json").read_text())
    arguments = [*(config.get("Entrypoint") or ()), *(command or config.get("Cmd") or ())]
    if not arguments:
        raise InvalidArgument("the image names no command to run; give one")
    user = find_user(rootfs, config.get("User") or "")
    # runc takes no variable without a name or a value, and no relative directory; Docker makes do with both.
    environment = [variable for variable in config.get("Env") or () if variable.find("=") > 0]
    names = {variable.split("=", 1)[0] for variable in environment}
    defaults = [_PATH, f"HOME={user.home}", *([f"TERM={os.environ.get('TERM', 'xterm')}"] if terminal else ())]
    environment += [default for default in defaults if default.split("=", 1)[0] not in names]
    # A process that is not root gets its capabilities only by programs that give them.
    held = _CAPABILITIES if user.uid == 0 else []
    spec["process"].update(
        terminal=terminal,
        user={"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        args=arguments,
        env=environment,
        cwd=posixpath.join("/", config.get("WorkingDir") or ""),
        capabilities={"bounding": _CAPABILITIES, "effective": held, "permitted": held},
        noNewPrivileges=False,
    )
    spec["root"] = {"path": str(rootfs), "readonly": False}
    spec["hostname"] = bundle.name
    (bundle / "config.json").write_text(json.dumps(spec))


def _run(runc: str, bundle: Path, *, stdin: bool) -> int:
    """Run the container of a bundle to its end; when interrupted, end it."""
    command = [runc, "--root", str(bundle / "state"), "--log", str(bundle / "log"), "--log-format", "json"]
    with ExitStack() as stack:
        process = subprocess.Popen(
            [*command, "run", "--bundle", str(bundle), bundle.name], stdin=None if stdin else subprocess.DEVNULL
        )
        stack.callback(_end, process, [*command, "delete", "--force", bundle.name])
        code = process.wait()
        return _not_run(bundle / "log") or shell_code(code)


def _not_run(log: Path) -> int:
    """The exit code where runc's log says that the command could not be run, 0 where it does not."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in log.read_text(errors="replace").splitlines():
            if found := _NOT_RUN.search(str(json.loads(line).get("msg"))):
                return NO_SUCH if found["missing"] else CANNOT_RUN
    return 0


def _end(process: subprocess.Popen[bytes], kill: Sequence[str]) -> None:
    if process.poll() is None:
        process.terminate()  # runc passes it on
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
    if process.returncode is None or process.returncode < 0:
        subprocess.run(kill, capture_output=True, check=False)
        process.wait()


# Users, by the container's own files, which it may have made as it likes


def find_user(rootfs: Path, text: str) -> User:
    """The user that an image's configuration names: ``name``, ``number``, either with ``:group``, or "" for root.

    Raises `InvalidArgument` where the container's /etc/passwd or /etc/group has no such name.
    """
    name, _, group = text.partition(":")
    name = name or "0"
    found = next((line for line in _lines(rootfs, "etc/passwd", 7) if name in (line[0], line[2])), None)
    if found is None and not _is_id(name):
        raise InvalidArgument(f"the image is to run as the user {name!r}, which its /etc/passwd does not have")
    uid, gid, home = (int(found[2]), int(found[3]), found[5]) if found else (int(name), 0, "/")
    groups = list(_lines(rootfs, "etc/group", 4))
    if group:
        chosen = next((line[2] for line in groups if group in (line[0], line[2])), group)
        if not _is_id(chosen):
            raise InvalidArgument(f"the image is to run in the group {group!r}, which its /etc/group does not have")
        return User(uid, int(chosen), (), home or "/")
    more = tuple(int(line[2]) for line in groups if found and found[0] in line[3].split(","))
    return User(uid, gid, more, home or "/")


def _lines(rootfs: Path, name: str, count: int) -> Iterator[list[str]]:
    """The lines of a file of the container that have ``count`` fields and IDs where they have to be."""
    fd = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        file = openat2(fd, name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, resolve=RESOLVE_IN_ROOT)
    except OSError:
        return
    finally:
        os.close(fd)
    with open(file, "rb") as content:
        data = content.read(_LONGEST) if stat.S_ISREG(os.fstat(file).st_mode) else b""
    for line in data.decode(errors="replace").splitlines():
        fields = line.split(":")
        if len(fields) == count and all(map(_is_id, fields[2 : 4 if count == 7 else 3])):
            yield fields


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text[:11]) < (1 << 32) - 1
