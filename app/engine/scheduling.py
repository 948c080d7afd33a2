"""The queue: which waiting jobs run next. No threads of its own, no torch, no clock.

Four rules, from the outside in:
1. Lanes: interactive before bulk before background; a lane that was passed over often enough goes first (ageing).
2. Groups (model and stage) of a lane take turns, batch by batch.
3. Clients share a group equally: who has had least goes next.
4. The requests of one client share likewise, so that a short one passes a long one.

The last two are in `fairness.py`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import count

from app.domain import Lane
from app.engine.batching import Group, Job, Submission, joined, packed
from app.engine.fairness import Choose, GroupQueue

LOOK_AHEAD = 256
PATIENCE = {Lane.INTERACTIVE: 1 << 62, Lane.BULK: 4, Lane.BACKGROUND: 8}
"""Batches of other lanes after which a waiting lane goes first, so that none ever stands still."""
RIDE_RATIO = 2
"""Jobs of a slower lane ride along up to so many times the length of the longest in the batch."""


class LaneQueue:
    """The groups of one lane, and what waits in it."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.tokens = 0
        self.jobs = 0
        self.passed_over = 0
        self._groups: OrderedDict[Group, GroupQueue] = OrderedDict()
        self._submissions: dict[int, Submission] = {}
        self._arrivals = count()

    @property
    def is_due(self) -> bool:
        return self.jobs > 0 and self.passed_over >= PATIENCE[self.lane]

    @property
    def oldest(self) -> Submission | None:
        """Of those with a waiting job, the one that came first."""
        return next(iter(self._submissions.values()), None)

    def add(self, jobs: Sequence[Job]) -> None:
        """The jobs of one request."""
        submission = jobs[0].submission
        if submission.group not in self._groups:
            self._groups[submission.group] = GroupQueue(self._arrivals)
        self._groups[submission.group].add(submission.client, jobs)
        for job in jobs:
            self._count(job, 1)

    def next_batch(self, budget: int) -> list[Job]:
        """A batch of the group whose turn it is; empty when nothing waits."""
        while self._groups:
            group = next(iter(self._groups))
            self._groups.move_to_end(group)
            batch = self._taken(group, lambda jobs: packed(jobs, budget))
            if batch:
                return batch
        return []

    def ride(self, batch: list[Job], budget: int) -> list[Job]:
        """`batch` with jobs of this lane that fit beside it."""
        longest = max(job.cost for job in batch)
        extra = self._taken(
            batch[0].submission.group,
            lambda jobs: joined(batch, jobs, budget, lambda job: job.cost <= RIDE_RATIO * longest)[len(batch) :],
        )
        return batch + extra

    def forget(self, submission: Submission) -> None:
        """Its jobs that wait are dead from now on."""
        submission.dropped = True
        gone, self.jobs = submission.waiting_jobs, self.jobs - submission.waiting_jobs
        self.tokens -= submission.waiting_tokens
        submission.waiting_jobs = submission.waiting_tokens = 0
        self._submissions.pop(id(submission), None)
        group = self._groups.get(submission.group)
        if group is not None:
            group.forget(submission.client, gone)
            self._tidy(submission.group)

    def drain(self) -> list[Job]:
        jobs = [job for group in self._groups.values() for job in group.drain()]
        self._groups.clear()
        for job in jobs:
            self._count(job, -1)
        return jobs

    def _taken(self, group: Group, choose: Choose) -> list[Job]:
        queue = self._groups.get(group)
        if queue is None:
            return []
        picked = queue.pick(LOOK_AHEAD)
        chosen = choose([entry[2] for entry, _, _ in picked]) if picked else []
        queue.settle(picked, {id(job) for job in chosen})
        for job in chosen:
            self._count(job, -1)
        self._tidy(group)
        return chosen

    def _tidy(self, group: Group) -> None:
        if not self._groups[group]:
            del self._groups[group]

    def _count(self, job: Job, sign: int) -> None:
        submission = job.submission
        self.jobs += sign
        self.tokens += sign * job.cost
        submission.waiting_jobs += sign
        submission.waiting_tokens += sign * job.cost
        if sign > 0:
            self._submissions[id(submission)] = submission
        elif submission.waiting_jobs == 0:
            self._submissions.pop(id(submission), None)


class WaitingJobs:
    """All lanes. `ride`: spare room of a batch is filled from slower lanes, which pays where a batch costs little more
    when it is larger, as on a GPU."""

    def __init__(self, *, ride: bool = False) -> None:
        self.lanes = {lane: LaneQueue(lane) for lane in Lane}
        self._ride = ride

    def __len__(self) -> int:
        return sum(lane.jobs for lane in self.lanes.values())

    def tokens(self, *lanes: Lane) -> int:
        """Tokens as computed that wait in these lanes."""
        return sum(self.lanes[lane].tokens for lane in lanes)

    def add(self, jobs: Sequence[Job]) -> None:
        """The jobs of one request."""
        if jobs:
            self.lanes[jobs[0].submission.lane].add(jobs)

    def next_batch(self, budget: int) -> list[Job]:
        """Jobs of one group that together take at most `budget` tokens, padded; one job of any length alone. Empty
        when nothing waits."""
        waiting = [queue for queue in self.lanes.values() if queue.jobs]
        for chosen in sorted(waiting, key=lambda queue: not queue.is_due):  # else in their order
            batch = chosen.next_batch(budget)
            if not batch:
                continue
            for queue in self.lanes.values():
                queue.passed_over = 0 if queue is chosen or queue not in waiting else queue.passed_over + 1
            for slower in waiting[waiting.index(chosen) + 1 :] if self._ride else ():
                batch = slower.ride(batch, budget)
            return batch
        return []

    def forget(self, submission: Submission) -> int:
        """Drops what waits of a request; how many jobs that were."""
        gone = submission.waiting_jobs
        if gone:
            self.lanes[submission.lane].forget(submission)
        return gone

    def drain(self) -> list[Job]:
        """Everything that waits, taken out."""
        return [job for queue in self.lanes.values() for job in queue.drain()]
