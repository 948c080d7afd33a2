"""Whether a request finds room in the queue, for all its texts or not at all, and can be answered in time."""

import math
from collections.abc import Sequence

from app.domain import Caller, Lane
from app.engine.batching import Job
from app.engine.scheduling import WaitingJobs
from app.errors import DeadlineExceeded, QueueFull, TooManyTokens

FIRST_GUESS = 2_000.0
"""Tokens as computed a second and worker, before anything was measured; only Retry-After depends on it."""
FORGETTING = 0.2
"""Weight of the newest batch in the averages."""
BULK_SHARE = 0.9
"""Of the queue, what bulk requests may fill; the rest is kept for requests of few texts."""
CLIENT_SHARE = 0.75
"""Of the room that others leave, what one client may hold, so that a newcomer always finds some (dynamic thresholds,
Choudhury and Hahne, 1998). Of n clients that ask for more than there is, each comes to hold 3 / (3 n + 1) of it."""
HOPELESS = 2.0
"""A request is refused where its estimated time is this many times what its deadline leaves: estimates are rough."""


class Admission:
    """Room in the queue, in tokens as computed, and how fast it empties. Callers hold the engine's lock."""

    def __init__(self, waiting: WaitingJobs, *, queue_tokens: int, queue_seconds: float, workers: int) -> None:
        """`queue_seconds`: how long a request may be expected to wait for its turn; 0: for ever."""
        self._waiting = waiting
        self._queue_tokens = queue_tokens
        self._queue_seconds = queue_seconds or math.inf
        self._workers = workers
        self._tokens, self._seconds = FIRST_GUESS, 1.0  # of a recent batch, on average
        self._measured = False
        self.running_tokens = 0
        """In the batches that run."""

    @property
    def drain_rate(self) -> float:
        """Tokens as computed a second, of all workers."""
        return self._workers * self._tokens / self._seconds

    def took(self, batch: Sequence[Job]) -> None:
        """`batch` begins to run."""
        self.running_tokens += sum(job.cost for job in batch)

    def measure(self, tokens: int, seconds: float) -> None:
        """A batch took so long. Tokens and times are averaged apart, so that a slow batch counts for as long as it
        took; the average of the batches' rates would be too high by far where they differ."""
        share = FORGETTING if self._measured else 1.0
        self._tokens += share * (tokens - self._tokens)
        self._seconds += share * (max(seconds, 1e-6) - self._seconds)
        self._measured = True

    def check(self, lane: Lane, costs: list[int], caller: Caller, now: float) -> None:
        """Whether texts of these tokens may wait in `lane`. Raises TooManyTokens, QueueFull, DeadlineExceeded."""
        cost = sum(costs)
        if cost > self._queue_tokens:
            raise TooManyTokens(
                f"Invalid 'input': {cost} tokens as computed, context rows counted, and this server's queue takes "
                f"{self._queue_tokens}. Send fewer texts at a time.",
                param="input",
            )
        over = self._over(lane, cost, caller.client)
        queue = self._waiting.lanes[lane]
        others_go_on = queue.ahead_if_others_go_on(caller.client)
        turn = self._until_run(lane, max(queue.ahead(caller.client, costs[0]), others_go_on), now)
        late = turn - self._queue_seconds
        if over > 0 or late > 0:
            raise QueueFull(
                "The server is busy: its queue is full. Please try again after the time in Retry-After.",
                retry_after=max(over / self.drain_rate, late),
            )
        ready = self._until_run(lane, queue.ahead(caller.client, cost) + cost, now)
        if caller.deadline is not None and now + ready / HOPELESS > caller.deadline:
            raise DeadlineExceeded(
                f"The server is busy: this request would be ready in about {ready:.1f} s, which is beyond its time "
                f"(x-timeout-ms, or the server's default). Please try again later, or allow more time.",
                retry_after=turn,
            )

    def _over(self, lane: Lane, cost: int, client: str) -> float:
        """By how many tokens `cost` more of this client would go beyond its room; 0 or less: they fit. An empty queue
        takes any request."""
        held, room = self._room(lane)
        if not held:
            return 0
        if not client:  # nobody in particular: the process itself
            return held + cost - room
        lanes = (lane,) if lane is Lane.BACKGROUND else (Lane.INTERACTIVE, Lane.BULK)
        own = self._waiting.tokens_of(client, *lanes)
        return own + cost - CLIENT_SHARE * (room - (held - own))

    def _room(self, lane: Lane) -> tuple[int, float]:
        """Tokens that are held of the room this lane has a part in, and how many that room takes."""
        if lane is Lane.BACKGROUND:  # its queue is its own
            return self._waiting.tokens(lane), self._queue_tokens
        awaited = self._waiting.tokens(Lane.INTERACTIVE, Lane.BULK) + self.running_tokens
        return awaited, self._queue_tokens * (BULK_SHARE if lane is Lane.BULK else 1.0)

    def _until_run(self, lane: Lane, tokens: int, now: float) -> float:
        """Seconds until `tokens` of this lane have run, after what runs now. Later arrivals in faster lanes are not
        foreseen. 0 for the background, which waits as long as it takes, and before anything was measured."""
        if lane is Lane.BACKGROUND or not self._measured:
            return 0.0
        tokens += self.running_tokens
        if lane is Lane.INTERACTIVE:
            return tokens / (self._waiting.interactive_share(now) * self.drain_rate)
        return (tokens + self._waiting.tokens(Lane.INTERACTIVE)) / self.drain_rate
