"""Several times as much as the server can compute: who is taken is answered rightly, all others are refused at once.

The arrivals do not wait for answers. Requests are of mixed sizes, under four contexts, from three keys, one of which
asks for most. The vector cache is off. Afterwards single texts are asked for until they are as fast as before.
"""

import asyncio
import math
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from app.domain import Lane
from tests.load.known import Known
from tests.load.report import Line, ms, p50_p95, percentile
from tests.load.server import KEYS, NO_CACHE, LoadServer
from tests.load.traffic import Answer, ask, capacity, going_on, measured_rate, open_loop, problems, texts_for_capacity

QUEUE_SECONDS = 5.0
SETTINGS = {**NO_CACHE, "CDE__LIMITS__QUEUE_SECONDS": str(QUEUE_SECONDS)}
SIZES = (1, 1, 2, 3, 4, 8, 16, 32)
FEW = 8
"""Texts of an interactive request, at most: the server's default."""
SHARES = {"a": 4, "b": 1, "c": 1}
LANES = {Lane.INTERACTIVE: 2.5, Lane.BULK: 4.0}
"""How many times `limits.queue_seconds` a request may wait for its turn at worst: what comes later from other clients
and to the other lane, and has its share, was not known when the request was taken."""
PROBE_SECONDS, LOOK_SECONDS = 0.1, 0.25
IDLE_FACTOR, SMOOTH = 2.0, 5
REFUSED_WITHIN, IDLE_WITHIN = 0.05, 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """`factor`: of the capacity, which is offered for `seconds`. `clients`: that capacity is measured with.
    `known_seconds`: of what the server can compute is known beforehand, more than may wait at once. `probes`: on the
    idle server; `after`: how long they go on behind the load."""

    seconds: float = 60.0
    factor: float = 4.0
    capacity_seconds: float = 10.0
    clients: int = 4
    known_seconds: float = 3 * QUEUE_SECONDS
    words: tuple[int, int] = (5, 200)
    probes: int = 30
    after: float = 10.0
    seed: int = 0


@dataclass
class Overload:
    """Rates in texts a second; times in seconds."""

    queue_seconds: float
    capacity: float = 0.0
    offered: float = 0.0
    computed: float = 0.0
    unsent: int = 0
    answers: list[Answer] = field(default_factory=list)
    oldest: dict[str, float] = field(default_factory=dict)
    idle: list[float] = field(default_factory=list)
    recovered: float = 0.0
    quiet: float = 0.0

    @property
    def right(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.is_right]

    @property
    def refused(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.is_refused]

    @property
    def problems(self) -> Counter[str]:
        return problems(self.answers)

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        kept = {key: value for key, value in vars(self).items() if key not in ("answers", "idle")}
        return kept | {
            "requests": len(self.answers),
            "right": len(self.right),
            "refused": len(self.refused),
            "problems": self.problems,
            "refusal_ms": _spread(self.refused),
            "refusal_server_ms": _spread(self.refused, server=True),
            "idle_ms": {q: 1000 * percentile(self.idle, q) for q in (50, 95)},
            "by_key": {key: _kept(self.answers, key) for key in KEYS},
        }

    def _oldest(self, lane: Lane) -> Line:
        age, most = self.oldest.get(lane, 0.0), self.queue_seconds * LANES[lane]
        return Line(f"longest wait for a turn, {lane}", f"{age:.1f} s", f"≤ {most:.1f} s", age <= most)

    def lines(self) -> list[Line]:
        refusal = percentile([answer.seconds for answer in self.refused], 50)
        inside = percentile([answer.server_seconds for answer in self.refused], 50)
        few = [answer.seconds for answer in self.right if answer.texts <= FEW]
        many = [answer.seconds for answer in self.right if answer.texts > FEW]
        return [
            Line("capacity, texts a second", f"{self.capacity:.1f}"),
            Line("offered, texts a second", f"{self.offered:.1f} ({self.offered / self.capacity:.1f}x)"),
            Line("computed meanwhile, texts a second", f"{self.computed:.1f}"),
            Line("requests", f"{len(self.answers)}"),
            Line("  not sent, because all known texts were in flight", f"{self.unsent}"),
            Line("  answered with the right vectors", f"{len(self.right)}"),
            Line("  refused with 429 and Retry-After", f"{len(self.refused)}"),
            Line("  anything else", f"{dict(self.problems) or 0}", "0", not self.problems),
            *(Line(f"  of key {key}, texts answered of those asked for", _kept(self.answers, key)) for key in KEYS),
            Line("a refusal, median, at the client", ms(refusal), f"≤ {ms(REFUSED_WITHIN)}", refusal <= REFUSED_WITHIN),
            Line("  by the server's clock", ms(inside)),
            Line(f"an answer of up to {FEW} texts, p50, p95", p50_p95(few)),
            Line("an answer of more, p50, p95", p50_p95(many)),
            *(self._oldest(lane) for lane in LANES),
            Line("one text on the idle server, p50, p95", p50_p95(self.idle)),
            Line(
                "as fast as idle again, after the last arrival",
                f"{self.recovered:.1f} s",
                f"≤ {IDLE_WITHIN:.0f} s",
                self.recovered <= IDLE_WITHIN,
            ),
            Line("nothing waits any more, after the last arrival", f"{self.quiet:.1f} s"),
        ]


