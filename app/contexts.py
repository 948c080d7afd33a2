"""The context a request runs under: from the store by any of its names, or from documents sent along."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

from cachetools import LRUCache

from app.building import ContextBuilder, Plan
from app.domain import (
    DEFAULT_CONTEXT,
    SHARED,
    Caller,
    ContextInfo,
    ContextRef,
    ContextStatus,
    Payload,
    Selection,
    Space,
)
from app.errors import ContextModelMismatch, ContextNotReady, ServiceError, UnknownContextNamed
from app.names import Names
from app.registry import ServedModel
from app.selection import select
from app.stores.base import ContextStore
from app.stores.errors import PayloadDamaged
from app.stores.threads import StoreThreads
from app.telemetry.metrics import CONTEXT_EVICTIONS, CONTEXT_USES, CONTEXTS_RESIDENT, CONTEXTS_RESIDENT_BYTES


class Contexts:
    """Resolves contexts for one process, by way of caches: what is in them is served while the store is away. A
    namespace finds nothing in them that another one has used, but for the shared default. Coroutines run on one event
    loop; the store in threads."""

    def __init__(
        self,
        builder: ContextBuilder,
        store: ContextStore,
        threads: StoreThreads,
        *,
        cache_bytes: int,
        stale_seconds: float,
        default: str = DEFAULT_CONTEXT,
    ) -> None:
        """`default`: the one shared context that every namespace may use. `stale_seconds`: see Names."""
        self._builder = builder
        self._store = store
        self._threads = threads
        self._default = default
        self._names = Names(store, threads, stale_seconds=stale_seconds)
        self._payloads = _Resident(cache_bytes, getsizeof=lambda p: sum(a.nbytes for a in p.arrays.values()) + 1)

    async def resolve(
        self, served: ServedModel, ref: ContextRef, namespace: str = SHARED
    ) -> tuple[ContextInfo, Payload]:
        """The version `ref` means now, and its arrays.

        Raises UnknownContextNamed, ContextModelMismatch, ContextNotReady, StoreError.
        """
        info = await self._usable(served, ref, namespace)
        payload = await self._payload(info)
        if payload is None:  # deleted since it was found
            self.forget(info.space, context_id=info.id)
            info = await self._usable(served, ref, namespace)
            payload = await self._payload(info)
        if payload is None:
            raise PayloadDamaged(f"The arrays of {info.id} are missing. Delete the context and create it again.")
        return info, payload

    async def answers(self, served: ServedModel, ref: ContextRef, namespace: str) -> bool:
        """Whether requests that name no context are answered under this name now: the default, unless it is broken."""
        if namespace != SHARED or (ref.name, ref.version) != (self._default, None):
            return False
        try:
            await self.resolve(served, ref)
        except (ServiceError, PayloadDamaged):
            return False
        return True

    async def _usable(self, served: ServedModel, ref: ContextRef, namespace: str) -> ContextInfo:
        info = await self._names.find(Space(served.id, namespace), ref)
        if info is None and namespace != SHARED:
            info = await self._shared_default(Space(served.id), ref)
        if info is None:
            await self._explain_missing(served, ref, namespace)
            raise UnknownContextNamed(
                f"The context '{ref.text}' does not exist for model {served.id}. {_where_to_look(ref)}", param="context"
            )
        check_completed(info, ref)
        if info.model_revision != served.spec.revision:
            raise ContextModelMismatch(
                f"The context '{ref.text}' was made with other weights of {served.id} than the ones that are served. "
                f"Create it again from its documents.",
                param="context",
            )
        return info

    async def _shared_default(self, space: Space, ref: ContextRef) -> ContextInfo | None:
        """The default, where `ref` means it."""
        shared = await self._names.find(space, ref)
        if shared is None or shared.name == self._default:
            return shared
        if ref.id is None:
            return None
        # The content has another name as well, under which the store found it.
        default = await self._names.find(space, ContextRef(self._default, name=self._default))
        return default if default is not None and default.id == shared.id else None

    async def _payload(self, info: ContextInfo) -> Payload | None:
        """None: the store has none."""
        payload = self._payloads.get(key_of(info.space.namespace, info.id))
        source = "resident" if payload else "loaded"
        if payload is None:
            arrays = await self._threads.read(self._store.arrays, info.id)
            payload = None if arrays is None else self.keep(Payload(key_of(info.space.namespace, info.id), arrays))
        if payload is not None:
            CONTEXT_USES.labels(source).inc()
        return payload

    async def plan_inline(self, served: ServedModel, documents: Sequence[str], caller: Caller) -> Plan:
        """Of documents sent with a request; for `inline`. Raises InvalidRequest where none of them has text."""
        spec = served.spec
        minicorpus = await asyncio.to_thread(
            select, documents, Selection(), spec.corpus_size, max_characters=spec.max_characters
        )
        return await self._builder.plan(served, minicorpus, param="context", client=caller.client)

    async def inline(self, served: ServedModel, plan: Plan, caller: Caller, namespace: str) -> Payload:
        """The context of documents sent with a request; they go through the first stage once and are then kept by
        content. Raises what ContextBuilder.build raises."""
        # By model too: one that is served in two precisions has two first stages.
        key = f"{served.id} {key_of(namespace, plan.id)}"
        payload = self._payloads.get(key)
        source = "resident" if payload else "built"
        if payload is None:
            outcome = await self._builder.build(served, plan, namespace=namespace, caller=caller)
            payload = self.keep(Payload(key_of(namespace, outcome.id), outcome.arrays), key)
        CONTEXT_USES.labels(source).inc()
        return payload

    def forget(self, space: Space, *, name: str | None = None, context_id: str | None = None) -> None:
        """A name may point elsewhere from now on, or a content be gone."""
        self._names.forget(space, name=name, context_id=context_id)

    async def _explain_missing(self, served: ServedModel, ref: ContextRef, namespace: str) -> None:
        models = await self._threads.read(self._store.models_of, namespace, ref)
        others = [model for model in models if model != served.id]
        if others:
            raise ContextModelMismatch(
                f"The context '{ref.text}' belongs to {', '.join(others)}; it cannot be used with {served.id}.",
                param="context",
            )

    def keep(self, payload: Payload, key: str | None = None) -> Payload:
        """Keeps it in memory while there is room, under its own key or another one."""
        if self._payloads.getsizeof(payload) <= self._payloads.maxsize:
            self._payloads[key or payload.key] = payload
            CONTEXTS_RESIDENT.set(len(self._payloads))
            CONTEXTS_RESIDENT_BYTES.set(self._payloads.currsize)
        return payload


class _Resident(LRUCache[str, Payload]):
    """Counts what it drops."""

    def popitem(self) -> tuple[str, Payload]:
        CONTEXT_EVICTIONS.inc()
        return super().popitem()


def key_of(namespace: str, context_id: str) -> str:
    """Of a payload. Namespaces share none, neither in memory nor on devices: the time that an answer takes would tell
    one what another one holds."""
    return f"{namespace} {context_id}"


def _where_to_look(ref: ContextRef) -> str:
    if ref.id is not None:
        return "GET /v1/contexts lists those that are there."
    if ref.version is not None:
        return "GET /v1/contexts/NAME/versions lists its versions."
    return "POST /v1/contexts creates it."


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
