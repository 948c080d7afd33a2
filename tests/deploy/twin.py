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
from sqlalchemy.engine import make_url

from app.api.auth import ALL_SCOPES
from app.domain import InputType
from app.payloads import from_safetensors
from tests.api.test_auth import entry
from tests.compare import assert_same
from tests.conftest import ANIMALS, COOKING
from tests.deploy.gateway import Gateway
from tests.deploy.load import Answer, Load
from tests.live import V1
from tests.models.conftest import embed, load_golden, tokenized
from tests.postgres import new_database, postgres_server
from tests.processes import ForkedServer

RATE = 20.0
TEXTS = [f"{text} Number {i}." for i, text in enumerate(ANIMALS + COOKING)]
CORPORA = {"animals": ANIMALS, "cooking": COOKING}
MOVED = "everywhere"
KEY, PASSWORD = "cde-a-key-that-no-log-may-show", "a-password-that-no-log-may-show"
COMPARED = 30
DRAINED_SECONDS = 60


class Twin:
    """Three replicas behind the gateway, and the load on it. Methods are what happens to fleets."""

    def __init__(self, folder: Path, database: str, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        (folder / "keys.toml").write_text(entry("twin", KEY, *ALL_SCOPES))
        with_password = make_url(database).set(password=PASSWORD)  # which this PostgreSQL does not ask for
        self._settings = {
            "CDE__CONTEXTS__DATABASE_URL": with_password.render_as_string(hide_password=False),
            "CDE__LIMITS__VECTOR_CACHE_BYTES": "0",
            "CDE__SERVER__KEYS_FILE": str(folder / "keys.toml"),
            "CDE__SERVER__GRACE_SECONDS": "1",
        }
        self._all: list[ForkedServer] = []
        started = [self._start() for _ in range(3)]
        self.replicas = [replica.when_ready() for replica in started]
        self._http = stack.enter_context(httpx.Client(timeout=60, headers={"Authorization": f"Bearer {KEY}"}))
        self.gateway = stack.enter_context(Gateway(self._addresses()))
        for name, documents in CORPORA.items():
            self._create(self.gateway.url, name, documents)
        self.load = Load(f"{self.gateway.url}/v1", KEY, [f"{V1}@{name}" for name in CORPORA], TEXTS, RATE)
        self.steps: list[tuple[str, float]] = []
        """What was done, and when it began (`time.monotonic()`)."""

    def steady(self, seconds: float) -> Counter[str]:
        """Nothing but load, until there is enough to compare: how many embedding requests each replica answered."""
        self._step(f"{len(self.replicas)} replicas")
        before, enough = len(self.gateway.entries()), len(self.load.answers) + COMPARED
        time.sleep(seconds)
        while len(self.load.answers) < enough:
            time.sleep(0.05)
        entries = self.gateway.entries()[before:]
        return Counter(line["replica"] for line in entries if line["path"] == "/v1/embeddings")

    def move_a_context(self) -> None:
        """A name made on one replica, then pointed elsewhere there; a second later each replica uses the newer."""
        self._step("context made, and moved")
        for documents in (ANIMALS[:6] + COOKING[:6], COOKING[3:] + ANIMALS[6:]):
            made = self._create(self.replicas[0].url, MOVED, documents)
            time.sleep(1)
            used = {replica.url: self._used(replica.url) for replica in self.replicas}
            assert set(used.values()) == {made}, used
        self.load.models.append(f"{V1}@{MOVED}")

    def kill_one(self) -> None:
        """kill -9, of which the gateway is told nothing."""
        self._step("one killed (kill -9)")
        process = self.replicas.pop(0).process
        process.kill()
        process.wait()

    def add_one(self) -> None:
        self._step("one added")
        self.replicas.append(self._start().when_ready())
        self.gateway.use(self._addresses())

    def drain_one(self) -> None:
        """SIGTERM, of which the gateway is told nothing."""
        self._step("one drained (SIGTERM)")
        self._drain(self.replicas.pop(0))

    def roll(self) -> None:
        """Each replica is replaced: the new one in, the old one out."""
        self._step("rolling restart")
        for old in [*self.replicas]:
            self.replicas.append(self._start().when_ready())
            self.replicas.remove(old)
            self.gateway.use(self._addresses())
            self._drain(old)

    def check_vectors(self) -> int:
        """Each vector is that of its text under the version its answer names; how many there were."""
        loaded = load_golden(V1)
        tokens = tokenized(loaded, TEXTS, InputType.DOCUMENT)
        known: dict[str, dict[str, Any]] = {}
        for answer in self.load.answers:
            if answer.context_id not in known:
                exported = self._http.get(f"{self.gateway.url}/v1/contexts/{answer.context_id}/embeddings")
                context = loaded.model.load_context(from_safetensors(exported.raise_for_status().content))
                vectors = embed(loaded, tokens, [context] * len(TEXTS))
                known[answer.context_id] = dict(zip(TEXTS, vectors, strict=True))
            expected = np.stack([known[answer.context_id][text] for text in answer.texts])
            assert_same(np.array(answer.vectors, np.float32), expected)
        return sum(len(answer.texts) for answer in self.load.answers)

    def logs(self) -> str:
        """Everything that replicas and gateway have logged."""
        return "".join([*(replica.log for replica in self._all), self.gateway.logs()])

    def _step(self, name: str) -> None:
        self.steps.append((name, time.monotonic()))

    def _start(self) -> ForkedServer:
        replica = self._stack.enter_context(ForkedServer(self._folder / f"{len(self._all)}", **self._settings))
        self._all.append(replica)
        return replica

    def _drain(self, replica: ForkedServer) -> None:
        replica.process.terminate()
        assert replica.process.wait(DRAINED_SECONDS) == 0

    def _addresses(self) -> list[str]:
        return [replica.url.removeprefix("http://") for replica in self.replicas]

    def _create(self, url: str, name: str, documents: list[str]) -> str:
        made = self._http.post(f"{url}/v1/contexts", json={"name": name, "documents": documents})
        return str(made.raise_for_status().json()["id"])

    def _used(self, url: str) -> str:
        body = {"model": f"{V1}@{MOVED}", "input": TEXTS[0]}
        answer = self._http.post(f"{url}/v1/embeddings", json=body).raise_for_status()
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
        entries = [line for line in twin.gateway.entries() if line["path"] == "/v1/embeddings"]
    load = twin.load
    lines = [
        table(twin),
        "",
        f"{load.sent} requests, {len(load.answers)} answered, {len(load.failures)} failed; "
        f"{vectors} vectors compared, all right",
        f"shares of the first three replicas: {sorted(shares.values())}",
        f"sent on to another replica by the gateway: {sum(', ' in line['replica'] for line in entries)}; "
        f"answered by it with something else than 200: {sum(line['status'] != 200 for line in entries)}",
        *(reason for _, reason in load.failures[:5]),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
