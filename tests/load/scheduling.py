"""Few texts beside many: how long somebody waits for one to three texts while others embed a corpus, and what that
costs them.

Three phases, several times over, so that what else the machine does falls on all of them: the interactive requests
alone, bulk alone, both. Interactive ones come at random moments; bulk clients ask again when they are answered. What
bulk got is what the device computed, less the interactive texts.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tests.load.known import Known
from tests.load.report import Line, ms, percentile
from tests.load.server import NO_CACHE, LoadServer
from tests.load.traffic import (
    ROWS,
    SETTLE,
    Answer,
    ask,
    ask_patiently,
    capacity,
    going_on,
    open_loop,
    problems,
    texts_for_capacity,
)

SETTINGS = NO_CACHE
SLICE = "cde_forward_seconds"
INTERACTIVE = (1, 2, 3)
FACTOR, KEPT = 3.0, 0.8


@dataclass(frozen=True, slots=True)
class Plan:
    """`seconds`: of each phase. `share`: of the capacity, which the interactive requests ask for. `bulk_texts`: of one
    bulk request, from and to."""

    seconds: float = 20.0
    rounds: int = 3
    share: float = 0.15
    bulk_clients: int = 3
    bulk_texts: tuple[int, int] = (64, 256)
    capacity_seconds: float = 10.0
    clients: int = 4
    words: tuple[int, int] = (100, 200)
    seed: int = 0


@dataclass
class Phase:
    """Rates in texts a second, of the device's time; seconds of the interactive answers; of one batch."""

    interactive: list[float] = field(default_factory=list)
    interactive_rate: float = 0.0
    bulk_rate: float = 0.0
    slice_mean: float = 0.0
    slice_p95: float = 0.0


@dataclass
class Scheduling:
    capacity: float = 0.0
    alone: list[Phase] = field(default_factory=list)
    bulk: list[Phase] = field(default_factory=list)
    both: list[Phase] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    answers: int = 0

    def p(self, phases: list[Phase], q: float) -> float:
        """A percentile of the interactive answers of all rounds."""
        return percentile([seconds for phase in phases for seconds in phase.interactive], q)

    @property
    def bulk_kept(self) -> float:
        """Bulk's rate beside the interactive requests, of its rate alone."""
        return median(phase.bulk_rate for phase in self.both) / median(phase.bulk_rate for phase in self.bulk)

    @property
    def all_kept(self) -> float:
        """As `bulk_kept`, the interactive texts counted in."""
        return median(p.bulk_rate + p.interactive_rate for p in self.both) / median(p.bulk_rate for p in self.bulk)

    def summary(self) -> dict[str, Any]:
        return vars(self) | {"bulk_kept": self.bulk_kept, "all_kept": self.all_kept}

    def lines(self) -> list[Line]:
        mean, slice_p95 = median(p.slice_mean for p in self.bulk), median(p.slice_p95 for p in self.bulk)
        p95, all_kept = self.p(self.both, 95), self.all_kept
        return [
            Line("capacity, texts a second", f"{self.capacity:.2f}"),
            Line("answers, all checked", f"{self.answers}"),
            Line("  wrong, or none", f"{dict(self.problems) or 0}", "0", not self.problems),
            Line("interactive requests alone, p50, p95", f"{ms(self.p(self.alone, 50))}, {ms(self.p(self.alone, 95))}"),
            Line("  beside bulk, p50, p95", f"{ms(self.p(self.both, 50))}, {ms(p95)}"),
            Line("a bulk slice, mean, p95 (between buckets)", f"{ms(mean)}, {ms(slice_p95)}"),
            Line("interactive p95, of a slice's mean", f"{p95 / mean:.2f}x", f"≤ {FACTOR}x", p95 <= FACTOR * mean),
            Line("  of a slice's p95", f"{p95 / slice_p95:.2f}x"),
            Line("bulk alone, texts a second", f"{median(p.bulk_rate for p in self.bulk):.2f}"),
            Line("  beside interactive, texts a second", f"{median(p.bulk_rate for p in self.both):.2f}"),
            Line("interactive beside it, texts a second", f"{median(p.interactive_rate for p in self.both):.2f}"),
            Line("bulk beside interactive, of bulk alone", _percent(self.bulk_kept)),
            Line("  the interactive texts counted in", _percent(all_kept), f"≥ {_percent(KEPT)}", all_kept >= KEPT),
        ]


async def run(server: LoadServer, plan: Plan) -> Scheduling:
    seen = Scheduling()
    known = Known(server, words=plan.words, seed=plan.seed)
    # Every bulk client holds a request's texts under one context, and as many are to hand for the interactive ones.
    for_bulk = (plan.bulk_clients + 1 + len(known.decks)) * plan.bulk_texts[1] // len(known.decks)
    async with server.client() as client:
        await known.prepare(client, max(texts_for_capacity(known, plan.clients), for_bulk))
    seen.capacity = await capacity(server, known, plan.capacity_seconds, plan.clients)
    for number in range(plan.rounds):
        one = _Round(server, known, plan, seen, plan.seed + number)
        seen.alone.append(await one.phase(interactive=True, bulk=False))
        seen.bulk.append(await one.phase(interactive=False, bulk=True))
        seen.both.append(await one.phase(interactive=True, bulk=True))
    return seen


class _Round:
    def __init__(self, server: LoadServer, known: Known, plan: Plan, seen: Scheduling, seed: int) -> None:
        self._server, self._known, self._plan, self._seen = server, known, plan, seen
        self._choose = random.Random(seed)

    async def phase(self, *, interactive: bool, bulk: bool) -> Phase:
        phase, answers = Phase(), []
        async with self._server.client("a") as client, self._bulk(clients=self._plan.bulk_clients if bulk else 0):
            before, started = await self._server.metrics(), time.perf_counter()

            async def send(due: float) -> None:
                texts = self._choose.choice(INTERACTIVE)
                answers.append(await ask(client, self._known.choose(self._choose, texts), texts, due=due))

            if interactive:
                rate = self._plan.share * self._seen.capacity / (sum(INTERACTIVE) / len(INTERACTIVE))
                await open_loop(rate, self._plan.seconds, self._choose.getrandbits(32), send)
            else:
                await asyncio.sleep(self._plan.seconds)
            after, seconds = await self._server.metrics(), time.perf_counter() - started
        self._note(answers)
        few = sum(answer.texts for answer in answers if answer.is_right)
        phase.interactive = [answer.seconds for answer in answers if answer.is_right]
        phase.interactive_rate = few / seconds
        phase.bulk_rate = (after.since(before, ROWS, stage="second") - few) / seconds
        phase.slice_mean = after.mean(before, SLICE, stage="second")
        phase.slice_p95 = after.quantile(before, 0.95, SLICE, stage="second")
        await self._server.until_quiet()
        return phase

    @asynccontextmanager
    async def _bulk(self, clients: int) -> AsyncIterator[None]:
        """Clients with a corpus, for as long as the block; what they wait for then is dropped."""
        if not clients:
            yield
            return
        async with self._server.client("b") as client:

            async def send() -> None:
                texts = self._choose.randint(*self._plan.bulk_texts)
                self._note([await ask_patiently(client, self._known, self._choose, texts)])

            async with going_on([send] * clients):
                await asyncio.sleep(SETTLE)
                yield

    def _note(self, answers: list[Answer]) -> None:
        self._seen.answers += len(answers)
        self._seen.problems += problems(answers)


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"
