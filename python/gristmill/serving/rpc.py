"""The gRPC service: six unary calls over the same core, behind one authorisation layer."""

import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import grpc  # type: ignore[import-untyped]

from gristmill.errors import ServingError
from gristmill.serving import messages, rpc_codec
from gristmill.serving.core import EXTENSIONS, SERVER_NAME, Call, Core, version
from gristmill.serving.refusal import Reason, Refusal
from gristmill.serving.registry import VERSION, Port
from gristmill.serving.security import ApiKey

log = logging.getLogger("gristmill.serving")

PREFIX = f"/{messages.PACKAGE}.{messages.SERVICE}/"
PROBES = frozenset({f"{PREFIX}ServerLive", f"{PREFIX}ServerReady"})  # answered to anybody
IDENTITY_ONLY = 1  # the bit of "no compression"

Context = Any  # grpc.aio.ServicerContext, whose own type is generic over messages that are bytes here
Answer = Callable[[Any, Context], Awaitable[bytes]]


class Service(grpc.GenericRpcHandler):
    """Finds the handler of a call; a call without the key gets one that refuses before it reads a message."""

    def __init__(self, core: Core, key: ApiKey | None) -> None:
        self.core, self.key = core, key
        answers: dict[str, Answer] = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.model_infer,
        }
        self._handlers = {
            PREFIX + name: grpc.unary_unary_rpc_method_handler(_guarded(name, call)) for name, call in answers.items()
        }
        # Whatever the client's call looks like, a stream handler reads no message unless it asks for one.
        self._refusal = grpc.stream_unary_rpc_method_handler(_unauthenticated)

    def service(self, handler_call_details: Any) -> Any:
        method = handler_call_details.method
        admitted = self.key is None or method in PROBES or self.key.admits(handler_call_details.invocation_metadata or ())
        return self._handlers.get(method) if admitted else self._refusal

    async def server_live(self, request: Any, context: Context) -> bytes:
        return _serialised("ServerLiveResponse", live=True)

    async def server_ready(self, request: Any, context: Context) -> bytes:
        return _serialised("ServerReadyResponse", ready=self.core.ready)

    async def model_ready(self, request: Any, context: Context) -> bytes:
        self.core.registry.find(request.name, request.version)
        return _serialised("ModelReadyResponse", ready=self.core.ready)

    async def server_metadata(self, request: Any, context: Context) -> bytes:
        return _serialised("ServerMetadataResponse", name=SERVER_NAME, version=version(), extensions=EXTENSIONS)

    async def model_metadata(self, request: Any, context: Context) -> bytes:
        hosted = self.core.registry.find(request.name, request.version)
        inputs, outputs = ([_described(port) for port in ports.values()] for ports in (hosted.inputs, hosted.outputs))
        fields = {"name": hosted.name, "versions": [VERSION], "platform": SERVER_NAME, "inputs": inputs, "outputs": outputs}
        return _serialised("ModelMetadataResponse", **fields)

    async def model_infer(self, request: Any, context: Context) -> bytes:
        call = Call(self.core.registry.find(request.model_name, request.model_version), self.core.limits)
        remaining = context.time_remaining()
        if remaining is not None:
            call.timeout = min(call.timeout, remaining)
        rpc_codec.decode(call, request)
        outputs = await self.core.infer(call)
        return rpc_codec.encode(call, outputs, request)


def _serialised(kind: str, /, **fields: Any) -> bytes:
    data: bytes = messages.make(kind, **fields).SerializeToString()
    return data


def _described(port: Port) -> dict[str, Any]:
    return {"name": port.name, "datatype": port.datatype, "shape": port.wire_shape}


def _guarded(name: str, answer: Answer) -> Callable[[bytes, Context], Awaitable[bytes]]:
    """Parse, answer, and turn what is raised into a status; messages travel as bytes so that parse errors are ours to word."""

    async def handle(data: bytes, context: Context) -> bytes:
        try:
            return await answer(rpc_codec.parse(f"{name}Request", data), context)
        except Refusal as error:
            refusal = error
        except Exception:
            log.exception("%s failed", name)
            refusal = Refusal(Reason.INTERNAL, "internal error")
        retry = (("grpc-retry-pushback-ms", "1000"),) if refusal.reason is Reason.OVERLOADED else ()
        await context.abort(grpc.StatusCode[refusal.reason.code], refusal.message, retry)
        raise AssertionError("abort raises")

    return handle


async def _unauthenticated(messages: Any, context: Context) -> bytes:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a valid API key is required")
    raise AssertionError("abort raises")


class RpcServer:
    """A listening gRPC server on the running event loop.

    Args:
        address: numeric address to bind.
        port: 0 picks a free one.
        tls: certificate chain and private key, PEM.
    """

    def __init__(self, core: Core, key: ApiKey | None, address: str, port: int, tls: tuple[bytes, bytes] | None) -> None:
        limits = core.limits
        options = [
            ("grpc.so_reuseport", 0),  # else a second server on the port would silently take half of the calls
            ("grpc.max_receive_message_length", limits.max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.compression_enabled_algorithms_bitset", IDENTITY_ONLY),
        ]
        most = limits.max_concurrent + limits.max_queued + 64
        self._server = grpc.aio.server(options=options, maximum_concurrent_rpcs=most)
        self._server.add_generic_rpc_handlers((Service(core, key),))
        self._target = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self._tls, self._address, self._port = tls, address, port

    async def start(self) -> int:
        """Bind, listen and return the port.

        Raises:
            ServingError: the port is in use or may not be bound.
        """
        self._probe()
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(self._target)
            else:
                chain, private = self._tls
                port = self._server.add_secure_port(self._target, grpc.ssl_server_credentials([(private, chain)]))
        except RuntimeError as error:
            raise ServingError(
                f"gRPC port {self._port} cannot be bound on {self._target}: it is in use or not permitted"
            ) from error
        await self._server.start()
        return int(port)

    def _probe(self) -> None:
        """Try the port with a plain socket: it says why it fails, where gRPC writes a log of its own to stderr."""
        try:
            family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
            socket.create_server((self._address, self._port), family=family).close()
        except OSError as error:
            reason = error.strerror or error
            raise ServingError(f"gRPC port {self._port} cannot be bound on {self._target}: {reason}") from error

    async def stop(self, grace: float) -> None:
        """Refuse new calls, let those in flight finish within `grace` seconds, then cancel the rest."""
        await self._server.stop(grace)
