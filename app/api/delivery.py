"""How answers go out: as fast as they are read, and with a bound on how many bytes of them wait for that."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.budget import Budget, Share
from app.api.openai_errors import response_of
from app.errors import BodiesFull, RequestTooLarge
from app.settings import LimitSettings

PIECE = 64 * 2**10
"""Bytes that are handed to the connection at once, which takes no more before most of them are sent."""


class Delivery:
    """ASGI layer. A larger answer is sent in pieces, and held in its caller's share until the last of them is taken.

    Where the share has no room, the caller reads too slowly for what it asks, and is told so instead. Answers that come
    in pieces already, as the contents of files do, are made as they are read and hold nothing.
    """

    def __init__(self, app: ASGIApp, limits: LimitSettings) -> None:
        self._app = app
        self._budget = Budget(limits.max_answer_bytes_in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held = Share(self._budget, scope)
        start: Message | None = None  # is sent with the body, which may not fit

        async def deliver(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            body = message.get("body", b"")
            if start is not None:
                if len(body) > PIECE and not message.get("more_body"):
                    try:
                        held.hold(len(body))
                    except (BodiesFull, RequestTooLarge) as error:
                        await response_of(error)(scope, receive, send)
                        return
                await send(start)
                start = None
            last = max(0, len(body) - 1) // PIECE * PIECE
            for at in range(0, last, PIECE):  # copies: a view of the last would keep all of it in memory
                await send({"type": "http.response.body", "body": body[at : at + PIECE], "more_body": True})
            await send({**message, "body": body[last:]})

        try:
            await self._app(scope, receive, deliver)
        finally:
            held.release()
