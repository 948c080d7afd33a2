"""Load on a running server.

Closed loop: so many clients, each asking again when it is answered. Open loop: arrivals at a rate, whether or not the
server keeps up, and latency from when a request was due, so that waiting is never left out.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

Ask = Callable[[int, float], Coroutine[Any, Any, None]]
"""Sends the request of a number, which is due at a time.perf_counter(), and notes what came of it."""

WORDS = ("river", "market", "engine", "winter", "letter", "garden", "signal", "museum", "copper", "harbour")


@dataclass(frozen=True, slots=True)
class Load:
    """What each request asks for: `texts` different texts of about `words` words; `timeout` in seconds."""

    url: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    texts: int = 1
    words: int = 20
    timeout: float = 120.0


@dataclass(slots=True)
class Outcome:
    """Latencies in seconds of what was answered 200, other answers by status (0: none came), over `seconds`."""

    texts: int
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)
    said: str = ""
    """About the last of those."""

    @property
    def texts_per_second(self) -> float:
        return len(self.latencies) * self.texts / self.seconds if self.seconds else 0.0

    def percentile(self, q: float) -> float:
        """Milliseconds; NaN where nothing was answered."""
        return 1000 * float(np.percentile(self.latencies, q)) if self.latencies else float("nan")


async def closed_loop(load: Load, *, clients: int, seconds: float) -> Outcome:
    """`clients` at once for `seconds`; requests under way at the end are waited for."""
    end = time.perf_counter() + seconds

    async def drive(ask: Ask) -> None:
        async def client(number: int) -> None:
            turn = 0
            while time.perf_counter() < end:
                await ask(number + clients * turn, time.perf_counter())
                turn += 1

        await asyncio.gather(*(client(number) for number in range(clients)))

    return await _run(load, drive)


async def open_loop(load: Load, *, rate: float, seconds: float) -> Outcome:
    """Poisson arrivals, `rate` requests a second on average."""
    gaps = random.Random(0)  # noqa: S311 - arrivals, not secrets

    async def drive(ask: Ask) -> None:
        due = started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            number = 0
            while due - started < seconds:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(ask(number, due))
                due += gaps.expovariate(rate)
                number += 1

    return await _run(load, drive)


async def _run(load: Load, drive: Callable[[Ask], Awaitable[None]]) -> Outcome:
    outcome = Outcome(load.texts)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # A run of its own: words that no run before had, so that no cache answers.
    run = time.time_ns()
    async with httpx.AsyncClient(
        base_url=load.url, headers=load.headers, timeout=load.timeout, limits=limits
    ) as client:

        async def ask(number: int, due: float) -> None:
            body = {"model": load.model, "input": _texts(load, f"{run} {number}"), "encoding_format": "base64"}
            try:
                response = await client.post("/v1/embeddings", json=body)
            except httpx.HTTPError as error:
                outcome.refused[0] += 1
                outcome.said = str(error) or type(error).__name__
                return
            if response.status_code == httpx.codes.OK:
                outcome.latencies.append(time.perf_counter() - due)
            else:
                outcome.refused[response.status_code] += 1
                outcome.said = response.text[:500]

        started = time.perf_counter()
        await drive(ask)
        outcome.seconds = time.perf_counter() - started
    return outcome


def _texts(load: Load, mark: str) -> list[str]:
    words = random.Random(mark)  # noqa: S311
    return [f"{mark} {i} " + " ".join(words.choices(WORDS, k=load.words)) for i in range(load.texts)]
