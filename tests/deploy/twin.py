"""The compose file's topology as processes on this machine: nginx, three servers, PostgreSQL.

`python -m tests.deploy.twin --seconds 120` does to it, under load, what happens to fleets, and prints a table.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from app.domain import InputType
from app.payloads import from_safetensors
from tests.compare import assert_same
from tests.conftest import ANIMALS, COOKING
from tests.deploy.gateway import Gateway
from tests.deploy.load import Answer, Load
from tests.deploy.replica import Replica
from tests.live import V1
from tests.models.conftest import embed, load_golden, tokenized
from tests.postgres import new_database, postgres_server

RATE = 20.0
TEXTS = [f"{text} Number {i}." for i, text in enumerate(ANIMALS + COOKING)]
CORPORA = {"animals": ANIMALS, "cooking": COOKING}
MOVED = "everywhere"


class Twin:
    """Three replicas behind the gateway, and the load on it. Methods are what happens to fleets."""

    def __init__(self, folder: Path, database: str, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._settings = {"CDE__CONTEXTS__DATABASE_URL": database, "CDE__LIMITS__VECTOR_CACHE_BYTES": "0"}
        self._started = 0
        started = [self._start() for _ in range(3)]
        self.replicas = [replica.wait_ready() for replica in started]
        self.gateway = stack.enter_context(Gateway(self._addresses()))
        for name, documents in CORPORA.items():
            self._create(self.gateway.url, name, documents)
        self.load = Load(f"{self.gateway.url}/v1", [f"{V1}@{name}" for name in CORPORA], TEXTS, RATE)
        self.steps: list[tuple[str, float]] = []
        """What was done, and when it began (`time.monotonic()`)."""

    def steady(self, seconds: float) -> Counter[str]:
        """Nothing but load: how many embedding requests each replica answered."""
        self._step(f"{len(self.replicas)} replicas")
        before = len(self.gateway.entries())
        time.sleep(seconds)
        entries = self.gateway.entries()[before:]
        return Counter(entry["replica"] for entry in entries if entry["path"] == "/v1/embeddings")

    def move_a_context(self) -> None:
        """A name made on one replica, then pointed elsewhere there; a second later each replica uses the newer."""
        self._step("context made, and moved")
        for documents in (ANIMALS[:6] + COOKING[:6], COOKING[3:] + ANIMALS[6:]):
            made = self._create(self.replicas[0].url, MOVED, documents)
            time.sleep(1)
            used = {replica.address: self._used(replica) for replica in self.replicas}
            assert set(used.values()) == {made}, used
        self.load.models.append(f"{V1}@{MOVED}")

    def kill_one(self) -> None:
        """kill -9, of which the gateway is told nothing."""
        self._step("one killed (kill -9)")
        self.replicas.pop(0).kill()

    def add_one(self) -> None:
        self._step("one added")
        self.replicas.append(self._start().wait_ready())
        self.gateway.use(self._addresses())

    def drain_one(self) -> None:
        """SIGTERM, of which the gateway is told nothing."""
        self._step("one drained (SIGTERM)")
        assert self.replicas.pop(0).drain() == 0

    def roll(self) -> None:
        """Each replica is replaced: the new one in, the old one out."""
        self._step("rolling restart")
        for old in [*self.replicas]:
            self.replicas.append(self._start().wait_ready())
            self.replicas.remove(old)
            self.gateway.use(self._addresses())
            assert old.drain() == 0

    def check_vectors(self) -> int:
        """Each vector is that of its text under the version its answer names; how many there were."""
        loaded = load_golden(V1)
        tokens = tokenized(loaded, TEXTS, InputType.DOCUMENT)
        known: dict[str, dict[str, Any]] = {}
        for answer in self.load.answers:
            if answer.context_id not in known:
                exported = httpx.get(f"{self.gateway.url}/v1/contexts/{answer.context_id}/embeddings")
                context = loaded.model.load_context(from_safetensors(exported.raise_for_status().content))
                vectors = embed(loaded, tokens, [context] * len(TEXTS))
                known[answer.context_id] = dict(zip(TEXTS, vectors, strict=True))
            expected = np.stack([known[answer.context_id][text] for text in answer.texts])
            assert_same(np.array(answer.vectors, np.float32), expected)
        return sum(len(answer.texts) for answer in self.load.answers)

    def _step(self, name: str) -> None:
        self.steps.append((name, time.monotonic()))

    def _start(self) -> Replica:
        self._started += 1
        replica = Replica(self._folder / f"replica-{self._started}", self._settings)
        self._stack.callback(replica.end)
        return replica

    def _addresses(self) -> list[str]:
        return [replica.address for replica in self.replicas]

    def _create(self, url: str, name: str, documents: list[str]) -> str:
        made = httpx.post(f"{url}/v1/contexts", json={"name": name, "documents": documents}, timeout=60)
        return str(made.raise_for_status().json()["id"])

    def _used(self, replica: Replica) -> str:
        body = {"model": f"{V1}@{MOVED}", "input": TEXTS[0]}
        answer = httpx.post(f"{replica.url}/v1/embeddings", json=body, timeout=60).raise_for_status()
        return str(answer.headers["x-context-id"])


@contextmanager
def started_twin(folder: Path, database: str) -> Iterator[Twin]:
    """`database`: URL of an empty PostgreSQL database, or one an earlier twin has left."""
    with ExitStack() as stack:
        yield Twin(folder, database, stack)


def live(twin: Twin, seconds: float, *, roll: bool) -> Counter[str]:
    """All of it under load, for `seconds` or as long as it takes; how the load was shared at first."""
    pause = seconds / 7
    until = time.monotonic() + seconds
    with twin.load:
        shares = twin.steady(pause)
        twin.move_a_context()
        twin.kill_one()
        time.sleep(pause)
        twin.add_one()
        time.sleep(pause)
        twin.drain_one()
        time.sleep(pause)
        if roll:
            twin.roll()
        twin.steady(max(0.0, until - time.monotonic()))
    return shares


def table(twin: Twin) -> str:
    """One row for each step, until the next one."""
    rows = [
        "| | s | requests | failed | repeated by the client | p50 ms | p99 ms |",
        "|---|---|---|---|---|---|---|",
    ]
    ends = [begun for _, begun in twin.steps[1:]] + [max(a.sent + a.seconds for a in twin.load.answers)]
    for (name, begun), end in zip(twin.steps, ends, strict=True):
        answers = [answer for answer in twin.load.answers if begun <= answer.sent < end]
        failed = sum(begun <= sent < end for sent, _ in twin.load.failures)
        retried = sum(answer.retries > 0 for answer in answers)
        p50, p99 = _milliseconds(answers, 50), _milliseconds(answers, 99)
        rows.append(f"| {name} | {end - begun:.0f} | {len(answers) + failed} | {failed} | {retried} | {p50} | {p99} |")
    return "\n".join(rows)


def _milliseconds(answers: list[Answer], percent: int) -> str:
    return f"{1000 * np.percentile([answer.seconds for answer in answers], percent):.0f}" if answers else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    seconds = parser.parse_args().seconds
    with (
        postgres_server() as server,
        tempfile.TemporaryDirectory(prefix="twin") as folder,
        started_twin(Path(folder), new_database(server)) as twin,
    ):
        shares = live(twin, seconds, roll=True)
        vectors = twin.check_vectors()
        entries = [entry for entry in twin.gateway.entries() if entry["path"] == "/v1/embeddings"]
    load = twin.load
    lines = [
        table(twin),
        "",
        f"{load.sent} requests, {len(load.answers)} answered, {len(load.failures)} failed; "
        f"{vectors} vectors compared, all right",
        f"shares of the first three replicas: {sorted(shares.values())}",
        f"sent on to another replica by the gateway: {sum(', ' in entry['replica'] for entry in entries)}; "
        f"answered by it with something else than 200: {sum(entry['status'] != 200 for entry in entries)}",
        *(reason for _, reason in load.failures[:5]),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
