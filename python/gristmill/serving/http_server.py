"""The HTTP server: uvicorn on a socket of our own, with bounds on what comes before and around a body."""

import asyncio
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gristmill.errors import ServingError
from gristmill.serving.limits import HEADER_BYTES, Limits
from gristmill.serving.security import Tls

LEAST_GRACE = 0.05  # with none uvicorn reports an error even where nothing is in flight


class HttpServer:
    """A listening HTTP server on the running event loop.

    Args:
        app: the ASGI application.
        address: numeric address to bind.
        port: 0 picks a free one.
        limits: of the server.
        tls: file names of the certificate chain and the private key.

    Raises:
        ServingError: the port is in use or may not be bound.
    """

    def __init__(self, app: Any, address: str, port: int, limits: Limits, tls: Tls | None) -> None:
        config = uvicorn.Config(
            app,
            loop="none",
            http=_bounded(limits),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=75,  # longer than a proxy's usual 60 or 65
            ssl_certfile=tls[0] if tls else None,
            ssl_keyfile=tls[1] if tls else None,
        )
        self._listener = _listen(address, port)
        self._server = uvicorn.Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen and return the port."""
        port: int = self._listener.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started:
            await asyncio.sleep(0.002)
            if self._task.done():
                await self._task  # raises what went wrong
                raise ServingError("the HTTP server ended while it was starting")
        return port

    async def stop(self, grace: float) -> None:
        """Close the listener, let requests in flight finish within `grace` seconds, then cancel the rest."""
        if self._task is None or self._task.done():
            self._listener.close()
            return
        self._server.config.timeout_graceful_shutdown = max(grace, LEAST_GRACE)  # type: ignore[assignment]
        self._server.should_exit = True
        await self._task
        for task in self._server.server_state.tasks:
            task.cancel()
        await asyncio.gather(*self._server.server_state.tasks, return_exceptions=True)


def _listen(address: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=1024)
    except OSError as error:
        raise ServingError(f"HTTP port {port} cannot be bound on {address}: {error.strerror or error}") from error


def _bounded(limits: Limits) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol with bounds on connections, on headers, trailers and chunk framing, and on their arrival."""

    class BoundedProtocol(HttpToolsProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.message = 0  # counts the requests of this connection
            self.body_bytes = self.framing_bytes = 0
            self.header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                transport.close()
            else:
                self.await_header()

        def connection_lost(self, exc: Exception | None) -> None:
            self.header_arrived()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            message, body = self.message, self.body_bytes
            super().data_received(data)
            # What arrives in the packet that begins a message is bounded by the packet.
            if self.message == message and not self.transport.is_closing():
                self.framing_bytes += len(data) - (self.body_bytes - body)
                if self.framing_bytes > HEADER_BYTES + self.body_bytes // 8:
                    self.send_400_response("Too much framing.")

        def on_message_begin(self) -> None:
            self.message += 1
            self.body_bytes = self.framing_bytes = 0
            if self.header_timer is None:
                self.await_header()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self.header_arrived()
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self.body_bytes += len(body)
            super().on_body(body)

        def await_header(self) -> None:
            self.header_timer = self.loop.call_later(limits.read_seconds, self.transport.close)

        def header_arrived(self) -> None:
            if self.header_timer is not None:
                self.header_timer.cancel()
                self.header_timer = None

    return BoundedProtocol
