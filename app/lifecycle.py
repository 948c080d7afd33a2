"""Where the process is in its life: starting, ready, draining or failed."""

import asyncio
import logging
import time
from collections.abc import Callable

from fastapi import FastAPI

from app.assembly import Parts, assemble, load_replicas
from app.domain import DEFAULT_CONTEXT, Stage
from app.errors import NotReady, ServiceError, ShuttingDown, StartupError, StoreError, UnknownContextNamed
from app.references import References
from app.registry import ServedModel, parse_ref
from app.selfcheck import check
from app.settings import Settings
from app.stores.database import Database

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
        self._database: Database | None = None
        self._parts: Parts | None = None
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
        if self._parts is not None:
            await self._parts.runner.close()
            # No build ends within a drain; each is begun anew when it is asked for again.
            await self._parts.catalog.close()
            await asyncio.to_thread(self._parts.engine.stop, DRAIN_SECONDS)
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
        parts = self._parts
        if parts is not None and not parts.engine.healthy:
            try:
                await asyncio.wait_for(self._probe(parts), PROBE_SECONDS)
            except (ServiceError, TimeoutError) as error:
                raise NotReady("The server is not ready: the last batch failed, and so did a probe.") from error

    async def _probe(self, parts: Parts) -> None:
        """One tiny text through each model under its default context, past the cache. Raises what the engine raises."""
        for served in self._probed:
            try:
                _, context = await parts.contexts.resolve(served, parse_ref(DEFAULT_CONTEXT))
            except UnknownContextNamed:  # deleted since
                continue
            kind = served.spec.default_input_type
            text = served.tokenizer.texts(["probe"], kind, kind, truncate=True)
            await asyncio.wrap_future(parts.engine.submit(served.id, Stage.SECOND, text, context))

    async def _start(self) -> None:
        settings, state = self._settings, self._app.state
        self._database = await asyncio.to_thread(Database, settings.database_url)
        replicas = await asyncio.to_thread(load_replicas, settings)
        parts = self._parts = assemble(settings, self._database, replicas)
        parts.engine.start()
        state.registry, state.contexts, state.catalog = parts.registry, parts.contexts, parts.catalog
        state.service, state.batches = parts.service, parts.batches
        references = References(settings.data_dir / "selfcheck")
        for served in parts.registry.models:
            await asyncio.to_thread(check, parts.engine, served, references)
            if await parts.catalog.ensure_default(served):
                self._probed.append(served)
            else:
                log.warning("%s has no default context: it is served without its first stage", served.id)
        await self._probe(parts)  # warm-up
        parts.runner.start()
