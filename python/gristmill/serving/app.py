"""The REST application: one authorisation layer around every route, and errors in the protocol's form."""

import logging
from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gristmill.serving.core import Core
from gristmill.serving.endpoints import Endpoints, Json
from gristmill.serving.refusal import ClientGone, Reason, Refusal
from gristmill.serving.security import ApiKey

log = logging.getLogger("gristmill.serving")

PROBES = frozenset({"/v2/health/live", "/v2/health/ready"})  # answered to anybody


class Authorisation:
    """Lets a request pass if it is a health probe or carries the key; what the path leads to plays no part."""

    def __init__(self, app: ASGIApp, key: ApiKey | None) -> None:
        self.app, self.key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if self.key is None or scope["path"] in PROBES or self.key.admits(_credentials(scope)):
            await self.app(scope, receive, send)
        else:
            refusal = Refusal(Reason.UNAUTHENTICATED, "a valid API key is required")
            await answer(refusal, {"www-authenticate": "Bearer"})(scope, receive, send)


def _credentials(scope: Scope) -> list[tuple[str, bytes]]:
    return [(name.decode("latin-1"), value) for name, value in scope["headers"]]


def answer(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Response:
    """Return a refusal as a response."""
    given = dict(headers or {})
    if refusal.reason is Reason.OVERLOADED:
        given["retry-after"] = "1"
    return Json({"error": refusal.message}, status_code=refusal.reason.status, headers=given)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return answer(error)


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason = Reason.METHOD if error.status_code == Reason.METHOD.status else Reason.NOT_FOUND
    return answer(Refusal(reason, "method not allowed" if reason is Reason.METHOD else "not found"), error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(request: Request, error: Exception) -> Response:
    log.error("request failed", exc_info=error)
    return answer(Refusal(Reason.INTERNAL, "internal error"))


def build(core: Core, key: ApiKey | None) -> ASGIApp:
    """Return the ASGI application of a server."""
    handlers: dict[Any, Any] = {Refusal: _refused, HTTPException: _not_routed, ClientGone: _gone, Exception: _failed}
    app = Starlette(routes=Endpoints(core).routes(), middleware=[Middleware(Authorisation, key=key)], exception_handlers=handlers)
    app.router.redirect_slashes = False  # a redirect would repeat the client's Host header
    return app
