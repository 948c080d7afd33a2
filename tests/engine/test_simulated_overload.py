"""Overload on a simulated clock: the real queue and admission, arrivals and a device that are numbers.

`python -m tests.load overload` is the same on a real server.
"""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

import pytest

from app.domain import Caller, Lane, Stage
from app.engine.admission import Admission
from app.engine.batching import Job, submission_jobs
from app.engine.scheduling import WaitingJobs
from app.errors import QueueFull
from tests.engine.stub import context, text

QUEUE_SECONDS, FEW, SIZES = 5.0, 8, (1, 1, 2, 3, 4, 8, 16, 32)
WORKERS, RATE, BUDGET = 2, 3800, 1100
"""Tokens a second of a worker, and of a batch."""
TEXT = (6, 194)


@dataclass
class Overload:
    """`shares`: how much each client asks for, of `factor` times what the device can compute."""

    shares: dict[str, int]
    factor: float
    seconds: float = 60.0
    sizes: tuple[int, ...] = SIZES
    seed: int = 0
    queue_tokens: int = 10**9
    queue_seconds: float = QUEUE_SECONDS
    rate: float = RATE
    turns: dict[Lane, float] = field(default_factory=lambda: defaultdict(float))
    """The longest that a request waited for its first text to run."""
    ends: dict[Lane, float] = field(default_factory=lambda: defaultdict(float))
    """For its last."""
    asked: Counter[str] = field(default_factory=Counter)
    computed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._waiting = WaitingJobs(late_seconds=self.queue_seconds)
        self._admission = Admission(
            self._waiting, queue_tokens=self.queue_tokens, queue_seconds=self.queue_seconds, workers=WORKERS
        )
        self._free = WORKERS

    def run(self) -> "Overload":
        mean = sum(TEXT) / 2 * sum(self.sizes) / len(self.sizes)
        events: list[tuple[float, int, list[Job]]] = []
        numbers, now = count(), 0.0
        while now < self.seconds:
            now += self._chance.expovariate(self.factor * WORKERS * self.rate / mean)
            heappush(events, (now, next(numbers), []))
        while events:
            now, _, batch = heappop(events)
            if batch:
                self._free += 1
                self._admission.running_tokens -= sum(job.cost for job in batch)
            else:
                self._arrive(now)
            while self._free and (batch := self._waiting.next_batch(BUDGET, now)):
                heappush(events, (now + self._start(batch, now), next(numbers), batch))
        return self

    def part(self, client: str) -> float:
        return self.computed[client] / self.asked[client]

    def _arrive(self, now: float) -> None:
        [client] = self._chance.choices(list(self.shares), list(self.shares.values()))
        texts = [text(*range(self._chance.randint(*TEXT))) for _ in range(self._chance.choice(self.sizes))]
        lane = Lane.INTERACTIVE if len(texts) <= FEW else Lane.BULK
        jobs = submission_jobs(
            ("m", Stage.SECOND), texts, context(1.0), hidden_size=1, context_rows=0, lane=lane, client=client
        )
        self.asked[client] += len(jobs)
        try:
            self._admission.check(lane, [job.cost for job in jobs], Caller(client), now)
        except QueueFull:
            return
        jobs[0].submission.timing.queued_at = now
        self._waiting.add(jobs)
        self.computed[client] += len(jobs)  # for nothing admitted is lost

    def _start(self, batch: list[Job], now: float) -> float:
        """Seconds that it takes."""
        self._free -= 1
        self._admission.took(batch)
        for job in batch:
            submission = job.submission
            waited = now - submission.timing.queued_at
            self.ends[submission.lane] = max(self.ends[submission.lane], waited)
            if submission.timing.started_at is None:
                submission.timing.started_at = now
                self.turns[submission.lane] = max(self.turns[submission.lane], waited)
        tokens = sum(job.cost for job in batch)
        seconds = tokens / self.rate * self._chance.uniform(0.8, 1.2)
        self._admission.measure(tokens, seconds)
        return seconds


UNEQUAL = {"a": 4, "b": 1, "c": 1}


@pytest.mark.parametrize(
    ("shares", "factor", "rate"),
    [
        (UNEQUAL, 2, RATE),
        (UNEQUAL, 4, RATE),
        (UNEQUAL, 8, RATE),
        (UNEQUAL, 4, RATE / 2),
        ({"a": 1}, 4, RATE),
        ({str(i): 1 for i in range(20)}, 4, RATE),
    ],
    ids=["2x", "4x", "8x", "4x of half as much", "one client", "twenty clients"],
)
def test_nobody_waits_long_for_a_turn(shares: dict[str, int], factor: float, rate: float) -> None:
    """Whatever comes to the other lane and from other clients after a request was taken."""
    seen = [Overload(shares, factor, rate=rate, seed=seed).run() for seed in range(4)]
    assert max(one.turns[Lane.INTERACTIVE] for one in seen) < 2.5 * QUEUE_SECONDS
    assert max(one.turns[Lane.BULK] for one in seen) < 4 * QUEUE_SECONDS


@pytest.mark.parametrize("sizes", [(1, 2, 3, 8), (16, 32)], ids=["few", "many"])
def test_in_a_lane_alone_the_wait_is_what_was_expected(sizes: tuple[int, ...]) -> None:
    seen = Overload(UNEQUAL, 4, sizes=sizes).run()
    assert 0.8 * QUEUE_SECONDS < max(seen.turns.values()) < 1.3 * QUEUE_SECONDS
    assert max(seen.ends.values()) < 1.6 * QUEUE_SECONDS


def test_clients_that_ask_for_unequal_parts_have_equal_ones() -> None:
    seen = Overload(UNEQUAL, 4).run()
    total = seen.computed.total()
    assert all(0.25 < seen.computed[client] / total < 0.45 for client in UNEQUAL)
    assert seen.part("a") < 0.2
    assert seen.part("b") > 0.4


def test_who_asks_for_less_than_its_share_is_not_refused() -> None:
    seen = Overload({"a": 15, "b": 1}, 4, sizes=(1, 2, 3, 8)).run()  # b: a quarter of the device
    assert seen.part("b") == 1


def test_who_fills_the_queue_leaves_others_room_in_it() -> None:
    """Where the room is what is short, and not the time."""
    seen = Overload({"a": 15, "b": 1}, 4, sizes=(1, 2, 3, 8), queue_tokens=100_000, queue_seconds=600).run()
    assert seen.part("a") < 0.4
    assert seen.part("b") == 1
