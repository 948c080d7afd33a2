"""`create_app(settings)`: builds every object once; the lifespan starts and drains them."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from app.api import batches as batch_routes
from app.api import contexts as context_routes
from app.api import embeddings as embedding_routes
from app.api import openai_errors, openapi, operations
from app.api.auth import Keyring
from app.api.batches import LineAnswers
from app.api.envelope import Envelope, LastNet
from app.batches.runner import BatchRunner
from app.batches.service import Batches
from app.building import ContextBuilder
from app.catalog import Catalog
from app.contexts import Contexts
from app.domain import DEFAULT_CONTEXT, Stage
from app.engine.engine import Engine
from app.errors import NotReady, ServiceError, ShuttingDown, StartupError, StoreError, UnknownContextNamed
from app.models.loading import BUILTIN, LoadOptions, load_model
from app.registry import Registry, ServedModel, parse_ref
from app.service import EmbeddingService, EmbedPolicy
from app.settings import ModelSettings, Settings
from app.stores.batches import SqlBatchStore
from app.stores.database import Database
from app.stores.files import SqlFileStore
from app.stores.sql import SqlContextStore
from app.vector_cache import VectorCache

log = logging.getLogger(__name__)

DRAIN_SECONDS = 30.0
PROBE_SECONDS = 5.0


class Server:
    """The objects behind the routes, and where they are in their life: starting, ready, draining or failed."""

    def __init__(self, app: FastAPI, settings: Settings, on_failure: Callable[[Exception], None] | None) -> None:
        self._app = app
        self._settings = settings
        self._on_failure = on_failure
        self._state = "starting: the models are being loaded"
        self._engine: Engine | None = None
        self._database: Database | None = None
        self._probed: list[ServedModel] = []

    async def start(self) -> None:
        """Loads and warms everything up; afterwards `check_ready` passes, or `on_failure` was called."""
        started = time.perf_counter()
        try:
            await self._start()
        except Exception as error:
            if not isinstance(error, (StartupError, StoreError)):
                log.error("unexpected %s", type(error).__name__, exc_info=error)
            self._state = "failed to start; the server's log says why"
            if self._on_failure is not None:
                self._on_failure(error)
        else:
            self._state = "ready"
            log.info("ready after %.1f s", time.perf_counter() - started)

    async def stop(self) -> None:
        """Answers what was admitted, then lets go of everything."""
        self._state = "shutting down"
        runner: BatchRunner | None = getattr(self._app.state, "runner", None)
        if runner is not None:
            await runner.close()
        catalog: Catalog | None = getattr(self._app.state, "catalog", None)
        if catalog is not None:  # no build ends within a drain; each is begun anew when it is asked for again
            await catalog.close()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop, DRAIN_SECONDS)
        if self._database is not None:
            await asyncio.to_thread(self._database.close)

    def check_admitted(self) -> None:
        """Raises NotReady, ShuttingDown where requests cannot be taken."""
        if self._state == "shutting down":
            raise ShuttingDown("The server is shutting down. Send the request again to another replica.")
        if self._state != "ready":
            raise NotReady(f"The server is not ready: {self._state}. Please try again.", retry_after=2.0)

    async def check_ready(self) -> None:
        """As `check_admitted`, and the last batch worked, or a probe does now."""
        self.check_admitted()
        if self._engine is not None and not self._engine.healthy:
            try:
                await asyncio.wait_for(self._probe(), PROBE_SECONDS)
            except (ServiceError, TimeoutError) as error:
                raise NotReady("The server is not ready: the last batch failed, and so did a probe.") from error

    async def _probe(self) -> None:
        """One tiny text through each model under its default context, past the cache. Raises what the engine raises."""
        state, engine = self._app.state, self._engine
        if engine is None:
            return
        for served in self._probed:
            try:
                _, context = await state.contexts.resolve(served, parse_ref(DEFAULT_CONTEXT))
            except UnknownContextNamed:  # deleted since
                continue
            kind = served.spec.default_input_type
            text = served.tokenizer.texts(["probe"], kind, kind, truncate=True)
            await asyncio.wrap_future(engine.submit(served.id, Stage.SECOND, text, context))

    async def _start(self) -> None:
        settings, state = self._settings, self._app.state
        self._database = await asyncio.to_thread(Database, settings.database_url)
        store = SqlContextStore(self._database)
        devices: list[str | None] = [*settings.engine.devices] or [None]
        replicas = [[await asyncio.to_thread(_load, m, device) for m in settings.models] for device in devices]
        models = replicas[0]
        registry = Registry(models)
        limits, device = settings.limits, registry.default.spec.device
        self._engine = Engine(
            [{served.id: served.model for served in replica} for replica in replicas],
            batch_tokens=settings.engine.batch_tokens_on(device),
            queue_tokens=limits.queue_tokens,
            cache_bytes=settings.contexts.cache_bytes,
            workers=settings.engine.workers_on(device),
        )
        self._engine.start()
        state.registry = registry
        builder, wanted = ContextBuilder(self._engine), settings.contexts
        state.contexts = Contexts(builder, store, cache_bytes=wanted.cache_bytes, default=wanted.default)
        state.catalog = Catalog(
            state.contexts,
            builder,
            store,
            keep_documents=wanted.keep_documents,
            candidates=wanted.diverse_candidates,
        )
        policy = EmbedPolicy(
            max_tokens=limits.max_tokens_per_request,
            truncate=settings.truncate,
            integers=settings.token_ids,
            default_context=settings.contexts.default,
            require_context=settings.contexts.require_context,
        )
        vectors = VectorCache(self._engine, max_bytes=limits.vector_cache_bytes)
        state.service = EmbeddingService(registry, state.contexts, vectors, policy)
        for served in models:
            if await state.catalog.ensure_default(served):
                self._probed.append(served)
            else:
                log.warning("%s has no default context: it is served without its first stage", served.id)
        await self._probe()  # warm-up
        batches, files = SqlBatchStore(self._database), SqlFileStore(self._database)
        answers = LineAnswers(state.service, settings)
        state.runner = BatchRunner(
            batches, files, answers, max_lines=limits.max_batch_lines, max_line_bytes=limits.max_body_bytes
        )
        state.batches = Batches(batches, files, state.runner)
        state.runner.start()


def create_app(settings: Settings, *, on_failure: Callable[[Exception], None] | None = None) -> ASGIApp:
    """The ASGI application. `on_failure` is called when start-up fails. Raises ConfigError for a bad keys file."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(server.start())
        try:
            yield
        finally:
            starting.cancel()
            with suppress(asyncio.CancelledError):
                await starting
            await server.stop()

    app = FastAPI(
        title="cde-server",
        summary="Contextual document embeddings behind OpenAI's embeddings API",
        version="1",
        lifespan=lifespan,
        redoc_url=None,
    )
    server = Server(app, settings, on_failure)
    app.state.server = server
    app.state.settings = settings
    app.state.created = int(time.time())
    app.state.keyring = Keyring(settings.server.keys_file) if settings.server.keys_file else None
    for routes in (embedding_routes, context_routes, batch_routes, operations):
        app.include_router(routes.router)
    app.include_router(operations.served)
    openai_errors.install(app)
    openapi.install(app)
    if settings.server.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.server.cors_origins),
            allow_methods=["*"],
            allow_headers=["*", "Authorization"],
            expose_headers=["x-request-id", "x-context-id", "x-context-name", "x-embedding-fingerprint"],
        )
    app.add_middleware(LastNet)
    return Envelope(app)


