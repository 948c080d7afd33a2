"""Versions in progress: each is built by one task of one process, which gives signs of life until it is done.

A version whose process died counts as failed as soon as its lease has run out (stores/rows.py), and begins anew when
the same is asked for again.
"""

import asyncio
import logging
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace

from app.building import ContextBuilder, Outcome, Plan
from app.domain import Caller, ContextInfo, ContextRef, ContextStatus
from app.errors import BuildsFull, ContextNotFound, InvalidRequest, ServerFault, ServiceError, ShuttingDown, StoreError
from app.registry import ServedModel
from app.stores.base import Begun, Built, ContextStore, NewContext
from app.stores.threads import StoreThreads
from app.telemetry.metrics import CONTEXT_BUILDS, CONTEXTS_BUILDING

log = logging.getLogger(__name__)

MOST = 32
"""Versions of one namespace in progress at a time in this process: each holds its documents' tokens till it is done."""
ROOM_SECONDS = 5.0
"""After which a build that found no room may."""
BEAT_SECONDS = 2.0
LOOK_SECONDS = 0.3
"""Between two looks at a version that another process builds."""
KEEP_SECONDS = 600.0
"""For so long a version that is built and cannot be stored is tried again: computing it may have taken as long."""
TRY_SECONDS = 1.0
STOPPED = "The server was shut down while it was being built. Create it again."
FAULT = "The first stage failed; the server's log says why."
UNSTORED = "It was built and could not be stored; the server's log says why. Create it again."


class FailedElsewhere(Exception):
    """A version whose builder, another process, gave up or died."""


