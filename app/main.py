"""`create_app(settings)`: the ASGI application; its lifespan starts and stops the objects behind it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from app.api import batches as batch_routes
from app.api import compatibility as compatibility_routes
from app.api import contexts as context_routes
from app.api import embeddings as embedding_routes
from app.api import openai_errors, openapi, operations
from app.api.auth import Keyring
from app.api.delivery import Delivery
from app.api.envelope import Envelope, LastNet
from app.api.farewell import Farewell
from app.api.intake import Intake
from app.api.paths import Trimmed
from app.lifecycle import Server
from app.preflight import check
from app.settings import Settings
from app.telemetry.metrics import READY
from app.telemetry.tracing import Tracing


def create_app(settings: Settings, *, on_failure: Callable[[Exception], None] | None = None) -> ASGIApp:
    """The ASGI application. `on_failure` is called when it cannot serve any more. Raises ConfigError."""
    return application(Server(settings, on_failure))


def application(server: Server) -> ASGIApp:
    """The same around a `server` that the caller can also end in order. Raises ConfigError, for traces without their
    extra too."""
    settings = server.settings
    check(settings)

    @asynccontextmanager
    async def lifespan(lifespan_app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(server.start(lifespan_app.state))
        try:
            yield
        finally:
            starting.cancel()
            with suppress(asyncio.CancelledError):
                await starting
            await server.stop()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    tracing = Tracing() if settings.server.traces else None
    app = FastAPIOffline(  # its pages come from here, not from a CDN
        title="cde-server",
        summary="Contextual document embeddings behind OpenAI's embeddings API",
        version="1",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
        # Its own, which would also send the messages of exceptions; see app/telemetry/tracing.py.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    READY.set_function(lambda: server.is_able)
    app.state.server = server
    app.state.settings = settings
    app.state.created = int(time.time())
    app.state.keyring = Keyring(settings.server.keys_file) if settings.server.keys_file else None
    for routes in (embedding_routes, context_routes, compatibility_routes, batch_routes, operations):
        app.include_router(routes.router)
    app.include_router(operations.served)
    openai_errors.install(app)
    openapi.install(app)
    app.add_middleware(Delivery, limits=settings.limits)
    app.add_middleware(Intake, limits=settings.limits)
    app.add_middleware(Trimmed)
    app.add_middleware(LastNet)
    if settings.server.cors_origins:  # around the last net: a browser shows a page no answer without these headers
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.server.cors_origins),
            allow_methods=["*"],
            allow_headers=["*", "Authorization"],
            allow_private_network=True,  # a public page asks for it where this server is in a private network
            expose_headers=[
                "Retry-After",
                "retry-after-ms",
                "x-should-retry",
                *openapi.EVERYWHERE,
                *openapi.OF_EMBEDDINGS,
            ],
        )
    return Envelope(Farewell(app, server), tracing)
