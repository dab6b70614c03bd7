"""Ready configuration of engines and of systemd for the servers, as texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from layerfs.errors import InvalidArgument

PLUGIN: Final = "layerfs"
"""The name by which engines call the snapshotter."""


def engine_config(socket: Path, root: Path) -> str:
    """What containerd, BuildKit and Docker 29 need in their configuration to use the server at ``socket``.

    Raises `InvalidArgument` for a path that no configuration can hold.
    """
    address, exported = _string(socket), _string(root)
    return f"""\
# containerd: /etc/containerd/config.toml
# then: ctr run --snapshotter {PLUGIN} …, nerdctl --snapshotter {PLUGIN} …
[proxy_plugins.{PLUGIN}]
  type = "snapshot"
  address = {address}
  [proxy_plugins.{PLUGIN}.exports]
    root = {exported}

# Kubernetes, containerd 1.x (config version 2):
# [plugins."io.containerd.grpc.v1.cri".containerd]
#   snapshotter = "{PLUGIN}"
#   disable_snapshot_annotations = true
# Kubernetes, containerd 2.x (config version 3):
# [plugins."io.containerd.cri.v1.images"]
#   snapshotter = "{PLUGIN}"

# BuildKit without containerd: /etc/buildkit/buildkitd.toml
# [worker.oci]
#   snapshotter = "{PLUGIN}"
#   proxySnapshotterPath = {address}

# Docker 29 and later with a containerd of its own that has the plugin above: /etc/docker/daemon.json
# {{"containerd": "/run/containerd/containerd.sock", "features": {{"containerd-snapshotter": true}},
#  "storage-driver": "{PLUGIN}"}}
"""


def docker_config(socket: Path) -> str:
    """What Docker 20.10 to 26 needs in its configuration to use the server at ``socket``. Raises `InvalidArgument`."""
    return f"""\
{{
  "experimental": true,
  "storage-driver": {_string(Path(socket.stem))}
}}
"""


def units(engine: str, command: Sequence[str], socket: Path) -> str:
    """systemd's units for the server for ``engine``: a service that is this command, and a socket that starts it.

    Raises `InvalidArgument` for what no unit can hold.
    """
    start = " ".join(_word(_plain(word)) for word in command)
    return f"""\
# /etc/systemd/system/layerfs-{engine}.service
[Unit]
Description=layerfs for {engine}
Before={engine}.service

[Service]
Type=notify
ExecStart={start}
Restart=on-failure
# The engine has to see the mounts of the store: no mount namespace of its own.
PrivateMounts=no
# Programs that serve mounts (aufs, ZFS in user space) go on when the server ends, and containers with them.
KillMode=process
# Before it is ready, it finishes what a crash has broken off, however long that takes.
TimeoutStartSec=infinity
TimeoutStopSec=45

[Install]
WantedBy=multi-user.target

# /etc/systemd/system/layerfs-{engine}.socket
[Unit]
Description=Socket of layerfs for {engine}

[Socket]
ListenStream={_plain(str(socket)).replace("%", "%%")}
SocketMode=0600
DirectoryMode=0700

[Install]
WantedBy=sockets.target
"""


def _string(path: Path) -> str:
    """A path as a string in JSON, and in TOML, which has the same escapes."""
    return json.dumps(_plain(str(path)), ensure_ascii=False)


def _plain(text: str) -> str:
    """The text. Raises `InvalidArgument` where no configuration can hold it: bytes that are no UTF-8, line ends."""
    if not text.isprintable():  # as lone surrogates are not, which stand for such bytes (PEP 383)
        raise InvalidArgument(f"{text!r} cannot be written into a configuration; choose a name of printable characters")
    return text


def _word(text: str) -> str:
    """A word of a command line in a unit, see systemd.syntax(7) and systemd.service(5)."""
    text = text.replace("%", "%%").replace("$", "$$")
    if text and text.isascii() and not set(text).intersection(" \t\"'\\;"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
