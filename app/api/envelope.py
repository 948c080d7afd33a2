"""What is around every answer: request id, time taken, OpenAI's version header, the log line, and the last net."""

import logging
import re
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.openai_errors import response_of
from app.telemetry import REQUEST_SECONDS, REQUESTS, request_id

log = logging.getLogger("app.access")

_SANE = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET = ("/health", "/health/live", "/ready", "/health/ready", "/metrics")


class LastNet:
    """Inside the framework's own net, which would answer in plain text: any exception in OpenAI's shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noticed(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noticed)
        except ClientDisconnect:
            log.debug("the client has gone")
        except Exception as error:
            if begun or scope["type"] != "http":  # the answer has begun: the connection can only break
                raise
            await response_of(error)(scope, receive, noticed)


class Envelope:
    """Outermost ASGI layer: nothing is answered without these headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        identifier = _identifier(scope)
        token = request_id.set(identifier)
        status = 0

        async def enveloped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = identifier
                headers["openai-processing-ms"] = str(round(1000 * (time.perf_counter() - started)))
                headers["openai-version"] = "2020-10-01"
            await send(message)

        try:
            await self._app(scope, receive, enveloped)
        finally:
            # 499: nginx's number for a client that has gone before it was answered
            self._record(scope, status or 499, time.perf_counter() - started)
            request_id.reset(token)

    @staticmethod
    def _record(scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        REQUESTS.labels(route, status).inc()
        REQUEST_SECONDS.labels(route).observe(seconds)
        level = logging.DEBUG if route in _QUIET else logging.INFO
        key = scope.get("state", {}).get("key_name", "-")
        log.log(level, "%s %s %d %.1f ms key=%s", scope["method"], route, status, 1000 * seconds, key)


def _identifier(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return given if _SANE.fullmatch(given) else f"req_{uuid.uuid4().hex}"