def _load(settings: ModelSettings, device: str | None = None) -> ServedModel:
    names = served_names(settings)
    options = LoadOptions(
        id=names[0],
        revision=settings.revision,
        semantics=settings.semantics,
        output_residual=settings.output_residual,
        mask_instruction=settings.mask_instruction,
        first_stage=settings.first_stage,
        dtype=settings.dtype,
        device=device or settings.device,
        context_attention=settings.context_attention,
    )
    started = time.perf_counter()
    loaded = load_model(settings.name, options)
    spec = loaded.model.spec
    log.info(
        "%s from %s: %s, %s, %s on %s, %.1f s",
        spec.id,
        spec.source,
        spec.family,
        spec.semantics,
        spec.dtype,
        spec.device,
        time.perf_counter() - started,
    )
    if spec.approximate:
        log.warning("%s runs with a frozen context: its vectors are approximate, and a space of their own", spec.id)
    if not spec.is_cde:
        log.warning("%s is a stand-in that needs no download, and not a CDE model; see README", spec.id)
    return ServedModel(names, loaded.model, loaded.tokenizer, settings.matryoshka)


def served_names(settings: ModelSettings) -> tuple[str, ...]:
    """The id first, then its last part where it has an owner, then the aliases."""
    path = Path(settings.name).expanduser()
    own = settings.served_name or (path.resolve().name if settings.name != BUILTIN and path.is_dir() else settings.name)
    return tuple(dict.fromkeys((own, own.rpartition("/")[2], *settings.aliases)))
