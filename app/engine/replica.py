"""One device: its models, the contexts on it, how large a batch it is known to take, and what happens to a batch that
fails. Several workers may share one.

A batch that raises is halved until the jobs that fail alone are found, and the others are answered. One that is out of
memory empties the caches first, and later batches are smaller until it has gone well for a while. A vector that is
not finite is computed once more, alone, and then in float32.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from cachetools import LRUCache

from app.domain import FloatArray, Payload, Stage
from app.engine import metrics
from app.engine.batching import Job
from app.engine.faults import device_fault, failure
from app.errors import NonFiniteEmbedding
from app.models.base import DeviceContext, TwoStageModel
from app.models.device import fetch, is_out_of_memory

log = logging.getLogger(__name__)

GROW_AFTER = 100
"""Batches that went well before a lowered budget grows by GROWTH."""
GROWTH = 1.25
EXACT_SECONDS = 60.0
"""At most so often is a model loaded in float32 for the sake of one vector."""

Exact = Callable[[str, str], TwoStageModel]
"""A model's id and a device -> the same model there in float32, loaded now."""


class _Contexts(LRUCache[tuple[str, str], DeviceContext]):
    """By model and content, bounded in bytes."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, getsizeof=lambda c: sum(t.nbytes for t in c.values()) + 1)

    def popitem(self) -> tuple[tuple[str, str], DeviceContext]:
        metrics.CONTEXT_EVICTIONS.inc()
        return super().popitem()


class Replica:
    """Thread-safe."""

    def __init__(
        self,
        models: Mapping[str, TwoStageModel],
        *,
        batch_tokens: int,
        cache_bytes: int,
        exact: Exact | None = None,
    ) -> None:
        """`exact`: absent, a vector that is not finite is computed again by the model itself."""
        self._models = models
        self._exact = exact
        self._exact_at = -EXACT_SECONDS
        self._contexts = _Contexts(cache_bytes)
        self._lock = threading.Lock()
        self._most_tokens = batch_tokens
        self._batch_tokens = batch_tokens
        self._good = 0
        self.device = next(iter(models.values())).spec.device if models else "cpu"
        # A GPU is given one forward after the other: mixed, both would be done as late as the later one. While one
        # worker waits for its vectors, another prepares its forward and launches it behind.
        self._launching = nullcontext() if self.device == "cpu" else threading.Lock()
        self.last_failed = False
        metrics.BUDGET.labels(self.device).set(batch_tokens)
        metrics.CONTEXT_BYTES.labels(self.device).set(0)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one batch, padded, that are known to fit."""
        return self._batch_tokens

    def run(self, batch: Sequence[Job], release: Callable[[Sequence[Job]], None], *, again: bool = True) -> None:
        """Answers every job. `release`: called with jobs just before they are answered. `again`: a text for which there
        is no memory is tried a second time, when room was made. Raises DeviceFailed."""
        try:
            vectors = self._forward(batch)
            if len(vectors) != len(batch):
                raise RuntimeError(f"{len(vectors)} vectors for {len(batch)} texts")
        except Exception as error:
            if (fault := device_fault(error)) is not None:
                raise fault from error
            out_of_memory = is_out_of_memory(error)
            failed = failure(error) if len(batch) == 1 else None
        else:
            self.last_failed = False
            self._went_well()
            self._answer(batch, vectors, release)
            return
        # Not while the error is handled: its traceback holds the failed forward's frames, and they its tensors.
        metrics.FAILED.labels("oom" if out_of_memory else "error").inc()
        if out_of_memory:
            self._make_room(batch)
        if failed is None:
            metrics.OOM_SPLITS.inc(out_of_memory)
            half = len(batch) // 2
            self.run(batch[:half], release)
            self.run(batch[half:], release)
        elif out_of_memory and again:
            self.run(batch, release, again=False)
        else:
            self.last_failed = True
            release(batch)
            batch[0].submission.fail(failed)

    def _forward(self, batch: Sequence[Job]) -> FloatArray:
        model_id, stage = batch[0].submission.group
        model = self._models[model_id]
        started = time.monotonic()
        vectors = self._stage(model, stage, batch, self._contexts_of(model_id, batch))
        seconds = time.monotonic() - started
        for submission in {id(job.submission): job.submission for job in batch}.values():
            submission.ran(seconds)
        tokens = sum(job.cost for job in batch)
        metrics.BATCH_ROWS.labels(stage).observe(len(batch))
        metrics.BATCH_TOKENS.labels(stage).observe(tokens)
        metrics.FORWARDS.labels(stage).inc()
        metrics.FORWARD_SECONDS.labels(stage).observe(seconds)
        if model.spec.pads:
            metrics.PADDING.labels(stage).inc(max(job.cost for job in batch) * len(batch) - tokens)
        return vectors

    def _stage(
        self, model: TwoStageModel, stage: Stage, batch: Sequence[Job], contexts: Sequence[DeviceContext]
    ) -> FloatArray:
        texts = [job.text for job in batch]
        run = model.first_stage if stage is Stage.FIRST else model.second_stage
        with self._launching:
            vectors = fetch(run(texts, contexts))
        return np.asarray(vectors(), dtype=np.float32)

    def _contexts_of(self, model_id: str, batch: Sequence[Job]) -> list[DeviceContext]:
        """One a job; each of them looked up, or loaded, once."""
        payloads = {job.submission.payload.key: job.submission.payload for job in batch}
        found = {key: self._context(model_id, payload) for key, payload in payloads.items()}
        return [found[job.submission.payload.key] for job in batch]

    def _context(self, model_id: str, payload: Payload) -> DeviceContext:
        key = (model_id, payload.key)
        with self._lock:
            context = self._contexts.get(key)
        if context is None:
            with self._launching:
                context = self._models[model_id].load_context(payload.arrays)
            with self._lock:
                if self._contexts.getsizeof(context) <= self._contexts.maxsize:
                    self._contexts[key] = context
                metrics.CONTEXT_BYTES.labels(self.device).set(self._contexts.currsize)
        return context

    def _answer(self, batch: Sequence[Job], vectors: FloatArray, release: Callable[[Sequence[Job]], None]) -> None:
        """Finite vectors first: another try at the others may take as long as loading a model."""
        wanted = [not job.submission.future.cancelled() for job in batch]
        metrics.CANCELLED.labels("running").inc(wanted.count(False))
        doubtful = [i for i, row in enumerate(vectors) if wanted[i] and not np.isfinite(row).all()]
        release([job for i, job in enumerate(batch) if i not in doubtful])
        for i, job in enumerate(batch):
            if wanted[i] and i not in doubtful:
                job.submission.fill(job.index, vectors[i])
        for job in (batch[i] for i in doubtful):
            metrics.FAILED.labels("non_finite").inc()
            self._recompute(job, release)

    def _recompute(self, job: Job, release: Callable[[Sequence[Job]], None]) -> None:
        try:
            row = self._alone(job)
        except Exception as error:
            log.error("a vector that is not finite could not be computed again", exc_info=error)
            row = None
        release([job])
        if row is not None and np.isfinite(row).all():
            metrics.NON_FINITE.labels("recomputed").inc()
            job.submission.fill(job.index, row)
            return
        metrics.NON_FINITE.labels("failed").inc()
        job.submission.fail(NonFiniteEmbedding("The model gave a vector with NaN or infinite values for this input."))

    def _alone(self, job: Job) -> FloatArray | None:
        """As it was, and if that does not help in float32; None where that was tried just now, or is being tried."""
        model_id, stage = job.submission.group
        model = self._models[model_id]
        row: FloatArray = self._stage(model, stage, [job], self._contexts_of(model_id, [job]))[0]
        if self._exact is None or model.spec.dtype == "float32" or np.isfinite(row).all():
            return row
        with self._lock:
            if time.monotonic() - self._exact_at < EXACT_SECONDS:
                return None
            self._exact_at = time.monotonic()
        exact = self._exact(model_id, model.spec.device)
        row = self._stage(exact, stage, [job], [exact.load_context(job.submission.payload.arrays)])[0]
        return row

    def _make_room(self, batch: Sequence[Job]) -> None:
        """Caches emptied, and later batches at most half as large as this one."""
        tokens, longest = sum(job.cost for job in batch), max(job.cost for job in batch)
        with self._lock:
            self._contexts.clear()
            metrics.CONTEXT_BYTES.labels(self.device).set(0)
            self._good = 0
            self._batch_tokens = min(self._batch_tokens, max(tokens // 2, longest))
        metrics.BUDGET.labels(self.device).set(self._batch_tokens)
        log.warning("%s is out of memory at %d tokens; batches are now of %d", self.device, tokens, self._batch_tokens)
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _went_well(self) -> None:
        if self._batch_tokens == self._most_tokens:
            return
        with self._lock:
            self._good += 1
            if self._good >= GROW_AFTER:
                self._good = 0
                self._batch_tokens = min(self._most_tokens, int(self._batch_tokens * GROWTH) + 1)
        metrics.BUDGET.labels(self.device).set(self._batch_tokens)
