"""Where the process is in its life: starting, ready, leaving, stopping or failed."""

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from enum import Enum
from typing import TypeVar

from starlette.datastructures import State

from app.assembly import Parts, assemble, engine_of, load_replicas
from app.context_refs import parse_ref
from app.domain import DEFAULT_CONTEXT, Stage
from app.engine.workers import Problem
from app.errors import NotReady, ServiceError, ShuttingDown, StartupError, StoreError, UnknownContextNamed
from app.references import References
from app.registry import ServedModel
from app.selfcheck import check
from app.settings import Settings
from app.stores.database import Database

log = logging.getLogger(__name__)

T = TypeVar("T")

PROBE_SECONDS = 5.0
LAST_BATCH_SECONDS = 5.0
"""What the engine may still take when all requests are answered: the batch it is in."""
LAST_WRITE_SECONDS = 10.0
"""And the store, which is told that builds and batches have ended, where it is locked or does not answer."""


class Phase(Enum):
    """In this order, but that everything may fail."""

    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"
    """`/ready` says no, so that requests go elsewhere; those that come nevertheless are served."""
    STOPPING = "stopping"
    """Requests are refused; what was taken before is answered."""
    FAILED = "failed"


class Server:
    """The objects behind the routes, and where they are in their life."""

    def __init__(self, settings: Settings, on_failure: Callable[[Exception], None] | None = None) -> None:
        """`on_failure` is called once, from any thread, when the process is of no use any more: it should end it."""
        self.settings = settings
        self._on_failure = on_failure
        self._phase = Phase.STARTING
        self._reason = "The models are being loaded."
        self._loading: threading.Thread | None = None
        self._database: Database | None = None
        self._parts: Parts | None = None
        self._probed: list[ServedModel] = []

    async def start(self, state: State) -> None:
        """Loads, checks and warms everything up, and puts what the routes use into `state`.

        Afterwards `check_ready` passes, or `on_failure` was called.
        """
        started = time.perf_counter()
        try:
            await self._start(state)
        except Exception as error:
            if not isinstance(error, (StartupError, StoreError)):
                log.error("unexpected %s", type(error).__name__, exc_info=error)
            self.fail(error)
        else:
            if self._phase is Phase.STARTING:
                self._phase = Phase.READY
                log.info("ready after %.1f s", time.perf_counter() - started)

    def leave(self) -> None:
        """Not ready from now on. Only sets what others read, so that a signal handler may call it."""
        if self._phase in (Phase.STARTING, Phase.READY):
            self._phase = Phase.LEAVING if self._phase is Phase.READY else Phase.STOPPING

    def refuse(self) -> None:
        """Takes no more requests."""
        if self._phase is not Phase.FAILED:
            self._phase = Phase.STOPPING

    def fail(self, reason: Exception) -> None:
        """Nothing will be answered any more: says so at `/ready`, and has the process ended. From any thread."""
        if self._phase is Phase.FAILED:
            return
        self._phase = Phase.FAILED
        self._reason = reason.message if isinstance(reason, ServiceError) else "The server's log says why."
        if self._on_failure is not None:
            self._on_failure(reason)

    async def stop(self) -> None:
        """Lets go of everything. Requests are answered, or given up, before."""
        self.refuse()
        failed = self._phase is Phase.FAILED
        if self._parts is not None:
            # A build may take minutes; each is begun anew when it is asked for again.
            await asyncio.gather(self._parts.runner.close(failed=failed), self._parts.catalog.close())
            await asyncio.to_thread(self._parts.engine.stop, LAST_BATCH_SECONDS)
        if self._database is not None:
            await asyncio.to_thread(self._database.close)
        gc.unfreeze()

    @property
    def is_leaving(self) -> bool:
        return self._phase is Phase.LEAVING

    @property
    def is_ending(self) -> bool:
        return self._phase in (Phase.LEAVING, Phase.STOPPING, Phase.FAILED)

    @property
    def is_able(self) -> bool:
        """Whether requests are taken and, as far as is known, answered."""
        taken = self._phase in (Phase.READY, Phase.LEAVING)
        return taken and self._parts is not None and self._parts.engine.problem is None

    @property
    def is_hanging(self) -> bool:
        """Whether a thread is left that nothing can stop: a download, weights being read, a forward that never
        returns."""
        loading = self._loading is not None and self._loading.is_alive()
        return loading or (self._parts is not None and self._parts.engine.is_running)

    def check_admitted(self) -> None:
        """Raises NotReady, ShuttingDown where requests cannot be taken."""
        if self._phase is Phase.STOPPING:
            raise ShuttingDown("The server is shutting down. Send the request again to another replica.")
        if self._phase is Phase.STARTING:
            raise NotReady(f"The server is starting. {self._reason} Please try again.", retry_after=2.0)
        if self._phase is Phase.FAILED:
            raise NotReady(f"The server has failed and is going down. {self._reason}", retry_after=5.0)

    async def check_ready(self) -> None:
        """As `check_admitted`, and it will stay so, and the last batch worked, or a probe does now."""
        self.check_admitted()
        if self._phase is Phase.LEAVING:
            raise ShuttingDown("The server is about to shut down. Send requests to another replica.")
        parts = self._parts
        if parts is None or parts.engine.problem is None:
            return
        if parts.engine.problem is not Problem.LAST_BATCH:
            raise NotReady(f"The server is not ready: {parts.engine.problem}.")
        try:
            await asyncio.wait_for(self._probe(parts), PROBE_SECONDS)
        except (ServiceError, TimeoutError) as error:
            raise NotReady(f"The server is not ready: {Problem.LAST_BATCH}, and so did a probe.") from error

    async def _probe(self, parts: Parts) -> None:
        """One tiny text through each model under its default context, past the cache. Raises what the engine raises."""
        for served in self._probed:
            try:
                _, context = await parts.contexts.resolve(served, parse_ref(DEFAULT_CONTEXT))
            except UnknownContextNamed:  # deleted since
                continue
            text = served.tokenizer.texts(["probe"], None, truncate=True)
            await asyncio.wrap_future(parts.engine.submit(served.id, Stage.SECOND, text, context))

    async def _start(self, state: State) -> None:
        settings = self.settings
        self._database = await self._loaded(lambda: Database(settings.database_url))
        replicas = await self._loaded(lambda: load_replicas(settings))
        parts = self._parts = assemble(settings, self._database, replicas, self.fail)
        self._reason = "The models are being checked."
        await asyncio.to_thread(self._check, parts, replicas)
        state.registry, state.contexts, state.catalog = parts.registry, parts.contexts, parts.catalog
        state.service, state.batches = parts.service, parts.batches
        self._reason = "The default contexts are being made."
        for served in parts.registry.models:
            if await parts.catalog.ensure_default(served):
                self._probed.append(served)
            else:
                log.warning("%s has no default context: it is served without its first stage", served.id)
        await self._probe(parts)  # warm-up
        parts.runner.start()
        # What is there now stays, and a collection that walks all of it stops every thread for a quarter of a second
        # and more. Requests bring such collections about.
        gc.collect()
        gc.freeze()

    def _check(self, parts: Parts, replicas: list[list[ServedModel]]) -> None:
        """Every model on every device, and starts the engine. Raises SelfCheckError."""
        references = References(self.settings.references_dir)
        if len(replicas) == 1:
            parts.engine.start()
            for served in replicas[0]:
                check(parts.engine, served, references)
            return
        for replica in replicas:  # each alone: in one engine any of them may take what is asked
            engine = engine_of(self.settings, [replica])
            engine.start()
            try:
                for served in replica:
                    check(engine, served, references)
            finally:
                engine.stop(LAST_BATCH_SECONDS)
        parts.engine.start()

    async def _loaded(self, load: Callable[[], T]) -> T:
        """In a thread of its own. Unlike the pool's, which are waited for, it does not keep the process from ending
        while the Hub is slow or the database does not answer."""
        outcome: Future[T] = Future()

        def run() -> None:
            outcome.set_running_or_notify_cancel()  # from here on nobody's going away cancels it
            try:
                outcome.set_result(load())
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                outcome.set_exception(error)

        self._loading = threading.Thread(target=run, name="loading", daemon=True)
        self._loading.start()
        return await asyncio.wrap_future(outcome)
