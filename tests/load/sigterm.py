"""SIGTERM under load: no request that was taken is lost. `python -m tests.load.sigterm --rounds 50` prints a table.

A round is one server process with clients that never pause. Every request that began before the server refused any
must be answered with the right vectors; later ones are refused in OpenAI's shape, or find the port closed.
"""

import argparse
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.conftest import ANIMALS, COOKING
from tests.live import V1
from tests.processes import ServerProcess

TEXTS = [*ANIMALS, *COOKING]
CLIENTS = 6
REFUSED = "requests are refused"
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Sent:
    """One request and what became of it. `error`: there was no answer."""

    began: float
    kind: str
    status: int = 0
    code: str | None = None
    closes: bool = False
    right: bool = True
    error: str = ""


@dataclass
class Round:
    """What the clients of one server process saw."""

    grace: float
    sent: list[Sent] = field(default_factory=list)
    signalled: float = 0.0
    refused: float = 0.0
    not_ready: float = 0.0
    ended: float = 0.0
    exit_code: int | None = None

    @property
    def taken(self) -> list[Sent]:
        """Begun before the server refused any."""
        return [s for s in self.sent if s.began < self.refused]

    @property
    def lost(self) -> list[Sent]:
        """Taken, and not answered, or wrongly."""
        return [s for s in self.taken if s.error or not s.right or (s.status >= 300 and s.code != "shutting_down")]

    @property
    def turned_away(self) -> list[Sent]:
        return [s for s in self.sent if s.code == "shutting_down"]

    @property
    def taken_late(self) -> list[Sent]:
        """Taken in the grace, behind SIGTERM."""
        return [s for s in self.taken if s.began >= self.signalled]

    @property
    def cut_off(self) -> list[Sent]:
        """Sent while the last answer was given and the port closed: never read by the server."""
        return [s for s in self.sent if s.error and s.began >= self.refused]

    @property
    def surprises(self) -> list[Sent]:
        """Neither served, nor refused in order, nor met by a closed port."""
        later = [s for s in self.sent if s.began >= self.refused]
        odd = [s for s in later if s.status and s.status >= 300 and s.code != "shutting_down"]
        return [*odd, *(s for s in self.turned_away if s.status != 503 or not s.closes)]


def one_round(folder: Path, *, grace: float, requests: int, clients: int = CLIENTS) -> Round:
    """Serves until so many requests are answered, then sends SIGTERM. `grace`: the server's."""
    seen = Round(grace)
    variables = {"CDE__SERVER__GRACE_SECONDS": str(grace), "CDE__LIMITS__VECTOR_CACHE_BYTES": "0"}
    with ServerProcess(folder, **variables) as server:
        url = server.when_ready().url
        expected = np.array(_embedded(httpx.post(f"{url}/v1/embeddings", json=_body(range(len(TEXTS))), timeout=60)))
        over = threading.Event()
        workers: list[Callable[[], None]] = [
            *(lambda number=n: _embeds(url, expected, number, seen, over) for n in range(clients)),
            lambda: _creates(url, seen, over),
        ]
        threads = [threading.Thread(target=work) for work in workers]
        for thread in threads:
            thread.start()
        while len(seen.sent) < requests and server.process.poll() is None:
            time.sleep(0.005)
        seen.signalled = time.time()
        server.process.send_signal(signal.SIGTERM)
        seen.not_ready = _not_ready_at(url)
        seen.exit_code = server.process.wait(60)
        seen.ended = time.time()
        over.set()
        for thread in threads:
            thread.join(30)
        seen.refused = _said(server.log, REFUSED)
    return seen


def _embeds(url: str, expected: Any, number: int, seen: Round, over: threading.Event) -> None:
    """Requests of mixed sizes on one kept-alive connection, until the port is closed."""
    choose = random.Random(number)

    def call(http: httpx.Client) -> tuple[httpx.Response, bool]:
        chosen = [choose.randrange(len(TEXTS)) for _ in range(choose.choice((1, 1, 2, 30, 120)))]
        response = http.post(f"{url}/v1/embeddings", json=_body(chosen))
        if not response.is_success:
            return response, True
        return response, bool(np.abs(np.array(_embedded(response)) - expected[chosen]).max() < TOLERANCE)

    _repeat("embed", call, seen, over)


