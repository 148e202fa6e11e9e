"""The server: both protocols on one event loop in a thread of its own, from binding the ports to the last answer."""

import asyncio
import atexit
import concurrent.futures
import contextlib
import importlib
import importlib.util
import logging
import signal
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from gristmill.errors import MissingExtraError, ServingError
from gristmill.model import Model
from gristmill.runtime.threads import default_threads
from gristmill.serving.core import Core
from gristmill.serving.limits import MIB, Limits
from gristmill.serving.registry import ModelSource, Registry, host_models
from gristmill.serving.security import ApiKey, Tls, bind_address, check_exposure, read_tls

log = logging.getLogger("gristmill.serving")

HTTP_PACKAGES = {"starlette": "starlette", "uvicorn": "uvicorn", "httptools": "uvicorn[standard]", "msgspec": "msgspec"}
GRPC_PACKAGES = {"grpc": "grpcio", "google.protobuf": "protobuf"}
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Front(Protocol):
    """A listening server of one protocol."""

    async def start(self) -> int: ...
    async def stop(self, grace: float) -> None: ...


def serve(
    models: Model | Mapping[str, ModelSource],
    http_port: int | None = 8080,
    grpc_port: int | None = 8081,
    api_key: str | None = None,
    tls: Tls | None = None,
    host: str = "127.0.0.1",
    insecure: bool = False,
    threads: int | None = None,
    *,
    max_request_bytes: int = 64 * MIB,
    max_working_bytes: int = 1024 * MIB,
    max_concurrent: int | None = None,
    max_queued: int = 64,
    max_wait: float = 30.0,
    grace: float = 30.0,
    notice: float = 0.0,
    block: bool = True,
) -> "Server":
    """Serve models over REST and gRPC (Open Inference Protocol, version 2).

    Args:
        models: a Model, which is then called "model", or models or paths by name (letters, digits, ".", "_", "-").
        http_port: of REST; 0 picks a free port, None leaves REST out.
        grpc_port: of gRPC; the same.
        api_key: what clients must send as `Authorization: Bearer KEY` or `X-API-Key: KEY`, also in gRPC metadata. Only the health
            probes are answered without it.
        tls: file names of a certificate chain and its private key (PEM), used by both protocols.
        host: the address to listen on. Beyond loopback both `api_key` and `tls` are required.
        insecure: listen beyond loopback without a key or without TLS all the same.
        threads: of each run; see `Session`.
        max_request_bytes: of one request, and of its tensors once decoded.
        max_working_bytes: of the activations of one run.
        max_concurrent: runs at the same time, of all models together. Default: the number of cores that this process may use.
        max_queued: requests that wait for a run to end; more are refused with 503 or RESOURCE_EXHAUSTED.
        max_wait: seconds that a request may wait.
        grace: seconds that requests in flight get when the server stops.
        notice: seconds between readiness turning false and the ports closing, for load balancers to see it.
        block: serve until SIGINT or SIGTERM, then drain and return. False returns the running server at once.

    Returns:
        The server: running with `block=False`, else stopped.

    Raises:
        ServingError: the address is unsafe, a port cannot be bound, or the key, the certificate or a name is unusable.
        MissingExtraError: the packages of the `serve` extra are absent.

    Example:
        >>> import httpx, gristmill as gm
        >>> from gristmill.serving import serve
        >>> with serve(gm.zoo.mlp([4, 3]), http_port=0, grpc_port=None, block=False) as server:
        ...     httpx.get(f"http://127.0.0.1:{server.http_port}/v2/models").json()
        {'models': ['model']}
    """
    for name, seconds in (("grace", grace), ("notice", notice)):
        if not isinstance(seconds, (int, float)) or not seconds >= 0:
            raise ServingError(f"{name} must be a number of seconds from 0, got {seconds!r}")
    key = None if api_key is None else ApiKey(api_key)
    check_exposure(host, key, tls, insecure)
    _check_ports(http_port, grpc_port)
    limits = Limits(
        max_request_bytes=max_request_bytes,
        max_working_bytes=max_working_bytes,
        max_concurrent=default_threads() if max_concurrent is None else max_concurrent,
        max_queued=max_queued,
        max_wait=max_wait,
    )
    registry = host_models(models, threads, limits)
    server = Server(registry, limits, host, http_port, grpc_port, key, tls, grace, notice).start()
    if block:
        server.wait()
    return server


