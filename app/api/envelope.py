"""What is around every answer: request id, times, OpenAI's version header, log line, trace, and the last net."""

import logging
import re
import time
import uuid
from contextlib import AbstractContextManager, nullcontext

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.openai_errors import NO_CODE, response_of
from app.telemetry.metrics import ERRORS, IN_FLIGHT, REQUEST_SECONDS, REQUESTS
from app.telemetry.requests import Fact, RequestRecord, current
from app.telemetry.tracing import RequestTrace, Tracing

log = logging.getLogger("app.access")

_SANE = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET = ("/health", "/health/live", "/ready", "/health/ready", "/metrics")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
CLIENT_GONE = 499
"""nginx's number for a client that has gone before it was answered."""


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
    """Outermost ASGI layer: nothing is answered without these headers, nor without a line in the log."""

    def __init__(self, app: ASGIApp, tracing: Tracing | None = None) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_identifier(scope))
        exchange = _Exchange(scope, receive, send, record)
        with self._trace(scope, exchange.method) as record.trace, exchange:
            await self._app(scope, exchange.receive, exchange.send)

    def _trace(self, scope: Scope, method: str) -> AbstractContextManager[RequestTrace | None]:
        if self._tracing is None or scope["path"] in _QUIET:
            return nullcontext()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        return self._tracing.request(method, headers)


class _Exchange:
    """One request and its answer as they pass; at the block's end they are counted and logged."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        self.method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        self._scope, self._receive, self._send, self._record = scope, receive, send, record
        self._started = time.perf_counter()
        self._status = 0
        self._bytes_in = self._bytes_out = 0
        self._complete = self._gone = False

    def __enter__(self) -> None:
        self._token = current.set(self._record)
        IN_FLIGHT.inc()

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._started
        IN_FLIGHT.dec()
        route = getattr(self._scope.get("route"), "path", "unmatched")
        self._count(route, seconds)
        level = logging.DEBUG if route in _QUIET else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, "%s %s %d", self.method, route, self.status, extra=self._fields(route, seconds))
        current.reset(self._token)

    @property
    def status(self) -> int:
        """Of the answer; CLIENT_GONE where none was sent to its end."""
        return self._status if self._complete or (self._status and not self._gone) else CLIENT_GONE

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._bytes_in += len(message.get("body", b""))
        elif not self._complete:
            self._gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            seconds = time.perf_counter() - self._started
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._record.id
            headers["openai-processing-ms"] = str(round(1000 * seconds))
            headers["openai-version"] = "2020-10-01"
            if self._record.seconds:
                headers["server-timing"] = self._record.server_timing(seconds)
        elif message["type"] == "http.response.body":
            self._bytes_out += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
        await self._send(message)

    def _count(self, route: str, seconds: float) -> None:
        status, record = self.status, self._record
        REQUESTS.labels(self.method, route, status).inc()
        exemplar = {"trace_id": record.trace.id} if record.trace else None
        REQUEST_SECONDS.labels(self.method, route).observe(seconds, exemplar)
        if status >= 400 and status != CLIENT_GONE:
            ERRORS.labels(status, record.facts.get("code", NO_CODE)).inc()
        if record.trace is not None:
            record.trace.answered(self.method, route, status, {"request_id": record.id, **record.facts})

    def _fields(self, route: str, seconds: float) -> dict[str, Fact | float]:
        """Of the log line."""
        key = self._scope.get("state", {}).get("key_name")
        return {
            "method": self.method,
            "route": route,
            "status": self.status,
            **({"key": key} if key else {}),
            **self._record.facts,
            "bytes_in": self._bytes_in,
            "bytes_out": self._bytes_out,
            **self._record.milliseconds(seconds),
        }


def _identifier(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return given if _SANE.fullmatch(given) else f"req_{uuid.uuid4().hex}"
