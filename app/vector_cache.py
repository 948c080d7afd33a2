"""Vectors that were computed before are not computed again, nor ones that are being computed.

Contexts are immutable, so model, context, input type and token ids decide a vector: a cache of it is never wrong. Rows
are kept raw, before `dimensions` and normalisation, so that all answers share them; but no namespace's answers share
another's, as the time that an answer takes would tell who has embedded what.
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
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
    """Texts on the device together. `places`: each one's row among `rows` (n, hidden_size). `waiting`: requests that
    wait for them."""

    rows: "asyncio.Future[FloatArray]"
    places: Mapping[Key, int]
    timing: Timing
    waiting: int = 0


class VectorCache:
    """Second stages through a byte-bounded cache, and equal texts in flight computed once, unless a small request
    would have to wait for a large one. For one event loop."""

    def __init__(self, engine: Engine, *, max_bytes: int) -> None:
        """`max_bytes` 0: nothing is kept; texts in flight are still shared."""
        self._engine = engine
        self._rows: LRUCache[Key, FloatArray] = LRUCache(max_bytes, getsizeof=_size)
        self._flying: dict[Key, _Flight] = {}

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
        flights: dict[Key, _Flight] = {}
        for i, (key, text) in enumerate(zip(keys, texts, strict=True)):
            row = self._rows.get(key)
            if row is not None:
                out[i] = row
            elif self._may_join(key, len(texts)):
                flights[key] = self._flying[key]
            else:
                missing[key] = text
        own = self._take_off(served, missing, context, caller) if missing else None
        _count(len(texts), shared=len(flights), computed=len(missing))  # not where the engine had no room
        if own is not None:
            flights |= dict.fromkeys(missing, own)
        rows, failed = await _landed(flights)
        if own is not None:
            _record(own)
        borrowed = {key: text for key, text in zip(keys, texts, strict=True) if key in failed and key not in missing}
        if borrowed and len(borrowed) == len(failed):  # another request's text may have been to blame
            again = self._take_off(served, borrowed, context, caller)
            more, failed = await _landed(dict.fromkeys(borrowed, again))
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
        flight = self._flying.get(key)
        return flight is not None and len(flight.places) <= texts and not flight.rows.cancelled()

    def _take_off(
        self, served: ServedModel, missing: Mapping[Key, TokenizedText], context: Payload, caller: Caller
    ) -> _Flight:
        """Sends texts to the engine. Raises what Engine.submit raises."""
        texts, timing = list(missing.values()), Timing()
        future = self._engine.submit(served.id, Stage.SECOND, texts, context, caller=caller, timing=timing)
        COMPUTE_TOKENS.labels(served.id).inc(sum(len(text.input_ids) + served.spec.context_rows for text in texts))
        flight = _Flight(asyncio.wrap_future(future), {key: place for place, key in enumerate(missing)}, timing)
        if not caller.background:  # a caller who waits is not to wait behind the background
            self._flying |= dict.fromkeys(missing, flight)
        flight.rows.add_done_callback(lambda _: self._land(flight))
        return flight

    def _land(self, flight: _Flight) -> None:
        """It is done: its rows are kept, if there are any, and nobody joins it any more."""
        worked = not flight.rows.cancelled() and flight.rows.exception() is None
        for key, place in flight.places.items():
            if self._flying.get(key) is flight:
                del self._flying[key]
            if worked and _size(flight.rows.result()[place]) <= self._rows.maxsize:
                self._rows[key] = flight.rows.result()[place].copy()
        VECTOR_CACHE_BYTES.set(self._rows.currsize)


async def _landed(flights: Mapping[Key, _Flight]) -> tuple[dict[Key, FloatArray], dict[Key, ServiceError]]:
    """Waits for all flights: rows, and errors. Work that nobody waits for any more is dropped."""
    awaited = set(flights.values())
    for flight in awaited:
        flight.waiting += 1
    try:
        for flight in awaited:
            with suppress(ServiceError):
                await asyncio.shield(flight.rows)
    finally:
        for flight in awaited:
            flight.waiting -= 1
            if flight.waiting == 0:
                flight.rows.cancel()  # nothing, where it has landed
    rows, failed = {}, {}
    for key, flight in flights.items():
        error = flight.rows.exception()
        if isinstance(error, ServiceError):
            failed[key] = error
        else:
            rows[key] = flight.rows.result()[flight.places[key]]
    return rows, failed


def _count(texts: int, *, shared: int, computed: int) -> None:
    VECTOR_CACHE.labels("computed").inc(computed)
    VECTOR_CACHE.labels("shared").inc(shared)
    VECTOR_CACHE.labels("hit").inc(texts - shared - computed)


def _record(own: _Flight) -> None:
    """Where the time of texts computed for this request went."""
    timing = own.timing
    if timing.started_at is not None:
        record_engine(timing.started_at - timing.queued_at, timing.forward_seconds, texts=len(own.places))


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
