"""The REST endpoints: each reads a request, asks the core, and writes an answer."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gristmill.serving import rest_codec
from gristmill.serving.core import EXTENSIONS, SERVER_NAME, Call, Core, version
from gristmill.serving.limits import Intake, Receive
from gristmill.serving.refusal import Reason, Refusal, need
from gristmill.serving.registry import VERSION, HostedModel

MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else rest_codec.ENCODER.encode(content)


class Endpoints:
    """The protocol's paths over one core."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.intake = Intake(core.limits)

    def routes(self) -> list[Route]:
        """Every path of the server; there is no other list."""
        model, versioned = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        table = [
            ("GET", "/v2", self.server),
            ("GET", "/v2/health/live", self.live),
            ("GET", "/v2/health/ready", self.ready),
            ("GET", "/v2/models", self.models),
            *(("GET", path, self.model) for path in (model, versioned)),
            *(("GET", f"{path}/ready", self.model_ready) for path in (model, versioned)),
            *(("POST", f"{path}/infer", self.infer) for path in (model, versioned)),
        ]
        return [Route(path, endpoint, methods=[method]) for method, path, endpoint in table]

    async def server(self, request: Request) -> Response:
        return Json({"name": SERVER_NAME, "version": version(), "extensions": EXTENSIONS})

    async def live(self, request: Request) -> Response:
        return Json({"live": True})

    async def ready(self, request: Request) -> Response:
        ready = self.core.ready
        return Json({"ready": ready, "live": True}, status_code=200 if ready else Reason.OVERLOADED.status)

    async def models(self, request: Request) -> Response:
        return Json({"models": sorted(self.core.registry.models)})

    async def model(self, request: Request) -> Response:
        hosted = self._find(request)
        inputs, outputs = (rest_codec.describe(ports.values()) for ports in (hosted.inputs, hosted.outputs))
        return Json({"name": hosted.name, "versions": [VERSION], "platform": SERVER_NAME, "inputs": inputs, "outputs": outputs})

    async def model_ready(self, request: Request) -> Response:
        hosted, ready = self._find(request), self.core.ready
        return Json({"name": hosted.name, "ready": ready}, status_code=200 if ready else Reason.OVERLOADED.status)

    async def infer(self, request: Request) -> Response:
        call = Call(self._find(request), self.core.limits)
        headers = request.headers
        plain = headers.get("content-encoding", "identity") == "identity"
        need(plain, "compressed bodies are not supported", Reason.UNSUPPORTED_ENCODING)
        body = await self.intake.read(request.receive, headers.get("content-length"))
        try:
            encoding = rest_codec.decode(call, body, headers.get(rest_codec.HEADER_LENGTH))
        except MALFORMED:
            raise Refusal(Reason.INVALID, "the body is not a valid inference request") from None
        del body
        outputs = await self.core.infer(call, _departure(request.receive))
        answer, length = rest_codec.encode(call, outputs, encoding)
        if length is None:
            return Json(answer)
        return Response(answer, media_type="application/octet-stream", headers={rest_codec.HEADER_LENGTH: str(length)})

    def _find(self, request: Request) -> HostedModel:
        given = request.path_params
        return self.core.registry.find(given["model"], given.get("version", ""))


def _departure(receive: Receive) -> Callable[[], Awaitable[None]]:
    """Return what to wait for to learn that the client has left; the body must have been read."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    return gone
