"""The device's owners: threads that run both stages of all models, batch after batch; everybody else sends them jobs.

On a GPU two: one prepares a batch while another's is computed. On a CPU one per core, each computing with one thread
and all sharing the weights: that scales, where several threads in one forward would wait for each other. A further
thread watches over them.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from app.domain import ANYBODY, Caller, FloatArray, Lane, Payload, Stage, TokenizedText
from app.engine import metrics
from app.engine.admission import Admission
from app.engine.batching import Job, Submission, Timing, submission_jobs
from app.engine.replica import Exact, Replica
from app.engine.scheduling import WaitingJobs
from app.engine.workers import Crew, Problem, Worker
from app.errors import DeadlineExceeded, EngineUnavailable, QueueFull, ShuttingDown
from app.models.base import TwoStageModel


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """`batch_tokens`: of one batch, padded, as computed. `queue_tokens`: that wait. `queue_seconds`: that a request may
    be expected to wait for its turn, 0: any. `cache_bytes`: of contexts on each device. `workers`: threads, which
    take the devices in turn, at least one a device; more than one on a CPU compute with one thread each.
    `interactive_texts`: a request of up to so many goes before larger ones. `stuck_seconds`: that one forward may
    take, 0: any. `ride`: spare room of a batch is filled from slower lanes."""

    batch_tokens: int
    queue_tokens: int
    cache_bytes: int
    workers: int = 1
    interactive_texts: int = 8
    queue_seconds: float = 0.0
    stuck_seconds: float = 0.0
    ride: bool = False


class Engine:
    """Bounded queue, device threads, futures. Thread-safe."""

    def __init__(
        self,
        replicas: Sequence[Mapping[str, TwoStageModel]],
        options: EngineOptions,
        *,
        exact: Exact | None = None,
        on_fatal: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        """`replicas`: the models once a device. `exact`: see Replica. `on_fatal`: told, in any thread, when workers
        cannot be kept alive, the device is lost or a forward is stuck: the process is to end."""
        self._models = replicas[0]
        self._options = options
        self._changed = threading.Condition()
        self._waiting = WaitingJobs(ride=options.ride, late_seconds=options.queue_seconds or math.inf)
        devices = [
            Replica(models, batch_tokens=options.batch_tokens, cache_bytes=options.cache_bytes, exact=exact)
            for models in replicas
        ]
        self._stopping = False
        self._crew = Crew(self, devices, max(options.workers, len(devices)), options.stuck_seconds, on_fatal)
        self._admission = Admission(
            self._waiting,
            queue_tokens=options.queue_tokens,
            queue_seconds=options.queue_seconds,
            workers=len(self._crew.workers),
        )

    def start(self) -> None:
        self._crew.start()

    @property
    def problem(self) -> Problem | None:
        """Why the next batch may not be answered, if there is a reason."""
        return self._crew.problem

    @property
    def queued_tokens(self) -> int:
        """Tokens as computed, waiting or running, that somebody waits for."""
        return self._waiting.tokens(Lane.INTERACTIVE, Lane.BULK) + self._admission.running_tokens

    def submit(
        self,
        model_id: str,
        stage: Stage,
        texts: Sequence[TokenizedText],
        payload: Payload,
        *,
        caller: Caller = ANYBODY,
        timing: Timing | None = None,
    ) -> "Future[FloatArray]":
        """Embeds texts (n) under one context: a future of (n, hidden_size) float32, not normalised.

        Room for all texts is taken at once. A future that is cancelled gives it back at once. `timing`: filled in as
        the texts run. The future fails with NonFiniteEmbedding, ServerFault, EngineUnavailable or ShuttingDown.
        Raises TooManyTokens, QueueFull, DeadlineExceeded, ShuttingDown, EngineUnavailable.
        """
        spec = self._models[model_id].spec
        jobs = submission_jobs(
            (model_id, stage),
            texts,
            payload,
            hidden_size=spec.hidden_size,
            context_rows=spec.context_rows,
            lane=self._lane(len(texts), caller),
            client=caller.client,
            timing=timing,
        )
        submission = jobs[0].submission
        with self._changed:
            try:
                self._check(submission.lane, [job.cost for job in jobs], caller)
            except (QueueFull, DeadlineExceeded, ShuttingDown, EngineUnavailable) as error:
                if not (stage is Stage.FIRST and isinstance(error, QueueFull)):  # whoever builds waits for room
                    metrics.REFUSED.labels(_REASONS[type(error)]).inc()
                raise
            submission.timing.queued_at = time.monotonic()
            self._waiting.add(jobs)
            self.show()
            self._changed.notify_all()
        submission.future.add_done_callback(lambda _: self._forget(submission))
        return submission.future

    def stop(self, timeout: float) -> None:
        """Refuses new work, answers what was admitted for up to `timeout` seconds, fails the rest."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._crew.join(timeout)
        self.fail_waiting(ShuttingDown("The server is shutting down. Send the request again."))

    @property
    def is_running(self) -> bool:
        """Whether a worker's thread is left: behind `stop`, in a forward that does not return."""
        return self._crew.is_running

    def next_batch(self, worker: Worker) -> list[Job]:
        """For a worker: waits for a batch; empty when stopping and nothing is left."""
        with self._changed:
            while True:
                now = time.monotonic()
                batch = self._waiting.next_batch(worker.replica.batch_tokens, now)
                if batch or self._stopping:
                    self._admission.took(batch)
                    worker.took(batch, now)
                    for job in batch:
                        if job.submission.timing.started_at is None:
                            metrics.WAITED[job.submission.lane].observe(now - job.submission.timing.queued_at)
                            job.submission.timing.started_at = now
                    self.show()
                    return batch
                self._changed.wait()

    def release(self, jobs: Sequence[Job]) -> None:
        """For a worker, before it answers jobs: whoever has an answer finds the room it took free again."""
        with self._changed:
            self._admission.running_tokens -= sum(job.cost for job in jobs)
            self.show()

    def measure(self, tokens: int, seconds: float) -> None:
        """For a worker: a batch took so long."""
        with self._changed:
            self._admission.measure(tokens, seconds)

    def fail_waiting(self, error: Exception) -> None:
        """Fails everything in the queue."""
        with self._changed:
            left = self._waiting.drain()
            self.show()
        for job in left:
            job.submission.fail(error)

    def show(self) -> None:
        """Sets the queue's gauges."""
        with self._changed:
            metrics.show_queue(self._waiting, self._admission.running_tokens, time.monotonic())

    def _lane(self, texts: int, caller: Caller) -> Lane:
        if caller.background:
            return Lane.BACKGROUND
        return Lane.INTERACTIVE if texts <= self._options.interactive_texts else Lane.BULK

    def _check(self, lane: Lane, costs: list[int], caller: Caller) -> None:
        if self._stopping:
            raise ShuttingDown("The server is shutting down. Send the request again to another replica.")
        if not self._crew.is_alive:
            raise EngineUnavailable("The device worker is not running. The server's log says why.")
        self._admission.check(lane, costs, caller, time.monotonic())

    def _forget(self, submission: Submission) -> None:
        """Its future is done: by an answer, by a fault of one of its texts, or because nobody waits any more."""
        if submission.waiting_jobs == 0:
            return
        with self._changed:
            gone = self._waiting.forget(submission)
            self.show()
        if submission.future.cancelled():
            metrics.CANCELLED.labels("queued").inc(gone)


_REASONS = {
    QueueFull: "full",
    DeadlineExceeded: "deadline",
    ShuttingDown: "shutting_down",
    EngineUnavailable: "unavailable",
}