async def run(server: LoadServer, plan: Plan) -> Overload:
    seen = Overload(float(server.limits["queue_seconds"]))
    known = Known(server, words=plan.words, seed=plan.seed)
    async with server.client() as client:
        await known.prepare(client, texts_for_capacity(known, plan.clients))
        seen.capacity = await capacity(server, known, plan.capacity_seconds, plan.clients)
        await known.grow(client, int(plan.known_seconds * seen.capacity / len(known.decks)))
        await server.until_quiet()
        for _ in range(plan.probes):
            seen.idle.append((await ask(client, known.aside, 1)).seconds)
        await _offer(server, known, plan, seen)
    return seen


async def _offer(server: LoadServer, known: Known, plan: Plan, seen: Overload) -> None:
    choose = random.Random(plan.seed)
    clients = {key: server.client(key) for key in KEYS}

    async def look() -> None:
        now = await server.metrics()
        for lane in LANES:
            seen.oldest[lane] = max(seen.oldest.get(lane, 0.0), now("cde_queue_age_seconds", lane=lane))
        await asyncio.sleep(LOOK_SECONDS)

    async def send(due: float) -> None:
        [key] = choose.choices(KEYS, [SHARES[key] for key in KEYS])
        texts = choose.choice(SIZES)
        if not known.has(texts):
            seen.unsent += 1
            return
        seen.answers.append(await ask(clients[key], known.choose(choose, texts), texts, due=due, key=key))

    rate = plan.factor * seen.capacity / (sum(SIZES) / len(SIZES))
    async with going_on([look]), asyncio.TaskGroup() as group:
        group.create_task(open_loop(rate, plan.seconds, plan.seed, send))
        seen.computed = await measured_rate(server, plan.seconds)
        # The probes come while the last of the arrivals still wait.
        recovery = group.create_task(_recovery(server, known, plan, seen.idle))
        seen.quiet = await _quiet(server)
    seen.recovered = recovery.result()
    seen.offered = sum(answer.texts for answer in seen.answers) / plan.seconds
    for client in clients.values():
        await client.aclose()


async def _recovery(server: LoadServer, known: Known, plan: Plan, idle: Sequence[float]) -> float:
    """When single texts take as long as on the idle server, from now: the median of a few, within a factor."""
    started = time.perf_counter()
    latest: deque[float] = deque(maxlen=SMOOTH)
    recovered = 0.0
    async with server.client() as client:
        while (begun := time.perf_counter()) - started < plan.after:
            answer = await ask(client, known.aside, 1)
            latest.append(answer.seconds if answer.is_right else math.inf)
            if median(latest) > IDLE_FACTOR * median(idle):
                recovered = time.perf_counter() - started
            await asyncio.sleep(max(0.0, begun + PROBE_SECONDS - time.perf_counter()))
    return recovered


async def _quiet(server: LoadServer) -> float:
    """When nothing was left waiting, from now; what the probes ask for comes one at a time."""
    started = time.perf_counter()
    while True:
        if (await server.metrics())("cde_queue_jobs") <= 1:
            return time.perf_counter() - started
        await asyncio.sleep(0.1)


def _spread(answers: Sequence[Answer], *, server: bool = False) -> dict[int, float]:
    """Percentiles in milliseconds."""
    seconds = [answer.server_seconds if server else answer.seconds for answer in answers]
    return {q: 1000 * percentile(seconds, q) for q in (50, 95, 99)}


def _kept(answers: Sequence[Answer], key: str) -> str:
    asked = sum(answer.texts for answer in answers if answer.key == key)
    right = sum(answer.texts for answer in answers if answer.key == key and answer.is_right)
    return f"{right} of {asked} ({100 * right / max(asked, 1):.0f} %)"
