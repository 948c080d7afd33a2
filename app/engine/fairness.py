"""Fair shares of one group of jobs: between clients, and between the requests of each.

Start-time fair queueing (Goyal et al., 1996), twice: the client that has had least goes next, and of its requests the
one that stands first in virtual time.
"""

from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count

from app.engine.batching import Job

SLACK = 64
"""Dead jobs a client's heap may hold beside as many as live ones."""

_Tagged = tuple[int, int, Job]
"""Tag, arrival, job: the order of a client's heap."""


class ClientQueue:
    """One client's jobs of one group and lane. A job's tag is the virtual time at which its request came, plus the
    cost of the jobs before it in that request; the lowest tag goes first."""

    def __init__(self, served: int) -> None:
        self.served = served
        """Tokens it has had, on the scale of all clients' that wait beside it."""
        self.jobs = 0
        self._heap: list[_Tagged] = []
        self._virtual = 0

    def add(self, jobs: Iterable[Job], arrivals: "count[int]") -> None:
        tag = self._virtual
        for job in jobs:
            heappush(self._heap, (tag, next(arrivals), job))
            tag += job.cost
            self.jobs += 1

    def pop(self) -> _Tagged | None:
        """The next live job, taken out."""
        while self._heap:
            entry = heappop(self._heap)
            job = entry[2]
            if job.submission.dropped:  # its jobs are counted out already
                continue
            self.jobs -= 1
            return entry
        return None

    def put_back(self, entry: _Tagged) -> None:
        heappush(self._heap, entry)
        self.jobs += 1

    def reached(self, tag: int) -> None:
        """The first job in line has this tag: what comes from now on stands behind it, not behind all others."""
        self._virtual = max(self._virtual, tag)

    def forget(self, jobs: int) -> None:
        """So many of its jobs were dropped; the heap is rid of them when they are most of it."""
        self.jobs -= jobs
        if len(self._heap) > 2 * self.jobs + SLACK:
            self._heap = [entry for entry in self._heap if not entry[2].submission.dropped]
            heapify(self._heap)

    def drain(self) -> list[Job]:
        jobs = [entry[2] for entry in self._heap if not entry[2].submission.dropped]
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
        self._virtual = 0
        self._arrivals = arrivals

    def __bool__(self) -> bool:
        return bool(self._clients)

    def add(self, client: str, jobs: Iterable[Job]) -> None:
        if client not in self._clients:
            self._clients[client] = ClientQueue(self._virtual)
        self._clients[client].add(jobs, self._arrivals)

    def pick(self, limit: int) -> list[_Picked]:
        """Up to `limit` jobs in the order they should run, taken out; `settle` puts back those that do not."""
        order = [(queue.served, i, client, queue) for i, (client, queue) in enumerate(self._clients.items())]
        heapify(order)
        picked: list[_Picked] = []
        while order and len(picked) < limit:
            served, i, client, queue = heappop(order)
            entry = queue.pop()
            if entry is not None:
                picked.append((entry, client, queue))
                heappush(order, (served + entry[2].cost, i, client, queue))
        return picked

    def settle(self, picked: Sequence[_Picked], running: set[int]) -> None:
        """`running`: the ids of the picked jobs that run now."""
        self._virtual = max([self._virtual, *(queue.served for _, _, queue in picked[:1])])
        first = {id(queue): entry[0] for entry, _, queue in reversed(picked)}
        for entry, _, queue in picked:
            queue.reached(first[id(queue)])
            if id(entry[2]) in running:
                queue.served += entry[2].cost
            else:
                queue.put_back(entry)
        for _, client, queue in picked:
            self._tidy(client, queue)

    def forget(self, client: str, jobs: int) -> None:
        queue = self._clients.get(client)
        if queue is not None:
            queue.forget(jobs)
            self._tidy(client, queue)

    def drain(self) -> list[Job]:
        jobs = [job for queue in self._clients.values() for job in queue.drain()]
        self._clients.clear()
        return jobs

    def _tidy(self, client: str, queue: ClientQueue) -> None:
        if queue.jobs == 0 and self._clients.get(client) is queue:
            del self._clients[client]
