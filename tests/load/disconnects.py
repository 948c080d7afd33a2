"""Clients that go away at random moments: what they asked for is dropped, nothing of them stays behind, and their
neighbours notice nothing.

They leave in the middle of a request's head or body, while it waits or runs, and with the answer half read; half of
them by a reset. Two neighbours ask and check their answers all the while.
"""

import asyncio
import random
import socket
import struct
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import orjson

from tests.load.known import Known, documents
from tests.load.metrics import Metrics
from tests.load.report import Line
from tests.load.server import NO_CACHE, LoadServer
from tests.load.traffic import ROWS, SETTLE, Answer, ask, ask_patiently, going_on, problems

SETTINGS = NO_CACHE
LEAVER_TEXTS, NEIGHBOUR_TEXTS = (1, 24), (4, 24)
NEIGHBOURS = 2
MOMENT, PATIENCE, CLOSING = 0.05, 180.0, 10.0
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: on, for no time: closing sends a reset."""
SMALL_BUFFER = 4096
"""The rest of an answer does not fit in it, so the server is still writing."""
CHECKS = 20


class Moment(StrEnum):
    HEAD = "in the head"
    BODY = "in the body"
    WAITING = "while it waits or runs"
    ANSWER = "in the answer"


MOMENTS = (Moment.HEAD, Moment.BODY, Moment.WAITING, Moment.WAITING, Moment.WAITING, Moment.ANSWER)


@dataclass(frozen=True, slots=True)
class Plan:
    """`with_documents`: of the clients, who send a context of their own along; they come after the others."""

    clients: int = 1000
    with_documents: float = 0.2
    at_once: int = 64
    words: tuple[int, int] = (5, 60)
    seed: int = 0


@dataclass
class Disconnects:
    """Counts of texts are of the clients that sent no documents, and their neighbours'."""

    left: Counter[Moment] = field(default_factory=Counter)
    submitted: int = 0
    computed: int = 0
    saved: int = 0
    in_vain: int = 0
    documents_saved: int = 0
    quiet: float = 0.0
    files_before: int = 0
    files_after: int = 0
    neighbours: list[Answer] = field(default_factory=list)
    afterwards: list[Answer] = field(default_factory=list)

    @property
    def problems(self) -> Counter[str]:
        return problems([*self.neighbours, *self.afterwards])

    @property
    def unaccounted(self) -> int:
        """Texts that were taken in, and neither computed nor dropped."""
        return self.submitted - self.computed - self.saved

    def summary(self) -> dict[str, Any]:
        counted = {"neighbours": len(self.neighbours), "afterwards": len(self.afterwards)}
        return vars(self) | counted | {"problems": self.problems}

    def lines(self) -> list[Line]:
        files = f"{self.files_before} before, {self.files_after} after"
        return [
            Line("clients that left", f"{self.left.total()}"),
            *(Line(f"  {moment}", f"{self.left[moment]}") for moment in Moment),
            Line("texts taken in", f"{self.submitted}"),
            Line("  computed", f"{self.computed}"),
            Line("    whose client had gone meanwhile", f"{self.in_vain}"),
            Line("  dropped, so saved", f"{self.saved}", "> 0", self.saved > 0),
            Line("  unaccounted for", f"{self.unaccounted}", "0", self.unaccounted == 0),
            Line("texts and documents saved of clients with documents", f"{self.documents_saved}"),
            Line("nothing waits or runs, after the last has left", f"{self.quiet:.2f} s"),
            Line("open file descriptors", files, "no more", self.files_after <= self.files_before),
            Line("answers to neighbours, all checked", f"{len(self.neighbours)}"),
            Line("answers afterwards, all checked", f"{len(self.afterwards)}"),
            Line("  wrong, or none", f"{dict(self.problems) or 0}", "0", not self.problems),
        ]


async def run(server: LoadServer, plan: Plan) -> Disconnects:
    seen = Disconnects()
    known = Known(server, words=plan.words, seed=plan.seed)
    async with server.client() as client:
        await known.prepare(client, NEIGHBOURS * NEIGHBOUR_TEXTS[1])
    await server.until_quiet()
    crowd = _Crowd(server, known, plan, seen)
    with_documents = int(plan.clients * plan.with_documents)
    await crowd.come_and_go(1, Moment.WAITING)  # whatever is opened once is open now
    await server.until_quiet()
    seen.left.clear()
    await asyncio.sleep(SETTLE)
    seen.files_before = server.open_files
    before = await server.metrics()
    await crowd.come_and_go(plan.clients - with_documents)
    between = await server.metrics()
    _count(seen, before, between)
    await crowd.come_and_go(with_documents, Moment.WAITING, with_documents=True)
    seen.documents_saved = int((await server.metrics()).since(between, "cde_cancelled_texts_total", state="queued"))
    seen.files_after = await _open_files(server, seen.files_before)
    async with server.client() as client:
        choose = random.Random(plan.seed)
        seen.afterwards = [await ask(client, known.choose(choose, 3), 3) for _ in range(CHECKS)]
    return seen