def _check_ports(http_port: int | None, grpc_port: int | None) -> None:
    ports = [port for port in (http_port, grpc_port) if port is not None]
    if not ports:
        raise ServingError("both http_port and grpc_port are None: there is nothing to serve")
    for port in ports:
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
            raise ServingError(f"a port must be a number from 0 to 65535, got {port!r}")
    if len(ports) == 2 and ports[0] == ports[1] != 0:
        raise ServingError(f"http_port and grpc_port are both {ports[0]}: give them different ports")
    needed = {**(HTTP_PACKAGES if http_port is not None else {}), **(GRPC_PACKAGES if grpc_port is not None else {})}
    for module, package in needed.items():
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # the parent of a dotted name
            found = False
        if not found:
            raise MissingExtraError(package, "serve")


class Server:
    """A running server, made by `serve`. As a context manager it stops at the end.

    Attributes:
        http_port: where REST is served, None if it is not.
        grpc_port: where gRPC is served, None if it is not.
    """

    def __init__(
        self,
        registry: Registry,
        limits: Limits,
        host: str,
        http_port: int | None,
        grpc_port: int | None,
        key: ApiKey | None,
        tls: Tls | None,
        grace: float,
        notice: float,
    ) -> None:
        self.http_port, self.grpc_port = http_port, grpc_port
        self._registry, self._limits, self._host = registry, limits, host
        self._key, self._tls = key, tls
        self._grace, self._notice = grace, notice
        self._thread = threading.Thread(target=self._run, name="gristmill-serve", daemon=True)
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._ended = threading.Event()

    def start(self) -> "Server":
        """Bind the ports and answer requests from now on.

        Raises:
            ServingError: a port cannot be bound; nothing is left open.
        """
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self._thread.join()
            raise
        atexit.register(self.stop, 0.0)
        return self

    def stop(self, grace: float | None = None) -> None:
        """Stop: readiness turns false, the ports close, requests in flight finish. Calling it again waits for the same end.

        Args:
            grace: seconds for requests in flight, after which they are cancelled. Default: the `grace` of `serve`.
        """
        self._ask(self._grace if grace is None else grace)
        self._thread.join()
        atexit.unregister(self.stop)

    def wait(self) -> None:
        """Block until SIGINT or SIGTERM arrives, or `stop` is called elsewhere, and drain; a second signal waits no longer."""
        received: list[int] = []
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, lambda given, _: received.append(given)) for number in SIGNALS} if main else {}
        try:
            while not received and not self._ended.wait(0.2):
                pass
            if received:
                log.info("signal %d: finishing requests for at most %g s", received[0], self._grace)
                self._ask(self._grace)
            while len(received) < 2 and not self._ended.wait(0.2):
                pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            atexit.unregister(self.stop)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Server({self._host!r}, http_port={self.http_port}, grpc_port={self.grpc_port})"

    # ---- the server's own thread ----

    def _ask(self, grace: float) -> None:
        def tell() -> None:
            if not self._stopping.done():
                self._stopping.set_result(grace)

        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(tell)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self._serve())
        except BaseException as error:
            if self._started.done():
                log.exception("the server failed")
            else:
                self._started.set_exception(error)
        finally:
            self._ended.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping: asyncio.Future[float] = self._loop.create_future()
        self._core = core = Core(self._registry, self._limits)
        try:
            fronts = await self._open(core)
            core.ready = True
            self._started.set_result(None)
            grace = await self._stopping
            core.ready = False
            await asyncio.sleep(self._notice if grace else 0.0)
            await asyncio.gather(*(front.stop(grace) for front in fronts))
        finally:
            running = core.dispatcher.close(seconds=1.0)
            if running:
                log.warning("%d runs outlast the grace period; their threads end with them", running)

    async def _open(self, core: Core) -> list[Front]:
        address = bind_address(self._host)
        pair = None if self._tls is None else read_tls(self._tls)
        fronts: list[Front] = []
        try:
            if self.http_port is not None:
                from gristmill.serving import app
                from gristmill.serving.http_server import HttpServer

                fronts.append(HttpServer(app.build(core, self._key), address, self.http_port, self._limits, self._tls))
                self.http_port = await fronts[-1].start()
            if self.grpc_port is not None:
                from gristmill.serving.rpc import RpcServer

                fronts.append(RpcServer(core, self._key, address, self.grpc_port, pair))
                self.grpc_port = await fronts[-1].start()
        except BaseException:
            await asyncio.gather(*(front.stop(0.0) for front in fronts))
            raise
        return fronts


def _loop_factory() -> Any:
    try:
        return importlib.import_module("uvloop").new_event_loop
    except ImportError:  # not made for this platform
        return None
