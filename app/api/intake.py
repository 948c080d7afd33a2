"""How request bodies come in: how slowly they may, and how many bytes of them the process holds at once, for whom."""

import asyncio

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.budget import Budget, Share
from app.errors import InvalidRequest, RequestTimeout, UnsupportedMediaType
from app.settings import LimitSettings

UPLOADS_AT_ONCE = 4
"""Files of the greatest size that wait on disk, or in a disk of memory, until they are stored; of one caller, half."""


class Incoming:
    """One request's body on its way in. `memory` and `files`: what is held of it, where."""

    def __init__(self, receive: Receive, limits: LimitSettings, memory: Share, files: Share) -> None:
        self.memory = memory
        self.files = files
        self._receive = receive
        self._rate = limits.min_bytes_per_second
        self._most = self._patience = float(limits.stall_seconds)
        self._complete = False

    async def receive(self) -> Message:
        """ASGI's `receive`. Raises RequestTimeout where a body stalls.

        Waiting uses patience up and bytes bring it back, so a body may take any time while enough of it flows. Blank
        ones bring nothing: lines without a document are no upload.
        """
        if self._complete:
            return await self._receive()
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(self._patience):
                message = await self._receive()
        except TimeoutError:
            raise RequestTimeout(
                f"The body did not go on: less than {self._rate} bytes a second came for too long. Send it again."
            ) from None
        earned = len(message.get("body", b"").strip()) / self._rate
        self._patience = min(self._most, self._patience - (loop.time() - started) + earned)
        self._complete = not message.get("more_body", False)
        return message


class Intake:
    """ASGI layer: every request below it has an `Incoming`, and lets go of what it held when it is over."""

    def __init__(self, app: ASGIApp, limits: LimitSettings) -> None:
        self._app = app
        self._limits = limits
        self._memory = Budget(limits.max_body_bytes_in_flight)
        self._files = Budget(UPLOADS_AT_ONCE * limits.max_file_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _check_head(scope)
        memory, files = Share(self._memory, scope), Share(self._files, scope)
        body = Incoming(receive, self._limits, memory, files)
        scope.setdefault("state", {})["incoming"] = body
        try:
            await self._app(scope, body.receive, send)
        finally:
            memory.release()
            files.release()


def incoming(request: Request) -> Incoming:
    found: Incoming = request.state.incoming
    return found


def _check_head(scope: Scope) -> None:
    """Raises UnsupportedMediaType, InvalidRequest."""
    encodings = {value.strip().lower() for name, value in scope["headers"] if name == b"content-encoding"}
    if encodings - {b"", b"identity"}:  # says nothing of its size, and no client that is known sends one
        raise UnsupportedMediaType("Content-Encoding is not read here. Send the body as it is, uncompressed.")
    if "\0" in scope["path"] or b"%00" in scope["query_string"]:
        raise InvalidRequest("The URL holds a NUL character, which is in no name.")
