"""The end, as a client sees it: connections are closed behind answers, and what is given up is told so."""

import asyncio

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.dependencies import Lifecycle
from app.api.openai_errors import response_of
from app.errors import ShuttingDown


class Farewell:
    """ASGI layer. Once the process is ending, every answer says `Connection: close`; a request whose task is
    cancelled then, because its time is up, is answered 503."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def closing(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                if self._lifecycle.is_ending:
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, closing)
        except asyncio.CancelledError:
            if begun or not self._lifecycle.is_ending:
                raise
            over = ShuttingDown("The server shut down before this was answered. Send the request again.")
            await response_of(over)(scope, receive, closing)
