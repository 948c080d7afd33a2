"""Vectors that were computed before are not computed again, nor ones that are being computed.

Contexts are immutable, so model, context, input type and token ids decide a vector: a cache of it is never wrong. Rows
are kept raw, before `dimensions` and normalisation, so that all answers share them; but no namespace's answers share
another's, as the time that an answer takes would tell who has embedded what.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from cachetools import LRUCache

from app.domain import ANYBODY, SHARED, Caller, FloatArray, Payload, Stage, TokenizedText
from app.engine.batching import Timing
from app.engine.engine import Engine
from app.errors import ServiceError
from app.registry import ServedModel
from app.telemetry.metrics import COMPUTE_TOKENS, VECTOR_CACHE, VECTOR_CACHE_BYTES
from app.telemetry.requests import record_engine

Key = bytes
FEW = 32
"""Texts up to which keys are made on the event loop."""

OVERHEAD = 300
"""Bytes of an entry besides its vector, about."""


@dataclass(eq=False, slots=True)
class _Flight:
    """Texts on the device together, and how many requests wait for them."""

    rows: "asyncio.Future[FloatArray]"
    texts: int
    timing: Timing
    waiting: int = 0


class VectorCache:
    """Second stages through a byte-bounded cache, and equal texts in flight computed once, unless a small request
    would have to wait for a large one. For one event loop."""

    def __init__(self, engine: Engine, *, max_bytes: int) -> None:
        """`max_bytes` 0: nothing is kept; texts in flight are still shared."""
        self._engine = engine
        self._rows: LRUCache[Key, FloatArray] = LRUCache(max_bytes, getsizeof=_size)
        self._flying: dict[Key, tuple[_Flight, int]] = {}

    async def embed(
        self,
        served: ServedModel,
        texts: Sequence[TokenizedText],
        context: Payload,
        caller: Caller = ANYBODY,
        namespace: str = SHARED,
    ) -> FloatArray:
        """Raw vectors (n, hidden_size) float32, in order. `namespace`: of whose earlier texts they may be.

        Raises what Engine.submit and its future raise.
        """
        if len(texts) <= FEW:
            keys = _keys(namespace, served.id, context.key, texts)
        else:
            keys = await asyncio.to_thread(_keys, namespace, served.id, context.key, texts)
        out = np.empty((len(texts), served.spec.hidden_size), np.float32)
        missing: dict[Key, TokenizedText] = {}
        flights: dict[Key, tuple[_Flight, int]] = {}
        for i, (key, text) in enumerate(zip(keys, texts, strict=True)):
            row = self._rows.get(key)
            if row is not None:
                out[i] = row
            elif self._may_join(key, len(texts)):
                flights[key] = self._flying[key]
            else:
                missing[key] = text
        own = self._take_off(served, missing, context, caller) if missing else {}
        self._count(len(texts), shared=len(flights), computed=len(missing))  # not, where there was no room
        rows, failed = await self._landed(flights | own)
        _record(own)
        borrowed = {key: text for key, text in zip(keys, texts, strict=True) if key in failed and key not in own}
        if borrowed and len(borrowed) == len(failed):  # another request's text may have been to blame
            again = self._take_off(served, borrowed, context, caller)
            more, failed = await self._landed(again)
            rows |= more
        for error in failed.values():
            raise error
        for i, key in enumerate(keys):
            if key in rows:
                out[i] = rows[key]
        return out

    def _may_join(self, key: Key, texts: int) -> bool:
        """Not a flight that is larger than the request itself, as it lands as a whole; nor one that everybody has left
        and that is still to be cleared away."""
        flight, _ = self._flying.get(key, (None, 0))
        return flight is not None and flight.texts <= texts and not flight.rows.cancelled()

    def _take_off(
        self, served: ServedModel, missing: dict[Key, TokenizedText], context: Payload, caller: Caller
    ) -> dict[Key, tuple[_Flight, int]]:
        texts = list(missing.values())
        timing = Timing()
        future = self._engine.submit(served.id, Stage.SECOND, texts, context, caller=caller, timing=timing)
        COMPUTE_TOKENS.labels(served.id).inc(
            sum(len(text.input_ids) + served.spec.context_rows for text in missing.values())
        )
        flight = _Flight(asyncio.wrap_future(future), len(texts), timing)
        placed = {key: (flight, index) for index, key in enumerate(missing)}
        if not caller.background:  # a caller who waits is not to wait behind the background
            self._flying |= placed
        flight.rows.add_done_callback(lambda rows: self._land(rows, placed))
        return placed

    def _land(self, rows: "asyncio.Future[FloatArray]", placed: dict[Key, tuple[_Flight, int]]) -> None:
        worked = not rows.cancelled() and rows.exception() is None
        for key, (flight, index) in placed.items():
            if self._flying.get(key, (None,))[0] is flight:
                del self._flying[key]
            if worked and _size(rows.result()[index]) <= self._rows.maxsize:
                self._rows[key] = rows.result()[index].copy()
        VECTOR_CACHE_BYTES.set(self._rows.currsize)

    @staticmethod
    async def _landed(
        placed: dict[Key, tuple[_Flight, int]],
    ) -> tuple[dict[Key, FloatArray], dict[Key, ServiceError]]:
        """Waits for all flights: rows, and errors. Work that nobody waits for any more is dropped."""
        flights = {flight for flight, _ in placed.values()}
        for flight in flights:
            flight.waiting += 1
        try:
            for flight in flights:
                with suppress(ServiceError):
                    await asyncio.shield(flight.rows)
        finally:
            for flight in flights:
                flight.waiting -= 1
                if flight.waiting == 0:
                    flight.rows.cancel()  # nothing, where it has landed
        rows, failed = {}, {}
        for key, (flight, index) in placed.items():
            error = flight.rows.exception()
            if isinstance(error, ServiceError):
                failed[key] = error
            else:
                rows[key] = flight.rows.result()[index]
        return rows, failed

    @staticmethod
    def _count(texts: int, *, shared: int, computed: int) -> None:
        VECTOR_CACHE.labels("computed").inc(computed)
        VECTOR_CACHE.labels("shared").inc(shared)
        VECTOR_CACHE.labels("hit").inc(texts - shared - computed)


def _record(own: dict[Key, tuple[_Flight, int]]) -> None:
    """Where the time of texts computed for this request went."""
    for flight in {flight for flight, _ in own.values()}:
        timing = flight.timing
        if timing.started_at is not None:
            record_engine(timing.started_at - timing.queued_at, timing.forward_seconds, texts=len(own))


def _size(row: FloatArray) -> int:
    return row.nbytes + OVERHEAD


def _keys(namespace: str, model_id: str, context_key: str, texts: Sequence[TokenizedText]) -> list[Key]:
    space = hashlib.blake2b(f"{namespace}\0{model_id}\0{context_key}\0".encode(), digest_size=16)
    keys = []
    for text in texts:
        digest = space.copy()
        digest.update(text.input_type.encode() + np.asarray(text.input_ids, dtype="<i4").tobytes())
        keys.append(digest.digest())
    return keys
