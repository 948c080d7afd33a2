"""HTTP/1.1 by uvicorn's own protocol, made safe against clients that are broken, slow or hostile.

What uvicorn leaves open is closed here, before anything of the application runs: headers of any size that take any
time, connections without number, bodies that go on behind their answer, answers that nobody reads. What cannot be
parsed is answered in OpenAI's shape. How slowly a body may come is for `intake.py`, which knows who waits for it.
"""

import asyncio
import uuid
from collections import deque
from collections.abc import Callable
from http import HTTPStatus

import httptools
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.api.openai_errors import TABLE, response_of
from app.api.unread import UnreadAnswers
from app.api.upgrades import WithoutUpgrades
from app.errors import HeadersTooLarge, InvalidRequest, RequestTimeout, ServiceError, TooManyConnections
from app.settings import LimitSettings
from app.telemetry.metrics import CONNECTIONS_CUT

MAX_HEADERS = 256
"""However short, each takes some hundred bytes of memory."""
MAX_PIPELINED = 16
"""Requests that may wait on a connection behind the one that is being answered."""
LINGER_SECONDS = 5
"""How long a client that was refused may go on sending: closed at once, it might never see its answer."""
SPARE_CONNECTIONS = 64
"""Beyond `max_connections`: for probes, and for telling others that there is no room."""
PROBES = (b"/health", b"/health/live", b"/ready", b"/health/ready", b"/metrics")


class GuardedProtocol(WithoutUpgrades):
    """One connection. A subclass says with which limits."""

    limits: LimitSettings

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._cycles: deque[RequestResponseCycle] = deque()  # not answered yet; the first one is being answered
        self._in_head = True  # of the next request, begun or not
        self._begun = False
        self._ended = False  # what still comes is thrown away
        self._refusal: ServiceError | None = None
        self._unparsed = 0  # bytes since the parser last came to something
        self._timer: asyncio.TimerHandle | None = None
        self._unread = UnreadAnswers(transport, self.limits, lambda: self._abort("unread"))
        if len(self.connections) > self.limits.max_connections + SPARE_CONNECTIONS:
            self._abort("too_many_connections")
        else:
            self._wait(self.limits.header_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        self.resume_writing()
        self._unset_keepalive_if_required()
        for cycle in self._cycles:  # uvicorn tells the last one only
            _disconnect(cycle)
        self.pipeline.clear()
        super().connection_lost(exc)

    # --- what comes in ---

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        self._unparsed += len(data)
        try:
            self.feed(data)
        except httptools.HttpParserError:
            self._refuse(self._refusal or InvalidRequest("This is not HTTP/1.1 as it should be. Check the client."))
        else:
            if self._unparsed > self.limits.max_header_bytes:
                self._refuse(self._headers_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True
        self._unset_keepalive_if_required()
        self._wait(self.limits.header_seconds, self._head_is_late)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # behind a chunked body, where headers come too late to mean anything
        if len(self.headers) == MAX_HEADERS:
            self._stop(self._headers_too_large())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.is_offer():
            return
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.max_header_bytes:
            self._stop(self._headers_too_large())
        if len(self.connections) > self.limits.max_connections and self.url.partition(b"?")[0] not in PROBES:
            self._stop(TooManyConnections("The server has as many connections as it may. Please try again."))
        if len(self._cycles) > MAX_PIPELINED:
            self._stop(InvalidRequest("Too many requests came before the first was answered."))
        super().on_headers_complete()
        self._cycles.append(self.cycle)
        self._in_head = self._begun = False
        self._unparsed = 0
        self._wait_no_more()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.is_offer():
            return
        super().on_message_complete()
        self._in_head = True
        self._unparsed = 0
        if self.cycle.response_complete:  # answered before its end
            self._wait_no_more()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _head_is_late(self) -> None:
        if self._begun:
            self._refuse(RequestTimeout("The headers of the request did not come to an end. Send it again."))
        else:
            self._close()

    def _headers_too_large(self) -> ServiceError:
        limit = self.limits.max_header_bytes
        return HeadersTooLarge(f"Request line and headers are over {limit} bytes, or more than {MAX_HEADERS}.")

    # --- what goes out ---

    def on_response_complete(self) -> None:
        self._cycles.popleft()
        super().on_response_complete()
        if self.transport.is_closing():
            self._unread.watch()
        elif not self._in_head and not self._cycles:  # the rest of the body is thrown away, for a while
            self._unset_keepalive_if_required()
            self._wait(LINGER_SECONDS, self._close)
        elif self._begun:  # the next request is on its way, with a timer of its own
            self._unset_keepalive_if_required()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread.watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread.watch_no_more()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._unread.watch()

    # --- the end ---

    def _stop(self, error: ServiceError) -> None:
        """Called by the parser: it parses no more."""
        self._refusal = error
        raise error

    def _refuse(self, error: ServiceError) -> None:
        """Reads no more. What can still be answered is; `error` is the answer where nothing else is due."""
        self._ended = True
        self._wait_no_more()
        if self._in_head and self._cycles:  # whole requests came before: theirs are the last answers
            self._cycles[-1].keep_alive = False
        elif self._in_head:
            self._answer(error)
        elif self.cycle.response_complete:  # its body went on behind its answer
            self._close()
        elif list(self._cycles) == [self.cycle] and not self.cycle.response_started:
            _disconnect(self.cycle)
            self._answer(error)
        else:  # `error` would stand in the place of another answer, or inside one
            self._abort("malformed")

    def _answer(self, error: ServiceError) -> None:
        CONNECTIONS_CUT.labels(TABLE[type(error)][2] or "malformed").inc()
        response = response_of(error)
        headers = {
            **dict(self.server_state.default_headers),
            **dict(response.raw_headers),
            b"connection": b"close",
            b"x-request-id": f"req_{uuid.uuid4().hex}".encode(),
            b"openai-processing-ms": b"0",
            b"openai-version": b"2020-10-01",
        }
        status = HTTPStatus(response.status_code)
        head = [b"HTTP/1.1 %d %s" % (status, status.phrase.encode()), *(b"%s: %s" % pair for pair in headers.items())]
        self.transport.write(b"\r\n".join([*head, b"", bytes(response.body)]))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._wait(LINGER_SECONDS, self._close)

    def _close(self) -> None:
        """Once everything is sent."""
        self.transport.close()
        self._unread.watch()

    def _abort(self, reason: str) -> None:
        CONNECTIONS_CUT.labels(reason).inc()
        self.transport.abort()

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._wait_no_more()
        self._timer = self.loop.call_later(seconds, then)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _disconnect(cycle: RequestResponseCycle) -> None:
    """The application sees that its client has gone."""
    cycle.disconnected = True
    cycle.message_event.set()
