"""The context a request runs under: from the store by any of its names, or from documents sent along."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cachetools import LRUCache, TTLCache

from app.building import ContextBuilder
from app.domain import (
    DEFAULT_CONTEXT,
    SHARED,
    ContextInfo,
    ContextRef,
    ContextStatus,
    Payload,
    Selection,
    Space,
)
from app.errors import ContextModelMismatch, ContextNotReady, UnknownContextNamed
from app.registry import ServedModel
from app.selection import select
from app.stores.base import ContextStore
from app.telemetry.metrics import CONTEXT_EVICTIONS, CONTEXT_USES, CONTEXTS_RESIDENT, CONTEXTS_RESIDENT_BYTES

NAME_SECONDS = 0.5
"""How long a name's target is believed before the store is asked again; another process may have moved it."""


@dataclass(frozen=True, slots=True)
class InlineContext:
    """A context sent with a request: its id at once, its arrays when `load` is awaited."""

    id: str
    load: Callable[[], Awaitable[Payload]]


class Contexts:
    """Resolves contexts for one process, by way of caches. Coroutines run on one event loop; the store in threads."""

    def __init__(
        self, builder: ContextBuilder, store: ContextStore, *, cache_bytes: int, default: str = DEFAULT_CONTEXT
    ) -> None:
        """`default`: the one shared context that every namespace may use."""
        self._builder = builder
        self._store = store
        self._default = default
        self._infos: TTLCache[tuple[Space, str], ContextInfo] = TTLCache(4096, NAME_SECONDS)
        self._generation = 0
        self._payloads = _Resident(cache_bytes, getsizeof=lambda p: sum(a.nbytes for a in p.arrays.values()) + 1)

    async def resolve(
        self, served: ServedModel, ref: ContextRef, namespace: str = SHARED
    ) -> tuple[ContextInfo, Payload]:
        """The version `ref` means now, and its arrays.

        Raises UnknownContextNamed, ContextModelMismatch, ContextNotReady.
        """
        info = await self._find(Space(served.id, namespace), ref)
        if info is None and namespace != SHARED:
            shared = await self._find(Space(served.id), ref)
            info = shared if shared is not None and shared.name == self._default else None
        if info is None:
            await self._explain_missing(served, ref, namespace)
            raise UnknownContextNamed(
                f"The context '{ref.text}' does not exist for model {served.id}. POST /v1/contexts creates it.",
                param="context",
            )
        check_completed(info, ref)
        if info.model_revision != served.spec.revision:
            raise ContextModelMismatch(
                f"The context '{ref.text}' was made with other weights of {served.id} than the ones that are served. "
                f"Create it again from its documents.",
                param="context",
            )
        payload = self._payloads.get(info.id)
        source = "resident" if payload else "loaded"
        if payload is None:
            arrays = await asyncio.to_thread(self._store.arrays, info.id)
            if arrays is None:  # deleted since it was found
                self.forget()
                return await self.resolve(served, ref, namespace)
            payload = self.keep(Payload(info.id, arrays))
        CONTEXT_USES.labels(source).inc()
        return info, payload

    async def inline(self, served: ServedModel, documents: Sequence[str], *, background: bool = False) -> InlineContext:
        """Documents sent with a request; they go through the first stage once and are then kept by content."""
        minicorpus = await asyncio.to_thread(select, documents, Selection(), served.spec.corpus_size)
        plan = await self._builder.plan(served, minicorpus, param="context")

        async def load() -> Payload:
            payload = self._payloads.get(plan.id)
            source = "resident" if payload else "built"
            if payload is None:
                outcome = await self._builder.build(served, plan, background=background)
                payload = self.keep(Payload(outcome.id, outcome.arrays))
            CONTEXT_USES.labels(source).inc()
            return payload

        return InlineContext(plan.id, load)

    async def _find(self, space: Space, ref: ContextRef) -> ContextInfo | None:
        info = self._infos.get((space, ref.text))
        if info is None:
            generation = self._generation
            info = await asyncio.to_thread(self._store.get, space, ref)
            if info is not None and generation == self._generation:  # nothing has moved while the store was asked
                self._infos[space, ref.text] = info
        return info

    def forget(self) -> None:
        """Names may point elsewhere from now on."""
        self._infos.clear()
        self._generation += 1

    async def _explain_missing(self, served: ServedModel, ref: ContextRef, namespace: str) -> None:
        models = await asyncio.to_thread(self._store.models_of, namespace, ref)
        others = [model for model in models if model != served.id]
        if others:
            raise ContextModelMismatch(
                f"The context '{ref.text}' belongs to {', '.join(others)}; it cannot be used with {served.id}.",
                param="context",
            )

    def keep(self, payload: Payload) -> Payload:
        """In memory, while there is room."""
        if self._payloads.getsizeof(payload) <= self._payloads.maxsize:
            self._payloads[payload.key] = payload
            CONTEXTS_RESIDENT.set(len(self._payloads))
            CONTEXTS_RESIDENT_BYTES.set(self._payloads.currsize)
        return payload


class _Resident(LRUCache[str, Payload]):
    """Counts what it drops."""

    def popitem(self) -> tuple[str, Payload]:
        CONTEXT_EVICTIONS.inc()
        return super().popitem()


def check_completed(info: ContextInfo, ref: ContextRef) -> None:
    """Raises ContextNotReady, or UnknownContextNamed for one that failed."""
    if info.status is ContextStatus.IN_PROGRESS:
        done, total = info.progress
        passed = (datetime.now(UTC) - info.created_at).total_seconds()
        left = passed * (total - done) / done if done else 5.0
        raise ContextNotReady(
            f"The context '{ref.text}' is still being built ({done} of {total} documents). Please try again after the "
            f"time in Retry-After.",
            param="context",
            retry_after=left,
        )
    if info.status is ContextStatus.FAILED:
        raise UnknownContextNamed(f"The context '{ref.text}' could not be built: {info.error}", param="context")
