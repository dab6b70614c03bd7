"""containerd's snapshots service on a store: every method, with containerd's own meaning, refusals and error codes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, Final

import grpc

from layerfs import errors
from layerfs.driver import Capability, Mount
from layerfs.errors import AlreadyExists, FailedPrecondition, InvalidArgument, LayerfsError
from layerfs.layer import Kind, Layer
from layerfs.serve import api
from layerfs.serve.api import Message
from layerfs.serve.requests import Requests
from layerfs.sizes import parse_size
from layerfs.store import Store

REF: Final = "containerd.io/snapshot.ref"
"""The label by which an engine asks for a snapshot that it would otherwise fetch and unpack: its chain ID."""
MAX_SIZE: Final = "containerd.io/snapshot/max-size"
"""The label with the most bytes that a writable snapshot may hold, like ``10G``."""

_BLOCK: Final = 100
"""Snapshots in one message of a list, as containerd's own service sends them."""
_LONGEST: Final = 1000
"""Characters of an error's text: it travels in a header, which clients limit to some kilobytes."""

_KINDS: Final = {Kind.VIEW: api.VIEW, Kind.ACTIVE: api.ACTIVE, Kind.COMMITTED: api.COMMITTED}

_CODES: Final[dict[type[LayerfsError], grpc.StatusCode]] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.EnvironmentUnfit: grpc.StatusCode.UNIMPLEMENTED,
    errors.OutOfSpace: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Damaged: grpc.StatusCode.DATA_LOSS,
}
"""What is not here is ``UNKNOWN``, which containerd passes on as it is."""


