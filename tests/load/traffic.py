"""Requests with known answers, sent at random moments whether or not the server keeps up, or by clients that wait."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import orjson

from tests.load.known import Deck, Known
from tests.load.server import LoadServer

ROWS = "cde_batch_rows_sum"
SETTLE = 0.5
"""Seconds until a queue is as full as clients in a closed loop make it."""
REQUEST_TEXTS = 32
AGAIN_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Answer:
    """To one request. `status` 0: none came. `seconds`: since it was due. `server_seconds`: by the server's clock.
    `problem`: neither right vectors nor a refusal in order."""

    texts: int
    key: str
    status: int
    seconds: float
    server_seconds: float = float("nan")
    problem: str = ""

    @property
    def is_right(self) -> bool:
        return self.status == httpx.codes.OK and not self.problem

    @property
    def is_refused(self) -> bool:
        return self.status == httpx.codes.TOO_MANY_REQUESTS and not self.problem


async def ask(client: httpx.AsyncClient, deck: Deck, texts: int, *, due: float | None = None, key: str = "a") -> Answer:
    """One request for so many texts. `due`: by time.perf_counter(), now where it is absent."""
    due = time.perf_counter() if due is None else due
    with deck.hand(texts) as taken:
        body = orjson.dumps(deck.body(taken))
        try:
            response = await client.post("/v1/embeddings", content=body)
        except httpx.HTTPError as error:
            return Answer(texts, key, 0, time.perf_counter() - due, problem=type(error).__name__)
        seconds = time.perf_counter() - due
        right = response.status_code == httpx.codes.OK
        problem = deck.problem(taken, orjson.loads(response.content)) if right else refusal_problem(response)
        server_seconds = int(response.headers["openai-processing-ms"]) / 1000
        return Answer(texts, key, response.status_code, seconds, server_seconds, problem)


async def ask_patiently(client: httpx.AsyncClient, known: Known, choose: random.Random, texts: int) -> Answer:
    """As clients in a closed loop do: after a refusal they wait for a moment."""
    answer = await ask(client, known.choose(choose, texts), texts)
    if answer.is_refused:
        await asyncio.sleep(AGAIN_SECONDS)
    return answer


def refusal_problem(response: httpx.Response) -> str:
    """What is wrong with a 429; any other status is wrong."""
    error = orjson.loads(response.content)["error"]
    if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
        return f"{response.status_code} {error['code']}"
    after, after_ms = response.headers.get("retry-after", ""), response.headers.get("retry-after-ms", "")
    if not (after.isdigit() and 1 <= int(after) <= 60 and after_ms.isdigit() and int(after_ms) >= 1000):
        return "429 without a sane Retry-After"
    return "" if error["code"] == "rate_limit_exceeded" else f"429 {error['code']}"


async def open_loop(rate: float, seconds: float, seed: int, send: Callable[[float], Awaitable[object]]) -> None:
    """Poisson arrivals, `rate` a second; `send` is given the moment each was due. Ends when the last has returned."""
    gaps = random.Random(seed)
    due = started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        while (due := due + gaps.expovariate(rate)) - started < seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(_sent(send, due))


async def _sent(send: Callable[[float], Awaitable[object]], due: float) -> None:
    await send(due)


@asynccontextmanager
async def going_on(clients: Sequence[Callable[[], Awaitable[object]]]) -> AsyncIterator[None]:
    """Clients that ask again as soon as they are answered, for as long as the block; what they wait for at its end is
    dropped."""

    async def go_on(send: Callable[[], Awaitable[object]]) -> None:
        while True:
            await send()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(go_on(client)) for client in clients]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


def texts_for_capacity(known: Known, clients: int) -> int:
    """How many have to be known under each context."""
    return -(-clients // len(known.decks)) * REQUEST_TEXTS


async def capacity(server: LoadServer, known: Known, seconds: float, clients: int) -> float:
    """Texts a second, computed while the queue never runs dry. Each of the clients asks for 32 at a time."""
    choose = random.Random(0)
    async with server.client() as client:

        async def send() -> None:
            answer = await ask_patiently(client, known, choose, REQUEST_TEXTS)
            assert not answer.problem, answer

        async with going_on([send] * clients):
            await asyncio.sleep(SETTLE)
            rate = await measured_rate(server, seconds)
    await server.until_quiet()
    return rate


async def measured_rate(server: LoadServer, seconds: float) -> float:
    """Texts the device computes a second, in the second stage; measured until there are any."""
    before, started = await server.metrics(), time.perf_counter()
    texts = 0.0
    while not texts:
        await asyncio.sleep(seconds)
        texts = (await server.metrics()).since(before, ROWS, stage="second")
    return texts / (time.perf_counter() - started)


def problems(answers: Iterable[Answer]) -> Counter[str]:
    return Counter(answer.problem for answer in answers if answer.problem)
