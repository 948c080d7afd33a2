"""Fair shares of one group of jobs between clients, and the order of each one's requests.

Between clients, start-time fair queueing (Goyal et al., 1996): who has had least goes next. Virtual time also goes on
with what is computed for the average client, as in weighted fair queueing (Demers et al., 1989): else ever new clients
would all go before one that has had a text already.

A client's requests run in the order in which they would be through if each of them began when it came and had the
client's whole share (virtual finish times): those of one size as they came, small ones before larger ones, which
nothing passes any more once the client has had as much as they need.

Of some batches' worth of jobs in that order, those nearest in length to the first one make a batch. One that was left
behind for them a few times begins a batch itself.
"""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from typing import NamedTuple

from app.engine.batching import Job

LOOK_AHEAD = 4
"""One batch is chosen among the jobs of this many: more give nearer lengths, but let the others wait for longer."""
PASSES = 4
"""A job that was left behind so often, for others nearer in length to a batch's first one, begins every other batch."""
SLACK = 64
"""Dead jobs a client's heap may hold beside as many as live ones; likewise clients that have gone."""


class _Tagged(NamedTuple):
    """As a client's heap orders them. `passed`: how often it was looked at for a batch and left."""

    tag: float
    arrival: int
    job: Job
    passed: int = 0


class ClientQueue:
    """One client's jobs of one group and lane. A job's tag is what the client had when its request came, plus the cost
    of the whole request; the lowest tag goes first."""

    def __init__(self, served: float) -> None:
        self.served = served
        """Tokens it has had, in the group's virtual time: who comes begins at the present, not at 0."""
        self.jobs = 0
        self._heap: list[_Tagged] = []

    def add(self, jobs: Sequence[Job], arrivals: "count[int]") -> None:
        """The jobs of one request."""
        tag = self.served + sum(job.cost for job in jobs)
        for job in jobs:
            heappush(self._heap, _Tagged(tag, next(arrivals), job))
        self.jobs += len(jobs)

    def pop(self) -> _Tagged | None:
        """The next live job, taken out."""
        while self._heap:
            entry = heappop(self._heap)
            if entry.job.submission.dropped:  # its jobs are counted out already
                continue
            self.jobs -= 1
            return entry
        return None

    def put_back(self, entry: _Tagged) -> None:
        heappush(self._heap, entry._replace(passed=entry.passed + 1))
        self.jobs += 1

    def forget(self, jobs: int) -> None:
        """So many of its jobs were dropped; the heap is rid of them when they are most of it."""
        self.jobs -= jobs
        if len(self._heap) > 2 * self.jobs + SLACK:
            self._heap = [entry for entry in self._heap if not entry.job.submission.dropped]
            heapify(self._heap)

    def drain(self) -> list[Job]:
        jobs = [entry.job for entry in self._heap if not entry.job.submission.dropped]
        self._heap.clear()
        self.jobs = 0
        return jobs


_Picked = tuple[_Tagged, str, ClientQueue]
Choose = Callable[[list[Job]], list[Job]]
"""Jobs in the order they should run -> those that do."""


class GroupQueue:
    """The clients of one group in one lane."""

    def __init__(self, arrivals: "count[int]") -> None:
        self._clients: dict[str, ClientQueue] = {}
        self._gone: dict[str, float] = {}
        """`served` of clients with nothing left that are ahead of virtual time: one that sends a text at a time must
        not begin at the present with each."""
        self._virtual = 0.0
        self._overdue_first = False
        self._arrivals = arrivals

    def __bool__(self) -> bool:
        return bool(self._clients)

    def add(self, client: str, jobs: Sequence[Job]) -> None:
        if client not in self._clients:
            served = max(self._virtual, self._gone.pop(client, 0))
            self._clients[client] = ClientQueue(served)
        self._clients[client].add(jobs, self._arrivals)

    def pick(self, budget: int) -> list[_Picked]:
        """Jobs of some batches of `budget` tokens, in the order they should run, taken out; `settle` puts back those
        that do not."""
        left = LOOK_AHEAD * budget
        order = [(queue.served, i, client, queue) for i, (client, queue) in enumerate(self._clients.items())]
        heapify(order)
        picked: list[_Picked] = []
        while order and left > 0:
            served, i, client, queue = heappop(order)
            entry = queue.pop()
            if entry is not None:
                picked.append((entry, client, queue))
                left -= min(entry.job.cost, budget)
                heappush(order, (served + entry.job.cost, i, client, queue))
        # Every other time: who has had least never waits for more than one of them.
        self._overdue_first = not self._overdue_first
        if self._overdue_first:
            picked.sort(key=lambda pick: pick[0].passed < PASSES)
        return picked

    def settle(self, picked: Sequence[_Picked], running: set[int]) -> None:
        """`running`: the ids of the picked jobs that run now."""
        computed = sum(entry.job.cost for entry, _, _ in picked if id(entry.job) in running)
        passed = self._virtual + computed / max(1, len(self._clients))
        self._virtual = max(passed, min((queue.served for _, _, queue in picked), default=passed))
        for entry, _, queue in picked:
            if id(entry.job) in running:
                queue.served += entry.job.cost
            else:
                queue.put_back(entry)
        for _, client, queue in picked:
            self._tidy(client, queue)

    def forget(self, client: str, jobs: int) -> None:
        queue = self._clients[client]
        queue.forget(jobs)
        self._tidy(client, queue)

    def drain(self) -> list[Job]:
        jobs = [job for queue in self._clients.values() for job in queue.drain()]
        self._clients.clear()
        return jobs

    def _tidy(self, client: str, queue: ClientQueue) -> None:
        if queue.jobs == 0 and self._clients.get(client) is queue:
            del self._clients[client]
            if queue.served > self._virtual:
                self._gone[client] = queue.served
            if len(self._gone) > 2 * len(self._clients) + SLACK:
                self._gone = {name: served for name, served in self._gone.items() if served > self._virtual}
