"""The queue: which waiting jobs run next. No threads of its own, no torch, no clock.

Four rules, from the outside in:
1. Lanes: interactive before bulk before background; a lane that was passed over often enough goes first (ageing), every
   other time where somebody has waited for too long.
2. Groups (model and stage) of a lane take turns, batch by batch.
3. Clients share a group equally: who has had least goes next.
4. The requests of one client run in the order they came, but small ones pass larger ones.

The last two are in `fairness.py`.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import count

from app.domain import Lane
from app.engine.batching import Group, Job, Submission, joined, packed
from app.engine.fairness import Choose, GroupQueue

PATIENCE = {Lane.INTERACTIVE: 1 << 62, Lane.BULK: 4, Lane.BACKGROUND: 8}
"""Batches of other lanes after which a waiting lane goes first, so that none ever stands still."""
LATE = 1
"""The same, where a request has waited for its turn for too long."""
RIDE_RATIO = 2
"""Jobs of a slower lane ride along up to so many times the length of the longest in the batch."""


class LaneQueue:
    """The groups of one lane, and what waits in it."""

    def __init__(self, lane: Lane, late_seconds: float) -> None:
        self.lane = lane
        self._late_seconds = late_seconds
        self.tokens = 0
        self.jobs = 0
        self.passed_over = 0
        self._clients: Counter[str] = Counter()
        self._groups: OrderedDict[Group, GroupQueue] = OrderedDict()
        self._unbegun: dict[int, Submission] = {}
        """Requests of which nothing has run, in the order they came."""
        self._arrivals = count()

    @property
    def oldest(self) -> Submission | None:
        """Of the requests that wait for their turn, the one that came first."""
        return next(iter(self._unbegun.values()), None)

    def patience(self, now: float) -> int:
        """Batches of other lanes after which this one goes first."""
        late = self.oldest is not None and now - self.oldest.timing.queued_at > self._late_seconds
        return LATE if late else PATIENCE[self.lane]

    def is_due(self, now: float) -> bool:
        return self.jobs > 0 and self.passed_over >= self.patience(now)

    def tokens_of(self, client: str) -> int:
        """What it has here."""
        return self._clients[client]

    def ahead(self, client: str, cost: int) -> int:
        """Tokens of others, and of this client's own before, that run until `cost` more of its tokens are through: with
        equal shares, of every other client no more than of this one."""
        own = self._clients[client]
        return own + sum(min(tokens, own + cost) for name, tokens in self._clients.items() if name != client)

    def ahead_if_others_go_on(self, client: str) -> int:
        """Tokens that run before this client's next one if all keep sending: of each client as many as of this one."""
        return self._clients[client] * len(self._clients)

    def add(self, jobs: Sequence[Job]) -> None:
        """The jobs of one request."""
        submission = jobs[0].submission
        if submission.group not in self._groups:
            self._groups[submission.group] = GroupQueue(self._arrivals)
        self._groups[submission.group].add(submission.client, jobs)
        self._unbegun[id(submission)] = submission
        self._count(submission, len(jobs), sum(job.cost for job in jobs))

    def next_batch(self, budget: int) -> list[Job]:
        """A batch of the group whose turn it is, where something waits."""
        group = next(iter(self._groups))
        self._groups.move_to_end(group)
        return self._taken(group, budget, lambda jobs: packed(jobs, budget))

    def ride(self, batch: list[Job], budget: int) -> list[Job]:
        """`batch` with jobs of this lane that fit beside it."""
        longest = max(job.cost for job in batch)
        extra = self._taken(
            batch[0].submission.group,
            budget,
            lambda jobs: joined(batch, jobs, budget, lambda job: job.cost <= RIDE_RATIO * longest)[len(batch) :],
        )
        return batch + extra

    def forget(self, submission: Submission) -> None:
        """Its jobs that wait are dead from now on."""
        submission.dropped = True
        gone = submission.waiting_jobs
        self._count(submission, -gone, -submission.waiting_tokens)
        self._unbegun.pop(id(submission), None)
        self._groups[submission.group].forget(submission.client, gone)
        self._tidy(submission.group)

    def drain(self) -> list[Job]:
        jobs = [job for group in self._groups.values() for job in group.drain()]
        self._groups.clear()
        self._took(jobs)
        return jobs

    def _taken(self, group: Group, budget: int, choose: Choose) -> list[Job]:
        queue = self._groups.get(group)
        if queue is None:
            return []
        picked = queue.pick(budget)
        chosen = choose([entry.job for entry, _, _ in picked]) if picked else []
        queue.settle(picked, {id(job) for job in chosen})
        self._took(chosen)
        self._tidy(group)
        return chosen

    def _tidy(self, group: Group) -> None:
        if not self._groups[group]:
            del self._groups[group]

    def _took(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._unbegun.pop(id(job.submission), None)
            self._count(job.submission, -1, -job.cost)

    def _count(self, submission: Submission, jobs: int, tokens: int) -> None:
        self.jobs += jobs
        self.tokens += tokens
        submission.waiting_jobs += jobs
        submission.waiting_tokens += tokens
        self._clients[submission.client] += tokens
        if self._clients[submission.client] == 0:
            del self._clients[submission.client]


class WaitingJobs:
    """All lanes. `ride`: spare room of a batch is filled from slower lanes, which pays where a batch costs little more
    when it is larger, as on a GPU. `late_seconds`: of waiting for a turn, after which a lane that
    somebody waits for has every other batch."""

    def __init__(self, *, ride: bool = False, late_seconds: float = math.inf) -> None:
        self.lanes = {lane: LaneQueue(lane, math.inf if lane is Lane.BACKGROUND else late_seconds) for lane in Lane}
        self._ride = ride

    def tokens(self, *lanes: Lane) -> int:
        """Tokens as computed that wait in these lanes."""
        return sum(self.lanes[lane].tokens for lane in lanes)

    def tokens_of(self, client: str, *lanes: Lane) -> int:
        """Those of one client."""
        return sum(self.lanes[lane].tokens_of(client) for lane in lanes)

    def interactive_share(self, now: float) -> float:
        """Of all batches, the part that goes to the interactive lane if it has enough for them."""
        slower = [self.lanes[lane] for lane in (Lane.BULK, Lane.BACKGROUND) if self.lanes[lane].jobs]
        return math.prod(1 - 1 / (1 + queue.patience(now)) for queue in slower)

    def add(self, jobs: Sequence[Job]) -> None:
        """The jobs of one request."""
        self.lanes[jobs[0].submission.lane].add(jobs)

    def next_batch(self, budget: int, now: float) -> list[Job]:
        """Jobs of one group that together take at most `budget` tokens, padded; one job of any length alone. Empty
        when nothing waits."""
        waiting = [queue for queue in self.lanes.values() if queue.jobs]
        if not waiting:
            return []
        # Of those that are due the one that was passed over most, so that none stands still; else the fastest.
        chosen = min(waiting, key=lambda queue: -queue.passed_over if queue.is_due(now) else 1)
        batch = chosen.next_batch(budget)
        for queue in self.lanes.values():
            queue.passed_over = 0 if queue is chosen or queue not in waiting else queue.passed_over + 1
        for slower in waiting[waiting.index(chosen) + 1 :] if self._ride else ():
            batch = slower.ride(batch, budget)
        return batch

    def forget(self, submission: Submission) -> int:
        """Drops what waits of a request; how many jobs that were."""
        gone = submission.waiting_jobs
        if gone:
            self.lanes[submission.lane].forget(submission)
        return gone

    def drain(self) -> list[Job]:
        """Everything that waits, taken out."""
        return [job for queue in self.lanes.values() for job in queue.drain()]
