"""The threads that run batches, and the one that watches over them.

A worker that dies fails the batch it had, with an error that says to try again, and is started anew; one that dies too
often, a device that is lost, and a forward that never returns, are for whoever runs the process.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol

import torch

from app.engine import metrics
from app.engine.batching import Job
from app.engine.faults import DeviceLost
from app.engine.replica import Replica
from app.errors import EngineUnavailable

log = logging.getLogger(__name__)

RESTARTS, RESTART_SECONDS = 3, 600.0
"""Up to so many deaths in so many seconds, workers are started again; one more ends the process."""
TICK_SECONDS = 0.5
STOPPED = "The device worker stopped while it computed this. Please send the request again."
STUCK = "The device has not answered for too long. Please send the request again."


class Problem(StrEnum):
    """Why the next batch may not be answered."""

    DOWN = "a device worker is down"
    STUCK = "a forward does not return"
    LAST_BATCH = "the last batch failed"


class Desk(Protocol):
    """What workers need of the engine."""

    def next_batch(self, worker: "Worker") -> list[Job]: ...

    def release(self, jobs: Sequence[Job]) -> None: ...

    def measure(self, tokens: int, seconds: float) -> None: ...

    def fail_waiting(self, error: Exception) -> None: ...

    def show(self) -> None: ...


class Worker:
    """A device thread, which is replaced when it dies, and the jobs it has and has not answered."""

    def __init__(self, number: int, replica: Replica) -> None:
        self.number = number
        self.replica = replica
        self.thread: threading.Thread | None = None
        self.lost = False
        """Dead, and not started again."""
        self.stuck = False
        self.since = 0.0
        """When it took its last batch, time.monotonic()."""
        self._held: dict[int, Job] = {}
        self._lock = threading.Lock()

    def took(self, batch: Sequence[Job], now: float) -> None:
        with self._lock:
            self._held, self.since = {id(job): job for job in batch}, now

    def overdue(self, seconds: float, now: float) -> list[Job]:
        """Its jobs, taken from it, if it has held them for longer than `seconds`; it is stuck from then on."""
        with self._lock:
            if not self._held or now - self.since <= seconds:
                return []
            self.stuck = True
            jobs, self._held = list(self._held.values()), {}
            return jobs

    def gave_all(self) -> list[Job]:
        """Its jobs, taken from it."""
        with self._lock:
            jobs, self._held = list(self._held.values()), {}
        return jobs

    def gave(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of `jobs` that were still its own, taken from it."""
        with self._lock:
            return [job for job in jobs if self._held.pop(id(job), None) is not None]


class Crew:
    """All workers and their watchdog."""

    def __init__(
        self,
        desk: Desk,
        replicas: Sequence[Replica],
        workers: int,
        stuck_seconds: float,
        on_fatal: Callable[[Exception], None],
    ) -> None:
        """`stuck_seconds`: after them a forward counts as stuck, after twice as many as dead; 0: never."""
        self.workers = [Worker(i, replicas[i % len(replicas)]) for i in range(workers)]
        self._desk = desk
        self._stuck_seconds = stuck_seconds
        self._on_fatal = on_fatal
        self._deaths: deque[float] = deque()
        self._ended = threading.Event()
        self._fatal = threading.Event()
        for replica in replicas:
            metrics.RESTARTS.labels(replica.device)  # at 0: a first restart is seen as a change
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        for worker in self.workers:
            self._start(worker)
        self._watchdog.start()

    @property
    def is_alive(self) -> bool:
        """Whether anybody works."""
        return not all(worker.lost for worker in self.workers)

    @property
    def problem(self) -> Problem | None:
        if any(worker.lost for worker in self.workers):
            return Problem.DOWN
        if any(worker.stuck for worker in self.workers):
            return Problem.STUCK
        return Problem.LAST_BATCH if any(worker.replica.last_failed for worker in self.workers) else None

    def join(self, timeout: float) -> None:
        """Waits until all are through; the desk gives them no more work."""
        deadline = time.monotonic() + timeout
        for worker in self.workers:
            if worker.thread is not None:
                worker.thread.join(max(0.0, deadline - time.monotonic()))
        self._ended.set()

    @property
    def is_running(self) -> bool:
        """Whether a thread of theirs is left."""
        return any(worker.thread is not None and worker.thread.is_alive() for worker in self.workers)

    def _start(self, worker: Worker) -> None:
        worker.stuck = False
        worker.thread = threading.Thread(target=self._run, args=(worker,), name=f"device-{worker.number}", daemon=True)
        worker.thread.start()
        metrics.WORKERS.set(sum(not worker.lost for worker in self.workers))

    def _run(self, worker: Worker) -> None:
        try:
            if len(self.workers) > 1:
                torch.set_num_threads(1)  # OpenMP keeps this by thread
            with torch.inference_mode():
                while batch := self._desk.next_batch(worker):
                    started = time.monotonic()
                    worker.replica.run(batch, lambda jobs: self._desk.release(worker.gave(jobs)))
                    worker.stuck = False
                    self._desk.measure(sum(job.cost for job in batch), time.monotonic() - started)
        except BaseException as error:  # noqa: BLE001 - whatever ends a worker, its callers get an answer
            self._died(worker, error)

    def _died(self, worker: Worker, error: BaseException) -> None:
        log.error("device worker %d died", worker.number, exc_info=error)
        jobs, now = worker.gave_all(), time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > RESTART_SECONDS:
            self._deaths.popleft()
        if isinstance(error, DeviceLost):
            worker.lost = True
            self._give_up(f"{worker.replica.device} is lost to this process")
        elif len(self._deaths) > RESTARTS:
            worker.lost = True
            self._give_up(f"device workers died {len(self._deaths)} times, last by {type(error).__name__}")
        else:
            metrics.RESTARTS.labels(worker.replica.device).inc()
            self._restart(worker)
        self._fail(jobs, STOPPED)  # last: who hears of it finds the engine as it now is

    def _restart(self, worker: Worker) -> None:
        try:
            self._start(worker)
        except RuntimeError as error:  # the machine gives no more threads
            worker.lost, worker.thread = True, None
            self._give_up(f"a device worker cannot be started again: {error}")

    def _fail(self, jobs: Sequence[Job], message: str) -> None:
        self._desk.release(jobs)
        for job in jobs:
            job.submission.fail(EngineUnavailable(message))

    def _give_up(self, reason: str) -> None:
        metrics.WORKERS.set(sum(not worker.lost for worker in self.workers))
        if not self.is_alive:
            self._desk.fail_waiting(EngineUnavailable("The device worker is not running. The server's log says why."))
        if not self._fatal.is_set():
            self._fatal.set()
            log.critical("the process has to end: %s", reason)
            self._on_fatal(EngineUnavailable(f"The server has to end: {reason}."))

    def _watch(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            self._desk.show()
            longest = max(map(self._look_at, self.workers))
            metrics.STUCK.set(longest)

    def _look_at(self, worker: Worker) -> float:
        """Seconds of a forward that takes longer than allowed, else 0."""
        seconds = time.monotonic() - worker.since
        if worker.stuck and seconds > 2 * self._stuck_seconds:
            self._give_up(f"a forward has not returned for {seconds:.0f} s")
        if self._stuck_seconds and (jobs := worker.overdue(self._stuck_seconds, time.monotonic())):
            log.error("device worker %d: a forward has not returned for %.0f s", worker.number, seconds)
            self._fail(jobs, STUCK)
        return seconds if worker.stuck else 0.0
