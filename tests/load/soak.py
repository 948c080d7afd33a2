"""A long time at a load that it can bear: memory and file descriptors stay where they are, and nothing goes wrong.

Everything that clients do is in it, mistakes and disconnects too. The caches are small, so that they are full before
the measurement begins: behind so many calls, however long a slow machine takes for them.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx
import numpy as np

from tests.load.calls import BATCH_LINES, CONTEXT_DOCUMENTS, EMBED_TEXTS, LINE_TEXTS, Calls
from tests.load.known import Known
from tests.load.report import Line, p50_p95
from tests.load.server import LoadServer
from tests.load.traffic import ROWS, SETTLE, capacity, going_on, open_loop, texts_for_capacity

SETTINGS = {"CDE__LIMITS__VECTOR_CACHE_BYTES": str(2**18), "CDE__CONTEXTS__CACHE_BYTES": str(2**22)}
MIX = {"embed": 70, "leave": 6, "look": 8, "tokenize": 5, "mistake": 5, "stranger": 2, "context": 3, "batch": 1}
"""Of a hundred calls."""
SLOPE, FILES = 0.5, 5
"""MiB a minute, and open file descriptors, that count as nothing."""
LONGEST = 600.0
"""Seconds of one call; a batch is behind everything else."""
MIB = 2**20
REFUSED = "429"


@dataclass(frozen=True, slots=True)
class Plan:
    """`load`: of the capacity. `warm_up`: calls before the `seconds` that are measured, about."""

    seconds: float = 1800.0
    load: float = 0.7
    warm_up: int = 2000
    every: float = 2.0
    capacity_seconds: float = 15.0
    clients: int = 4
    words: tuple[int, int] = (5, 200)
    seed: int = 0


@dataclass
class Soak:
    """`samples`: (seconds, resident bytes, open file descriptors), of the whole run. `warm_up`: seconds that are not
    measured."""

    warm_up: float = 0.0
    capacity: float = 0.0
    computed: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    unsent: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    files_before: int = 0
    files_after: int = 0

    @property
    def measured(self) -> list[tuple[float, int, int]]:
        return [sample for sample in self.samples if sample[0] >= self.warm_up]

    @property
    def slope(self) -> float:
        """Of the resident memory, MiB a minute."""
        at = [sample[0] / 60 for sample in self.measured]
        return float(np.polyfit(at, [sample[1] / MIB for sample in self.measured], 1)[0])

    def files(self) -> tuple[float, float]:
        """Median of the first third, and of the last, of what is measured."""
        third = max(1, len(self.measured) // 3)
        files = [sample[2] for sample in self.measured]
        return median(files[:third]), median(files[-third:])

    def summary(self) -> dict[str, Any]:
        return vars(self) | {"slope_mib_per_minute": self.slope, "seconds": len(self.seconds)}

    def lines(self) -> list[Line]:
        passed, half = self.samples[-1][0], len(self.seconds) // 2
        resident = [f"{sample[1] / MIB:.0f}" for sample in self.measured]
        first, last = self.files()
        stayed = self.files_after - self.files_before
        return [
            Line("seconds, and those that are measured", f"{passed:.0f}, {passed - self.warm_up:.0f}"),
            Line("capacity, texts a second", f"{self.capacity:.1f}"),
            Line("computed, texts a second", f"{self.computed:.1f} ({100 * self.computed / self.capacity:.0f} %)"),
            Line("calls", f"{self.calls.total()}"),
            *(Line(f"  {what}", f"{number}") for what, number in self.calls.most_common()),
            Line("  refused with 429", f"{self.refused}"),
            Line("  not sent, because all known texts were in flight", f"{self.unsent}"),
            Line("  wrong", f"{dict(self.problems) or 0}", "0", not self.problems),
            Line("an answer with vectors, p50, p95, in the first half", p50_p95(self.seconds[:half])),
            Line("  in the second half", p50_p95(self.seconds[half:])),
            Line("resident MiB, at start", f"{self.samples[0][1] / MIB:.0f}"),
            Line("  behind the warm-up, and at the end", f"{resident[0]}, {resident[-1]}"),
            Line("  least and most behind the warm-up", f"{min(resident)}, {max(resident)}"),
            Line("  slope behind the warm-up, a minute", f"{self.slope:+.2f}", f"≤ {SLOPE}", self.slope <= SLOPE),
            Line("open files, first and last third", f"{first:.0f}, {last:.0f}", f"≤ +{FILES}", last - first <= FILES),
            Line("  more than before, when all have gone", f"{stayed}", f"≤ {FILES}", stayed <= FILES),
        ]


async def run(server: LoadServer, plan: Plan) -> Soak:
    seen = Soak()
    known = Known(server, words=plan.words, seed=plan.seed)
    async with server.client() as client:
        await known.prepare(client, 2 * texts_for_capacity(known, plan.clients))
    seen.capacity = await capacity(server, known, plan.capacity_seconds, plan.clients)
    await asyncio.sleep(SETTLE)
    seen.files_before = server.open_files
    async with server.client() as client:
        calls = Calls(server, client, known, random.Random(plan.seed))
        before = await server.metrics()
        rate = plan.load * seen.capacity / _texts_of_a_call()
        seen.warm_up = plan.warm_up / rate
        async with going_on([_sampler(server, seen, plan.every)]):
            await open_loop(rate, seen.warm_up + plan.seconds, plan.seed, _caller(calls, known, seen))
        after = await server.metrics()
        seen.computed = after.since(before, ROWS) / seen.samples[-1][0]
        seen.seconds = calls.seconds
    await server.until_quiet()
    await asyncio.sleep(SETTLE)
    seen.files_after = server.open_files
    return seen


def _caller(calls: Calls, known: Known, seen: Soak) -> Callable[[float], Awaitable[None]]:
    choose = random.Random(len(MIX))

    async def call(_due: float) -> None:
        if not known.has(max(EMBED_TEXTS)):
            seen.unsent += 1
            return
        [what] = choose.choices(list(MIX), list(MIX.values()))
        seen.calls[what] += 1
        method: Callable[[], Awaitable[str]] = getattr(calls, what)
        try:
            async with asyncio.timeout(LONGEST):
                problem = await method()
        except (httpx.HTTPError, TimeoutError) as error:
            problem = type(error).__name__
        if problem == REFUSED:
            seen.refused += 1
        elif problem:
            seen.problems[f"{what}: {problem}"] += 1

    return call


def _texts_of_a_call() -> float:
    """Texts the device computes for one, on average."""
    embedded = sum(EMBED_TEXTS) / len(EMBED_TEXTS)
    texts = {"embed": embedded, "leave": embedded, "context": CONTEXT_DOCUMENTS + 1, "batch": BATCH_LINES * LINE_TEXTS}
    return sum(share * texts.get(what, 0) for what, share in MIX.items()) / sum(MIX.values())


def _sampler(server: LoadServer, seen: Soak, every: float) -> Callable[[], Awaitable[None]]:
    started = time.perf_counter()

    async def sample() -> None:
        seen.samples.append((time.perf_counter() - started, server.resident_bytes, server.open_files))
        await asyncio.sleep(every)

    return sample
