"""A request's texts as jobs, and which jobs make a batch. No threads of its own, no torch, no clock."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from app.domain import FloatArray, Lane, Payload, Stage, TokenizedText

Group = tuple[str, Stage]
"""Jobs of one model and stage; only jobs of one group share a batch."""


@dataclass(slots=True)
class Timing:
    """Of one submission, in seconds of time.monotonic(); `forward_seconds` is summed over its batches."""

    queued_at: float = 0.0
    started_at: float | None = None
    forward_seconds: float = 0.0


@dataclass(eq=False, slots=True)
class Submission:
    """The texts of one request under one context, and the future that all its jobs fill together. Thread-safe: its
    jobs may be in the batches of several workers."""

    group: Group
    lane: Lane
    client: str
    payload: Payload
    rows: FloatArray
    left: int
    timing: Timing
    future: "Future[FloatArray]" = field(default_factory=Future)
    lock: Lock = field(default_factory=Lock)
    waiting_jobs: int = 0
    """Of its jobs, how many are in the queue; kept by the queue, as is the next."""
    waiting_tokens: int = 0
    dropped: bool = False
    """Its jobs in the queue are dead: nobody waits for them."""

    def fill(self, index: int, row: FloatArray) -> None:
        """The vector (hidden_size,) of text `index`; the last one to come completes the future."""
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

    def ran(self, seconds: float) -> None:
        """One of its batches did, for so long."""
        with self.lock:
            self.timing.forward_seconds += seconds


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One text of a submission. `cost`: tokens as computed, context rows counted."""

    submission: Submission
    index: int
    text: TokenizedText
    cost: int


def submission_jobs(
    group: Group,
    texts: Sequence[TokenizedText],
    payload: Payload,
    *,
    hidden_size: int,
    context_rows: int,
    lane: Lane = Lane.INTERACTIVE,
    client: str = "",
    timing: Timing | None = None,
) -> list[Job]:
    """The jobs of one request; `context_rows` are added to each text's cost in the second stage."""
    rows = np.empty((len(texts), hidden_size), np.float32)
    submission = Submission(group, lane, client, payload, rows, len(texts), timing or Timing())
    extra = context_rows if group[1] is Stage.SECOND else 0
    return [Job(submission, i, text, len(text.input_ids) + extra) for i, text in enumerate(texts)]


def packed(jobs: Sequence[Job], budget: int) -> list[Job]:
    """The first job, and those of the others nearest to it in length, while the padded batch (longest x rows) fits
    `budget`. The first one always runs, however long it is."""
    return joined(jobs[:1], jobs[1:], budget)


def joined(
    batch: Sequence[Job], others: Sequence[Job], budget: int, fits: Callable[[Job], bool] = lambda _: True
) -> list[Job]:
    """`batch` and those of `others` that fit beside it, nearest in length to its first job first, up to the first one
    that is too much, or that `fits` refuses."""
    head, longest, batch = batch[0], max(job.cost for job in batch), list(batch)
    for job in sorted(others, key=lambda job: abs(job.cost - head.cost)):
        if max(longest, job.cost) * (len(batch) + 1) > budget or not fits(job):
            break
        batch.append(job)
        longest = max(longest, job.cost)
    return batch
