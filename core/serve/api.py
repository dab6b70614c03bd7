"""The messages of containerd's snapshots service, by their wire format (``containerd.services.snapshots.v1``).

protobuf makes the classes of the table below when this module is imported. So there is no generated code in the source,
which would only work with the protobuf releases that its generator belongs to.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, empty_pb2, field_mask_pb2, message_factory, timestamp_pb2

PACKAGE: Final = "containerd.services.snapshots.v1"
SERVICE: Final = f"{PACKAGE}.Snapshots"

VIEW, ACTIVE, COMMITTED = 1, 2, 3
"""The kinds of snapshot in `Info`."""

Message = Any
"""An object of one of the classes below; its fields are those of the table."""

_Field = descriptor_pb2.FieldDescriptorProto
_TYPES: Final = {"string": _Field.TYPE_STRING, "int64": _Field.TYPE_INT64, "Kind": _Field.TYPE_ENUM}

# Each field's number is its place, counted from 1. ``*`` is repeated, ``labels`` is map<string, string>.
_KEYED: Final = "string snapshotter, string key"
_MADE: Final = "string snapshotter, string key, string parent, labels"
_MOUNTS: Final = "*Mount mounts"
_TABLE: Final = {
    "Mount": "string type, string source, string target, *string options",  # containerd.types.Mount
    "PrepareSnapshotRequest": _MADE,
    "PrepareSnapshotResponse": _MOUNTS,
    "ViewSnapshotRequest": _MADE,
    "ViewSnapshotResponse": _MOUNTS,
    "MountsRequest": _KEYED,
    "MountsResponse": _MOUNTS,
    "RemoveSnapshotRequest": _KEYED,
    "CommitSnapshotRequest": "string snapshotter, string name, string key, labels, string parent",
    "StatSnapshotRequest": _KEYED,
    "Info": "string name, string parent, Kind kind, google.protobuf.Timestamp created_at, "
    "google.protobuf.Timestamp updated_at, labels",
    "StatSnapshotResponse": "Info info",
    "UpdateSnapshotRequest": "string snapshotter, Info info, google.protobuf.FieldMask update_mask",
    "UpdateSnapshotResponse": "Info info",
    "ListSnapshotsRequest": "string snapshotter, *string filters",
    "ListSnapshotsResponse": "*Info info",
    "UsageRequest": _KEYED,
    "UsageResponse": "int64 size, int64 inodes",
    "CleanupRequest": "string snapshotter",
}


def _pool() -> descriptor_pool.DescriptorPool:
    """A pool of our own, so that another package with containerd's messages in the same process does no harm."""
    pool = descriptor_pool.DescriptorPool()
    ours = descriptor_pb2.FileDescriptorProto(name="layerfs/snapshots.proto", package=PACKAGE, syntax="proto3")
    for theirs in (timestamp_pb2, field_mask_pb2, empty_pb2):
        file = descriptor_pb2.FileDescriptorProto()
        theirs.DESCRIPTOR.CopyToProto(file)
        pool.Add(file)
        ours.dependency.append(file.name)
    kinds = ours.enum_type.add(name="Kind")
    for number, name in enumerate(("UNKNOWN", "VIEW", "ACTIVE", "COMMITTED")):
        kinds.value.add(name=name, number=number)
    for name, fields in _TABLE.items():
        message = ours.message_type.add(name=name)
        for number, field in enumerate(fields.split(", "), 1):
            _add_field(message, number, field)
    pool.Add(ours)
    return pool


def _add_field(message: descriptor_pb2.DescriptorProto, number: int, text: str) -> None:
    if text == "labels":  # a map is a repeated message of key and value
        entry = message.nested_type.add(name="LabelsEntry")
        entry.options.map_entry = True
        _add_field(entry, 1, "string key")
        _add_field(entry, 2, "string value")
        text = f"*{message.name}.LabelsEntry labels"
    kind, name = text.removeprefix("*").split(" ")
    field = message.field.add(name=name, number=number, type=_TYPES.get(kind, _Field.TYPE_MESSAGE))
    field.label = _Field.LABEL_REPEATED if text.startswith("*") else _Field.LABEL_OPTIONAL
    if kind not in ("string", "int64"):
        field.type_name = f".{kind}" if kind.startswith("google.") else f".{PACKAGE}.{kind}"


_POOL: Final = _pool()


def message(name: str) -> Message:
    """The class of the message ``name`` of the table, or ``google.protobuf.Empty``."""
    full = name if "." in name else f"{PACKAGE}.{name}"
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(full))


Empty = message("google.protobuf.Empty")
Info = message("Info")
Mount = message("Mount")

METHODS: Final = {
    "Prepare": (message("PrepareSnapshotRequest"), message("PrepareSnapshotResponse")),
    "View": (message("ViewSnapshotRequest"), message("ViewSnapshotResponse")),
    "Mounts": (message("MountsRequest"), message("MountsResponse")),
    "Commit": (message("CommitSnapshotRequest"), Empty),
    "Remove": (message("RemoveSnapshotRequest"), Empty),
    "Stat": (message("StatSnapshotRequest"), message("StatSnapshotResponse")),
    "Update": (message("UpdateSnapshotRequest"), message("UpdateSnapshotResponse")),
    "List": (message("ListSnapshotsRequest"), message("ListSnapshotsResponse")),
    "Usage": (message("UsageRequest"), message("UsageResponse")),
    "Cleanup": (message("CleanupRequest"), Empty),
}
"""The service's methods with their request and response; ``List`` answers with a stream of responses."""