def _creates(url: str, seen: Round, over: threading.Event) -> None:
    """Contexts, one behind the other: each of another corpus."""
    made = iter(range(1_000_000))

    def call(http: httpx.Client) -> tuple[httpx.Response, bool]:
        documents = [f"{text} {next(made)}" for text in ANIMALS]
        response = http.post(f"{url}/v1/contexts", json={"name": "moving", "documents": documents})
        return response, not response.is_success or response.json()["status"] == "completed"

    _repeat("create", call, seen, over)


def _repeat(
    kind: str, call: Callable[[httpx.Client], tuple[httpx.Response, bool]], seen: Round, over: threading.Event
) -> None:
    with httpx.Client(timeout=60) as http:
        while not over.is_set():
            began = time.time()
            try:
                response, right = call(http)
            except httpx.ConnectError:
                return
            except httpx.HTTPError as error:
                seen.sent.append(Sent(began, kind, error=f"{type(error).__name__}: {error}"))
                continue
            code = None if response.is_success else response.json()["error"]["code"]
            closes = response.headers.get("connection") == "close"
            seen.sent.append(Sent(began, kind, response.status_code, code, closes, right))
            if not response.is_success:
                time.sleep(0.005)


def _body(chosen: Any) -> dict[str, Any]:
    return {"model": V1, "input": [TEXTS[i] for i in chosen]}


def _embedded(response: httpx.Response) -> list[list[float]]:
    return [item["embedding"] for item in response.raise_for_status().json()["data"]]


def _not_ready_at(url: str) -> float:
    """When /ready first said so, or the port was closed before anybody could ask."""
    while True:
        try:
            if httpx.get(f"{url}/ready").status_code == httpx.codes.SERVICE_UNAVAILABLE:
                return time.time()
        except httpx.HTTPError:
            return time.time()


def _said(log: str, words: str) -> float:
    """When a line of the log was written."""
    line = next(line for line in log.splitlines() if words in line)
    moment = re.search(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.,]\d+(Z|[+-]\d\d:\d\d)?", line)
    assert moment, line
    return datetime.fromisoformat(moment[0].replace(",", ".")).timestamp()


def report(rounds: int, say: Callable[[str], object]) -> bool:
    """Runs so many rounds and says what they saw. Whether nothing was lost."""
    choose = random.Random(0)
    total: Counter[str] = Counter()
    not_ready, ended = 0.0, 0.0
    for i in range(rounds):
        grace = choose.choice((0.0, 0.5))
        with tempfile.TemporaryDirectory() as folder:
            seen = one_round(Path(folder), grace=grace, requests=choose.randrange(1, 200))
        total["requests taken"] += len(seen.taken)
        total["  of them begun after SIGTERM"] += len(seen.taken_late)
        total["  of them lost"] += len(seen.lost)
        total["refused with 503 shutting_down"] += len(seen.turned_away)
        total["sent as the port closed, unread"] += len(seen.cut_off)
        total["surprises"] += len(seen.surprises) + (seen.exit_code != 0)
        not_ready = max(not_ready, seen.not_ready - seen.signalled)
        ended = max(ended, seen.ended - seen.signalled - grace)
        say(f"round {i + 1}: grace {grace}, exit {seen.exit_code}, {len(seen.taken)} taken, {len(seen.lost)} lost")
        for sent in (*seen.lost, *seen.surprises):
            say(f"  {sent}")
    for name, number in total.items():
        say(f"{name:40s} {number:8d}")
    say(f"{'/ready is 503, seconds after SIGTERM':40s} {not_ready:8.2f} at most")
    say(f"{'gone, seconds after SIGTERM and grace':40s} {ended:8.2f} at most")
    return not total["  of them lost"] and not total["surprises"]


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=50)
    lossless = report(arguments.parse_args().rounds, lambda line: sys.stdout.write(f"{line}\n"))
    sys.exit(0 if lossless else 1)