class Snapshots:
    """The service, for any number of threads.

    Args:
        store: it belongs to the engine: containerd removes snapshots that it does not know when it collects garbage.
        requests: is told of every request that has been answered.
    """

    def __init__(self, store: Store, requests: Requests) -> None:
        self._store = store
        self._requests = requests

    def handler(self) -> grpc.GenericRpcHandler:
        """What a gRPC server calls."""
        handlers = {}
        for name, (request, response) in api.METHODS.items():
            make = grpc.unary_unary_rpc_method_handler
            called: Callable[..., Any] = self._answering(name, getattr(self, name.lower()))
            if name == "List":
                make = grpc.unary_stream_rpc_method_handler
                called = self._streaming(name, self.list)
            handlers[name] = make(
                called, request_deserializer=request.FromString, response_serializer=response.SerializeToString
            )
        return grpc.method_handlers_generic_handler(api.SERVICE, handlers)

    # The methods, as containerd's API names them

    def prepare(self, request: Message) -> dict[str, Any]:
        """Make a writable snapshot; with the label `REF`, say that it exists where another engine has unpacked it."""
        labels = dict(request.labels)
        self._check_not_there(labels.get(REF, ""), request.parent)
        size = None
        if MAX_SIZE in labels and Capability.SIZE_LIMIT in self._store.driver.capabilities:
            size = parse_size(labels[MAX_SIZE])
        made = self._store.prepare(request.key, request.parent, labels=labels, size=size)
        return {"mounts": mounts_of(made)}

    def view(self, request: Message) -> dict[str, Any]:
        """Make a read-only snapshot."""
        return {"mounts": mounts_of(self._store.view(request.key, request.parent, labels=dict(request.labels)))}

    def mounts(self, request: Message) -> dict[str, Any]:
        """The mounts of a snapshot that is active or a view."""
        try:
            return {"mounts": mounts_of(self._store.mounts(request.key))}
        except InvalidArgument as error:
            raise FailedPrecondition(str(error)) from error  # containerd's code for a committed one

    def commit(self, request: Message) -> dict[str, Any]:
        """Make an active snapshot a committed one. The engine knows its digests, and so none is computed."""
        if request.parent and request.parent != self._store.stat(request.key).parent:
            raise errors.EnvironmentUnfit(
                f"the layer {request.key!r} cannot get another parent in a commit; take the capability 'rebase' out of "
                "containerd's configuration of this plugin"
            )
        self._store.commit(request.name, request.key, labels=dict(request.labels), digest=False)
        return {}

    def remove(self, request: Message) -> dict[str, Any]:
        """Remove a snapshot; its data goes a little later, or with `cleanup`, as with containerd's own."""
        self._store.remove(request.key, wait=False)
        return {}

    def stat(self, request: Message) -> dict[str, Any]:
        """What is known of a snapshot."""
        return {"info": info_of(self._store.stat(request.key))}

    def update(self, request: Message) -> dict[str, Any]:
        """Change labels."""
        paths = request.update_mask.paths
        return {"info": info_of(self._store.update(request.info.name, dict(request.info.labels), *paths))}

    def list(self, request: Message) -> Iterator[dict[str, Any]]:
        """All snapshots that any of the filters fits, in blocks."""
        block = []
        for layer in self._store.list(*request.filters):
            block.append(info_of(layer))
            if len(block) == _BLOCK:
                yield {"info": block}
                block = []
        if block:
            yield {"info": block}

    def usage(self, request: Message) -> dict[str, Any]:
        """What a snapshot alone occupies."""
        used = self._store.usage(request.key)
        return {"size": used.size, "inodes": max(used.inodes, 0)}

    def cleanup(self, request: Message) -> dict[str, Any]:  # noqa: ARG002
        """Finish what removals and broken-off operations have left."""
        self._store.cleanup()
        return {}

    # How they are called

    def _check_not_there(self, ref: str, parent: str) -> None:
        """containerd finds the snapshot that is meant by the label, once it has heard that there is one."""
        for layer in self._store.list("kind==committed") if ref else ():
            if layer.labels.get(REF) == ref and layer.parent == parent:
                raise AlreadyExists(f"the snapshot {ref!r} has been unpacked already, as {layer.key!r}")

    def _answering(
        self, name: str, method: Callable[[Message], dict[str, Any]]
    ) -> Callable[[Message, grpc.ServicerContext], Message]:
        _, response = api.METHODS[name]

        def answer(request: Message, context: grpc.ServicerContext) -> Message:
            start = time.perf_counter()
            try:
                made = response(**method(request))
            except Exception as error:
                self._requests.failed(name, _subject(request), time.perf_counter() - start, error)
                _refuse(context, error)
                raise
            self._requests.done(name, _subject(request), time.perf_counter() - start)
            return made

        return answer

    def _streaming(
        self, name: str, method: Callable[[Message], Iterable[dict[str, Any]]]
    ) -> Callable[[Message, grpc.ServicerContext], Iterator[Message]]:
        _, response = api.METHODS[name]

        def answer(request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
            start = time.perf_counter()
            try:
                for block in method(request):
                    yield response(**block)
            except Exception as error:
                self._requests.failed(name, _subject(request), time.perf_counter() - start, error)
                _refuse(context, error)
                raise
            self._requests.done(name, _subject(request), time.perf_counter() - start)

        return answer


def mounts_of(mounts: Iterable[Mount]) -> list[Message]:
    """Mounts in the form that containerd mounts: a bind shows what is mounted below its source as well."""
    return [
        api.Mount(
            type=mount.type,
            source=mount.source,
            target=mount.target,
            options=["rbind" if mount.type == "bind" and option == "bind" else option for option in mount.options],
        )
        for mount in mounts
    ]


def info_of(layer: Layer) -> Message:
    """What is known of a layer."""
    return api.Info(
        name=layer.key,
        parent=layer.parent,
        kind=_KINDS[layer.kind],
        created_at=_timestamp(layer.created),
        updated_at=_timestamp(layer.updated),
        labels=layer.labels,
    )


def _timestamp(moment: datetime) -> dict[str, int]:
    return {"seconds": int(moment.timestamp() // 1), "nanos": moment.microsecond * 1000}


def _subject(request: Message) -> str:
    """The snapshot that a request is about, for the log."""
    if hasattr(request, "info"):
        return str(request.info.name)
    return str(getattr(request, "key", ""))


def _refuse(context: grpc.ServicerContext, error: Exception) -> None:
    """End a request with the code that fits. `abort` raises what gRPC takes for the end."""
    if (known := errors.told(error)) is not None:
        code = next((code for kind, code in _CODES.items() if isinstance(known, kind)), grpc.StatusCode.UNKNOWN)
        context.abort(code, str(known)[:_LONGEST])
    context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error} (a fault in layerfs)"[:_LONGEST])