class Builds:
    """Begins versions and carries them through. For one event loop."""

    def __init__(
        self, builder: ContextBuilder, store: ContextStore, threads: StoreThreads, *, keep_documents: bool
    ) -> None:
        self._builder = builder
        self._store = store
        self._threads = threads
        self._keep_documents = keep_documents
        self._tasks: set[asyncio.Task[ContextInfo]] = set()
        self._running: dict[tuple[object, ...], asyncio.Task[ContextInfo]] = {}
        """By version the one that began last: while the store is away a build cannot show that it lives, and the
        version may begin anew."""
        self._unfinished: Counter[str] = Counter()
        """By namespace, those that are being begun included."""

    def check_room(self, namespace: str) -> None:
        """Raises BuildsFull."""
        if self._unfinished[namespace] >= MOST:
            raise BuildsFull(
                f"{MOST} contexts are being made, which is as many as may be at once. Please try again when one of "
                f"them is done.",
                retry_after=ROOM_SECONDS,
            )

    async def begin(self, served: ServedModel, new: NewContext, plan: Plan) -> tuple[ContextInfo, Begun]:
        """The version; its build is under way unless it is there already. Raises BuildsFull."""
        builder, namespace = uuid.uuid4().hex, new.space.namespace
        self.check_room(namespace)
        self._unfinished[namespace] += 1
        begun = None
        try:
            info, begun = await self._threads.write(self._store.begin, replace(new, builder=builder))
        finally:
            if begun is not Begun.OURS:
                self._leave(namespace)
        if begun is Begun.OURS:
            kept = plan if self._keep_documents else replace(plan, documents=None)
            task = asyncio.create_task(self._carry_through(served, info, kept, builder))
            self._tasks.add(task)
            self._running[_key(info)] = task
            CONTEXTS_BUILDING.inc()
            task.add_done_callback(lambda done: self._ended(info, done))
        return info, begun

    async def finished(self, info: ContextInfo) -> ContextInfo:
        """Waits for a version that is built here or in another process. Raises what its build raised here, and
        FailedElsewhere: what another process did not build may be begun anew."""
        task = self._running.get(_key(info))
        if task is not None:
            return await asyncio.shield(task)
        own = ContextRef(f"{info.name}.{info.version}", name=info.name, version=info.version)
        while True:
            found = await self._threads.read(self._store.get, info.space, own)
            if found is None:  # deleted, or gone because the name had its content already
                found = await self._threads.read(self._store.get, info.space, ContextRef(info.id, id=info.id))
            if found is None:
                raise _deleted(info)
            if found.status is ContextStatus.COMPLETED:
                return found
            if found.status is ContextStatus.FAILED:
                log.warning("context %s was not built by the process that began it: %s", own.text, found.error)
                raise FailedElsewhere
            await asyncio.sleep(LOOK_SECONDS)

    async def close(self) -> None:
        """Ends all builds; their versions have failed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry_through(self, served: ServedModel, info: ContextInfo, plan: Plan, builder: str) -> ContextInfo:
        progress = _Progress()
        beating = asyncio.create_task(self._beat(info, builder, progress))
        try:
            outcome = await self._outcome(served, info, plan, progress)
            built = Built(outcome.id, outcome.arrays, outcome.selection, outcome.counts, outcome.documents)
            completed = await self._stored(info, built)
            if completed is None:
                raise _deleted(info)
        except BaseException as error:
            with suppress(StoreError):  # then it has failed as soon as its lease has run out
                await self._threads.write(self._store.fail, info, builder, _reason(error))
            raise
        finally:
            beating.cancel()
        log.info("context %s.%d is %s", completed.name, completed.version, completed.id)
        return completed

    async def _stored(self, info: ContextInfo, built: Built) -> ContextInfo | None:
        """See ContextStore.complete. What a store that is away for a while missed is stored when it is back."""
        until = time.monotonic() + KEEP_SECONDS
        while True:
            try:
                return await self._threads.write(self._store.complete, info, built)
            except StoreError as error:
                if not error.passes or time.monotonic() > until:
                    raise
                log.info("context %s.%d is built and waits for the store (%s)", info.name, info.version, error.kind)
                await asyncio.sleep(max(TRY_SECONDS, error.retry_after))

    async def _outcome(self, served: ServedModel, info: ContextInfo, plan: Plan, progress: "_Progress") -> Outcome:
        """From the store where another name of this namespace has it."""
        if plan.is_chosen:
            with suppress(StoreError):  # it is built, then
                same = await self._threads.read(self._store.get, info.space, ContextRef(plan.id, id=plan.id))
                if same is not None and same.status is ContextStatus.COMPLETED:
                    arrays = await self._threads.read(self._store.arrays, same.id)
                    if arrays is not None:
                        return Outcome(plan.id, arrays, plan.documents, plan.selection, plan.counts)
        caller = Caller(f"namespace {info.space.namespace}", background=True)
        return await self._builder.build(served, plan, progress.tell, caller, namespace=info.space.namespace)

    async def _beat(self, info: ContextInfo, builder: str, progress: "_Progress") -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            with suppress(StoreError):  # the store has said so in the log
                await self._threads.write(self._store.beat, info, builder, progress.documents)

    def _leave(self, namespace: str) -> None:
        self._unfinished -= Counter([namespace])  # which forgets who has none

    def _ended(self, info: ContextInfo, task: "asyncio.Task[ContextInfo]") -> None:
        self._tasks.discard(task)
        if self._running.get(_key(info)) is task:
            del self._running[_key(info)]
        self._leave(info.space.namespace)
        CONTEXTS_BUILDING.dec()
        error = None if task.cancelled() else task.exception()
        stopped = task.cancelled() or isinstance(error, (ShuttingDown, ContextNotFound))
        CONTEXT_BUILDS.labels("stopped" if stopped else "failed" if error else "completed").inc()
        if error is not None:
            shown = None if isinstance(error, ServiceError) and not isinstance(error, ServerFault) else error
            log.error("context %s.%d failed: %s", info.name, info.version, type(error).__name__, exc_info=shown)


@dataclass(slots=True)
class _Progress:
    """Documents of a build that are through the first stage."""

    documents: int = 0

    def tell(self, documents: int) -> None:
        self.documents = documents


def _key(info: ContextInfo) -> tuple[object, ...]:
    return info.space, info.name, info.version


def _reason(error: BaseException) -> str:
    if isinstance(error, (asyncio.CancelledError, ShuttingDown)):
        return STOPPED
    if isinstance(error, StoreError):
        return UNSTORED
    return error.message if isinstance(error, InvalidRequest) else FAULT


def _deleted(info: ContextInfo) -> ContextNotFound:
    return ContextNotFound(f"The context {info.name}.{info.version} was deleted while it was being built.", param="ref")
