"""What one client may ask of the server, and the reading of a body within it."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, fields
from typing import Any

from gristmill.errors import ServingError
from gristmill.serving.refusal import ClientGone, Reason, Refusal, need

MIB = 1 << 20
MAX_RANK = 32
MAX_TENSORS = 1024  # inputs, and requested outputs, of one request
MAX_OBJECTS = 4096  # JSON objects in one body
MAX_KEYS = 65536  # JSON keys in one body
MAX_PARAMETERS_BYTES = 65536  # JSON text of one `parameters` object
MAX_DEPTH = 100  # nested JSON arrays and objects
HEADER_BYTES = 65536  # HTTP header, trailers and chunk framing, beside an eighth of the body

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


@dataclass(frozen=True)
class Limits:
    """The bounds of a server.

    Args:
        max_request_bytes: of one request body or gRPC message, and of all its tensors once decoded.
        max_working_bytes: of the memory that one run may need for its activations.
        max_concurrent: runs at the same time.
        max_queued: requests that wait for a run to end; more are refused at once.
        max_wait: seconds that a request may wait in the queue.
        max_connections: open HTTP connections.
        max_buffered_bytes: of all request bodies that are being received at the same time.
        read_seconds: for a client to send a header, and to send a body.

    Raises:
        ServingError: a bound is not positive (`max_queued` may be 0).
    """

    max_request_bytes: int = 64 * MIB
    max_working_bytes: int = 1024 * MIB
    max_concurrent: int = 1
    max_queued: int = 64
    max_wait: float = 30.0
    max_connections: int = 512
    max_buffered_bytes: int = 512 * MIB
    read_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "max_queued" else 1
            number = (int, float) if field.type in (float, "float") else int
            if isinstance(value, bool) or not isinstance(value, number) or not (value >= least or 0 < value < 1):
                raise ServingError(f"{field.name} must be a number of at least {least}, got {value!r}")


class Intake:
    """Reads request bodies, each within `max_request_bytes` and `read_seconds`, all together within `max_buffered_bytes`."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.buffered = 0

    async def read(self, receive: Receive, declared: str | None) -> bytes:
        """Return the whole body.

        Args:
            receive: the ASGI channel.
            declared: the Content-Length header, if there is one.

        Raises:
            Refusal: the body is too large, too slow, or there are too many at once.
            ClientGone: the client left before the end.
        """
        if declared is not None and declared.isdecimal() and int(declared[:20]) > self.limits.max_request_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                return await self._gather(receive)
        except TimeoutError:
            raise Refusal(Reason.SLOW, "the request body took too long to arrive") from None

    async def _gather(self, receive: Receive) -> bytes:
        parts = bytearray()
        counted = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body: bytes = message.get("body", b"")
                counted += len(body)
                self.buffered += len(body)
                if counted > self.limits.max_request_bytes:
                    raise self._too_large()
                need(self.buffered <= self.limits.max_buffered_bytes, "the server is busy", Reason.OVERLOADED)
                if not message.get("more_body", False):
                    return bytes(parts + body) if parts else body
                parts += body
        finally:
            self.buffered -= counted

    def _too_large(self) -> Refusal:
        return Refusal(Reason.TOO_LARGE, f"the request is larger than {self.limits.max_request_bytes} bytes")