def _count(seen: Disconnects, before: Metrics, after: Metrics) -> None:
    seen.submitted = int(after.since(before, "cde_vector_cache_total", outcome="computed"))
    seen.computed = int(after.since(before, ROWS, stage="second"))
    seen.saved = int(after.since(before, "cde_cancelled_texts_total", state="queued"))
    seen.in_vain = int(after.since(before, "cde_cancelled_texts_total", state="running"))


async def _open_files(server: LoadServer, at_most: int) -> int:
    """Their number as soon as it is down at `at_most`, or after some seconds."""
    ended = time.perf_counter() + CLOSING
    while True:
        number = server.open_files
        if number <= at_most or time.perf_counter() > ended:
            return number
        await asyncio.sleep(0.1)


class _Crowd:
    def __init__(self, server: LoadServer, known: Known, plan: Plan, seen: Disconnects) -> None:
        self._server, self._known, self._plan, self._seen = server, known, plan, seen
        self._choose = random.Random(plan.seed)
        self._where = urlsplit(server.url)

    async def come_and_go(self, number: int, moment: Moment | None = None, *, with_documents: bool = False) -> None:
        """So many clients, a few dozen at once; returns when nothing waits or runs any more."""
        places = asyncio.Semaphore(self._plan.at_once)
        async with self._server.client("b") as client:

            async def neighbour() -> None:
                texts = self._choose.randint(*NEIGHBOUR_TEXTS)
                self._seen.neighbours.append(await ask_patiently(client, self._known, self._choose, texts))

            async def leaver() -> None:
                async with places:
                    await self._leave(moment or self._choose.choice(MOMENTS), with_documents=with_documents)

            async with going_on([neighbour] * NEIGHBOURS):
                await asyncio.sleep(SETTLE)
                async with asyncio.TaskGroup() as group:
                    for _ in range(number):
                        group.create_task(leaver())
        self._seen.quiet = max(self._seen.quiet, await self._server.until_quiet(PATIENCE))

    async def _leave(self, moment: Moment, *, with_documents: bool) -> None:
        """One client, from coming to going."""
        fewest, most = LEAVER_TEXTS
        number = most if moment is Moment.ANSWER else self._choose.randint(fewest, most)
        texts = [self._known.text() for _ in range(number)]
        body = self._choose.choice(self._known.decks).request(texts) | {"encoding_format": "float"}
        if with_documents:
            body |= {"model": self._server.model, "context": {"documents": self._new_documents()}}
        with socket.socket() as connection:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
            if self._choose.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            await self._begin(connection, orjson.dumps(body), moment)
        self._seen.left[moment] += 1

    async def _begin(self, connection: socket.socket, body: bytes, moment: Moment) -> None:
        """As much of a request as its client stays for."""
        loop, choose = asyncio.get_running_loop(), self._choose
        await loop.sock_connect(connection, (self._where.hostname, self._where.port))
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer c\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        request = head + body
        ends = {Moment.HEAD: choose.randrange(1, len(head)), Moment.BODY: choose.randrange(len(head), len(request))}
        with suppress(ConnectionError):
            await loop.sock_sendall(connection, request[: ends.get(moment, len(request))])
            if moment is Moment.ANSWER:
                await asyncio.wait_for(loop.sock_recv(connection, choose.randint(1, SMALL_BUFFER)), PATIENCE)
            elif moment is Moment.WAITING:
                await asyncio.sleep(choose.uniform(0, self._usual_seconds))
            else:
                await asyncio.sleep(choose.uniform(0, MOMENT))

    @property
    def _usual_seconds(self) -> float:
        """What an answer takes, at the moment."""
        latest = [answer.seconds for answer in self._seen.neighbours[-9:]]
        return median(latest) if latest else SETTLE

    def _new_documents(self) -> list[str]:
        mark = self._choose.getrandbits(32)
        return [f"{mark} {document}" for document in documents(8, skip=self._choose.randrange(40))]
