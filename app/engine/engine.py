"""The device's owners: threads that run both stages of all models, batch after batch; everybody else sends them jobs.

One on a GPU. On a CPU one a core, each computing with one thread and all sharing the weights: that scales where the
threads of one forward wait for each other.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import numpy as np
import torch
from cachetools import LRUCache

from app.domain import FloatArray, Payload, Stage, TokenizedText
from app.engine.batching import Job, WaitingJobs, submission_jobs
from app.errors import EngineUnavailable, NonFiniteEmbedding, QueueFull, ServerFault, ShuttingDown
from app.models.base import DeviceContext, TwoStageModel
from app.telemetry.metrics import BATCH_ROWS, FORWARDS, QUEUE_TOKENS

log = logging.getLogger(__name__)

FIRST_GUESS = 2_000.0
"""Tokens as computed a second, before anything was measured; only Retry-After depends on it."""


class Engine:
    """Bounded queue, device threads, futures. Thread-safe."""

    def __init__(
        self,
        replicas: Sequence[Mapping[str, TwoStageModel]],
        *,
        batch_tokens: int,
        queue_tokens: int,
        cache_bytes: int,
        workers: int = 1,
    ) -> None:
        """`replicas`: the models once a device. `workers`: threads, which take the devices in turn, at least one a
        device; with more than one on a CPU each computes with one thread of its own."""
        self._replicas = replicas
        self._models = replicas[0]
        workers = max(workers, len(replicas))
        self._batch_tokens = batch_tokens
        self._queue_tokens = queue_tokens
        self._waiting = WaitingJobs()
        self._changed = threading.Condition()
        self._running_tokens = 0
        self._rate = FIRST_GUESS  # of one worker
        self._stopping = False
        self._last_batch_failed = False
        self._contexts: LRUCache[tuple[int, str, str], DeviceContext] = LRUCache(
            cache_bytes, getsizeof=lambda c: sum(t.nbytes for t in c.values()) + 1
        )
        self._contexts_lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(i % len(replicas),), name=f"device-{i}", daemon=True)
            for i in range(workers)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def healthy(self) -> bool:
        """Whether all device threads live and the last batch worked."""
        return all(thread.is_alive() for thread in self._threads) and not self._last_batch_failed

    @property
    def queued_tokens(self) -> int:
        """Tokens as computed, waiting or running, that somebody waits for."""
        return self._waiting.foreground.tokens + self._running_tokens

    def submit(
        self,
        model_id: str,
        stage: Stage,
        texts: Sequence[TokenizedText],
        payload: Payload,
        *,
        background: bool = False,
    ) -> "Future[FloatArray]":
        """Embeds texts (n) under one context: a future of (n, hidden_size) float32, not normalised.

        Room for all texts is taken at once; the background has a queue of its own. The future fails with
        NonFiniteEmbedding, ServerFault or ShuttingDown. Raises QueueFull, ShuttingDown, EngineUnavailable.
        """
        spec = self._models[model_id].spec
        jobs = submission_jobs(
            (model_id, stage),
            texts,
            payload,
            hidden_size=spec.hidden_size,
            context_rows=spec.context_rows,
            background=background,
        )
        cost = sum(job.cost for job in jobs)
        with self._changed:
            if self._stopping:
                raise ShuttingDown("The server is shutting down. Send the request again to another replica.")
            if not any(thread.is_alive() for thread in self._threads):
                raise EngineUnavailable("The device worker is not running. The server's log says why.")
            queued = self._waiting.background.tokens if background else self.queued_tokens
            # A request alone in the queue always fits: the limits on one request decide about its size.
            if queued and queued + cost > self._queue_tokens:
                raise QueueFull(
                    "The server is busy: its queue is full. Please try again after the time in Retry-After.",
                    retry_after=queued / (self._rate * len(self._threads)),
                )
            self._waiting.add(jobs)
            QUEUE_TOKENS.set(self.queued_tokens)
            self._changed.notify_all()
        return jobs[0].submission.future

    def stop(self, timeout: float) -> None:
        """Refuses new work, answers what was admitted for up to `timeout` seconds, fails the rest."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            left = self._waiting.drain()
        for job in left:
            job.submission.fail(ShuttingDown("The server is shutting down. Send the request again."))

    def _run(self, replica: int) -> None:
        if len(self._threads) > 1:
            torch.set_num_threads(1)  # OpenMP keeps this by thread
        with torch.inference_mode():
            while batch := self._next():
                started = time.perf_counter()
                self._compute(batch, replica)
                self._measure(sum(job.cost for job in batch), time.perf_counter() - started)

    def _next(self) -> list[Job]:
        """Waits for a batch; empty when stopping and nothing is left."""
        with self._changed:
            while True:
                batch = self._waiting.next_batch(self._batch_tokens)
                if batch or self._stopping:
                    self._running_tokens += _awaited(batch)
                    QUEUE_TOKENS.set(self.queued_tokens)
                    return batch
                self._changed.wait()

    def _measure(self, tokens: int, seconds: float) -> None:
        with self._changed:
            self._rate += 0.2 * (tokens / max(seconds, 1e-6) - self._rate)

    def _release(self, batch: Sequence[Job]) -> None:
        """Before anybody hears of it: who has an answer finds the room it took free."""
        with self._changed:
            self._running_tokens -= _awaited(batch)
            QUEUE_TOKENS.set(self.queued_tokens)

    def _compute(self, batch: Sequence[Job], replica: int) -> None:
        """Runs a batch; one that fails is halved until the jobs that fail alone are found, the others are answered."""
        try:
            vectors = self._forward(batch, replica)
            if len(vectors) != len(batch):
                raise RuntimeError(f"{len(vectors)} vectors for {len(batch)} texts")
        except Exception as error:  # noqa: BLE001 - the thread outlives whatever a forward raises
            if len(batch) > 1:
                half = len(batch) // 2
                self._compute(batch[:half], replica)
                self._compute(batch[half:], replica)
                return
            self._last_batch_failed = True
            self._release(batch)
            fault = ServerFault("The model failed on this input.")
            fault.__cause__ = error
            batch[0].submission.fail(fault)
        else:
            self._last_batch_failed = False
            self._release(batch)
            self._answer(batch, vectors)

    def _forward(self, batch: Sequence[Job], replica: int) -> FloatArray:
        model_id, stage = batch[0].submission.lane
        model = self._replicas[replica][model_id]
        texts = [job.text for job in batch]
        contexts = [self._context(replica, model_id, job.submission.payload) for job in batch]
        if stage is Stage.FIRST:
            vectors = model.first_stage(texts, contexts)
        else:
            vectors = model.second_stage(texts, contexts)
        BATCH_ROWS.labels(stage).observe(len(batch))
        FORWARDS.labels(stage).inc()
        return np.asarray(vectors.cpu().numpy(), dtype=np.float32)

    def _context(self, replica: int, model_id: str, payload: Payload) -> DeviceContext:
        key = (replica, model_id, payload.key)
        with self._contexts_lock:
            context = self._contexts.get(key)
        if context is None:
            context = self._replicas[replica][model_id].load_context(payload.arrays)
            with self._contexts_lock:
                if self._contexts.getsizeof(context) <= self._contexts.maxsize:
                    self._contexts[key] = context
        return context

    @staticmethod
    def _answer(batch: Sequence[Job], vectors: FloatArray) -> None:
        for job, row in zip(batch, vectors, strict=True):
            if np.isfinite(row).all():
                job.submission.fill(job.index, row)
            else:
                job.submission.fail(NonFiniteEmbedding("The model gave a vector with NaN or infinite values."))


def _awaited(batch: Sequence[Job]) -> int:
    """Tokens that count in the queue."""
    return sum(job.cost for job in batch if not job.submission.background)
