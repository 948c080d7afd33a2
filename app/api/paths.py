"""Paths as people type them: with a slash at the end, without /v1, or with it twice."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

RESOURCES = ("embeddings", "models", "contexts", "files", "batches")
"""Under /v1."""
EXACT = "/metrics"
"""Not trimmed: a gateway that hides it from the public hides this path, and no other."""


class Trimmed:
    """ASGI layer: `/v1/embeddings/` is `/v1/embeddings`. A redirect would need to know how clients reach the server."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/"):
            trimmed = scope["path"].rstrip("/") or "/"
            scope["path"] = scope["path"] if trimmed == EXACT else trimmed
        await self._app(scope, receive, send)


def meant(path: str) -> str | None:
    """What a client of OpenAI's asks for where its base URL lacks /v1, has it twice, or has a slash too many; None for
    anything else."""
    right = re.sub("^(/v1)*", "/v1", re.sub("//+", "/", path))
    resource = right.removeprefix("/v1/").partition("/")[0]
    return right if right != path and resource in RESOURCES else None
