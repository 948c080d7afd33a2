"""Waiting jobs -> the next batch, by tokens as computed. No threads of its own, no torch, no clock."""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from threading import Lock

import numpy as np

from app.domain import FloatArray, Payload, Stage, TokenizedText

Lane = tuple[str, Stage]
"""Jobs of one model and stage; only jobs of one lane share a batch."""

LOOK_AHEAD = 256
BACKGROUND_EVERY = 8
"""Foreground batches after which one of the background goes, so that it never stands still."""


@dataclass(eq=False, slots=True)
class Submission:
    """The texts of one request under one context, and the future that all its jobs fill together. Thread-safe: its
    jobs may be in the batches of several workers."""

    lane: Lane
    payload: Payload
    rows: FloatArray
    left: int
    background: bool = False
    future: "Future[FloatArray]" = field(default_factory=Future)
    lock: Lock = field(default_factory=Lock)

    def fill(self, index: int, row: FloatArray) -> None:
        self.rows[index] = row
        with self.lock:
            self.left -= 1
            complete = self.left == 0
        if complete:
            with suppress(InvalidStateError):  # failed by another job, or the caller has gone
                self.future.set_result(self.rows)

    def fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One text of a submission. `cost`: tokens as computed, context rows counted."""

    submission: Submission
    index: int
    text: TokenizedText
    cost: int


_Tagged = tuple[int, int, Job]
"""Tag, arrival, job: the order of a lane's heap."""


def submission_jobs(
    lane: Lane,
    texts: Sequence[TokenizedText],
    payload: Payload,
    *,
    hidden_size: int,
    context_rows: int,
    background: bool = False,
) -> list[Job]:
    """The jobs of one request; `context_rows` are added to each text's cost in the second stage."""
    submission = Submission(lane, payload, np.empty((len(texts), hidden_size), np.float32), len(texts), background)
    extra = context_rows if lane[1] is Stage.SECOND else 0
    return [Job(submission, i, text, len(text.input_ids) + extra) for i, text in enumerate(texts)]


class WaitingJobs:
    """The queue: what callers wait for, and behind it the background, which goes when nothing else waits, and after
    every BACKGROUND_EVERY other batches."""

    def __init__(self) -> None:
        self.foreground, self.background = Lanes(), Lanes()
        self._since_background = 0

    def add(self, jobs: Sequence[Job]) -> None:
        """The jobs of one request."""
        if jobs:
            (self.background if jobs[0].submission.background else self.foreground).add(jobs)

    def next_batch(self, budget: int) -> list[Job]:
        """See Lanes.next_batch."""
        first, second = self.foreground, self.background
        if self._since_background >= BACKGROUND_EVERY:
            first, second = second, first
        for lanes in (first, second):
            batch = lanes.next_batch(budget)
            if batch:
                self._since_background = 0 if lanes is self.background else self._since_background + 1
                return batch
        return []

    def drain(self) -> list[Job]:
        """Everything that waits, taken out."""
        return self.foreground.drain() + self.background.drain()

    def __len__(self) -> int:
        return len(self.foreground) + len(self.background)


class Lanes:
    """Jobs by lane. Lanes take turns, so that a context being built never holds up queries for more than one batch.

    Within a lane requests share by start-time fair queueing (Goyal et al., 1996): a job's tag is the lane's virtual
    time when its request came plus the cost of the jobs before it in that request; the lowest tag goes first. So a
    single query passes while thousands of texts of one request wait, and equally large requests run side by side.
    """

    def __init__(self) -> None:
        self._lanes: OrderedDict[Lane, list[_Tagged]] = OrderedDict()
        self._virtual: dict[Lane, int] = {}
        self._arrivals = count()
        self.tokens = 0

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def add(self, jobs: Sequence[Job]) -> None:
        """The jobs of one request."""
        if not jobs:
            return
        lane = jobs[0].submission.lane
        waiting, tag = self._lanes.setdefault(lane, []), self._virtual.get(lane, 0)
        for job in jobs:
            heappush(waiting, (tag, next(self._arrivals), job))
            tag += job.cost
            self.tokens += job.cost

    def next_batch(self, budget: int) -> list[Job]:
        """The lane's first job, and those of the following ones nearest to it in length, while the padded batch
        (longest x rows) fits `budget`. Jobs whose caller has gone are dropped. Empty when nothing waits."""
        while self._lanes:
            lane, waiting = next(iter(self._lanes.items()))
            ahead = [heappop(waiting) for _ in range(min(LOOK_AHEAD, len(waiting)))]
            live = [entry for entry in ahead if not entry[2].submission.future.done()]
            batch = _packed([job for _, _, job in live], budget)
            taken = set(map(id, batch))
            for entry in live:
                if id(entry[2]) not in taken:
                    heappush(waiting, entry)
                    self.tokens += entry[2].cost
            self.tokens -= sum(job.cost for _, _, job in ahead)
            self._lanes.move_to_end(lane)
            if not waiting:
                del self._lanes[lane]
            if batch:
                self._virtual[lane] = live[0][0]
                return batch
        return []

    def drain(self) -> list[Job]:
        """Everything that waits, taken out."""
        jobs = [job for waiting in self._lanes.values() for _, _, job in waiting]
        self._lanes.clear()
        self.tokens = 0
        return jobs


def _packed(jobs: Sequence[Job], budget: int) -> list[Job]:
    if not jobs:
        return []
    head = jobs[0]
    batch, longest = [head], head.cost
    for job in sorted(jobs[1:], key=lambda job: abs(job.cost - head.cost)):
        if max(longest, job.cost) * (len(batch) + 1) > budget:
            break
        batch.append(job)
        longest = max(longest, job.cost)
    return batch
