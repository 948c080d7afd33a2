"""Two server processes on one PostgreSQL: creates, moves, deletes and embeds at once.

Every vector is the one of the version its answer names. TRAFFIC_SECONDS makes it longer.
"""

import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from app.domain import InputType
from app.payloads import from_safetensors
from tests.compare import assert_same
from tests.conftest import ANIMALS, COOKING
from tests.live import V1
from tests.models.conftest import embed, load_golden, tokenized
from tests.postgres import new_database
from tests.processes import ForkedServer

SECONDS = float(os.environ.get("TRAFFIC_SECONDS", "6"))
NAMES = ("a", "b", "c")
CORPORA = [[*ANIMALS[i : i + 6], *COOKING[i : i + 3]] for i in range(6)]
TEXTS = [f"{text} Number {i}." for i, text in enumerate(ANIMALS)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, postgres: str) -> Iterator[list[str]]:
    variables = {"CDE__CONTEXTS__DATABASE_URL": new_database(postgres)}
    with (
        ForkedServer(tmp_path_factory.mktemp("one"), **variables) as one,
        ForkedServer(tmp_path_factory.mktemp("two"), **variables) as two,
    ):
        yield [server.when_ready().url for server in (one, two)]
        one.stop()
        two.stop()


class Traffic:
    """What every worker does, and what it saw."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.until = time.monotonic() + SECONDS
        self.vectors: list[tuple[str, str, list[float]]] = []
        self.arrays: dict[str, bytes] = {}
        self.surprises: list[str] = []
        self.requests = 0

    def work(self, number: int) -> None:
        choose = random.Random(number)
        with httpx.Client(timeout=60) as http:
            while time.monotonic() < self.until:
                url, name = choose.choice(self.urls), choose.choice(NAMES)
                action = choose.choices((self.embed, self.create, self.move, self.delete), (12, 4, 2, 1))[0]
                action(http, url, name, choose)
                self.requests += 1

    def embed(self, http: httpx.Client, url: str, name: str, choose: random.Random) -> None:
        text = choose.choice(TEXTS)
        response = http.post(f"{url}/v1/embeddings", json={"model": V1, "context": name, "input": text})
        if self.expected(response, {200}, {"context_not_found", "context_not_ready"}):
            vector = response.json()["data"][0]["embedding"]
            self.vectors.append((response.headers["x-context-id"], text, vector))

    def create(self, http: httpx.Client, url: str, name: str, choose: random.Random) -> None:
        body = {"name": name, "documents": choose.choice(CORPORA)}
        response = http.post(f"{url}/v1/contexts", json=body)
        # 404: deleted by somebody while it was being built.
        if self.expected(response, {200, 201}, {"context_not_found"}):
            made = response.json()["id"]
            exported = http.get(f"{url}/v1/contexts/{made}/embeddings")
            if exported.is_success:
                self.arrays[made] = exported.content

    def move(self, http: httpx.Client, url: str, name: str, choose: random.Random) -> None:
        versions = http.get(f"{url}/v1/contexts/{name}/versions")
        if self.expected(versions, {200}, {"context_not_found"}):
            version = choose.choice(versions.json()["data"])["version"]
            response = http.post(f"{url}/v1/contexts/{name}/rollback", json={"version": version})
            self.expected(response, {200}, {"context_not_found"})

    def delete(self, http: httpx.Client, url: str, name: str, _: random.Random) -> None:
        self.expected(http.delete(f"{url}/v1/contexts/{name}"), {200}, {"context_not_found"})

    def expected(self, response: httpx.Response, good: set[int], codes: set[str]) -> bool:
        if response.status_code in good:
            return True
        code = response.json()["error"]["code"]
        if code not in codes:
            self.surprises.append(response.text)
        return False


def test_no_vector_from_another_version(servers: list[str]) -> None:
    traffic = Traffic(servers)
    threads = [threading.Thread(target=traffic.work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 90)
    assert traffic.surprises == []
    known = [found for found in traffic.vectors if found[0] in traffic.arrays]
    assert len(known) > 10
    loaded = load_golden(V1)
    contexts = {i: loaded.model.load_context(from_safetensors(data)) for i, data in traffic.arrays.items()}
    for context_id, text, vector in random.Random(0).sample(known, min(len(known), 300)):
        tokens = tokenized(loaded, [text], InputType.DOCUMENT)
        assert_same(np.array(vector, np.float32), embed(loaded, tokens, [contexts[context_id]])[0])
    print(f"{traffic.requests} requests, {len(traffic.vectors)} vectors, {len(contexts)} contexts")  # noqa: T201


def test_moved_by_one_and_used_by_all_within_a_second(servers: list[str]) -> None:
    one, two = servers
    body: dict[str, Any] = {"model": V1, "context": "moved", "input": "x"}
    made = [
        httpx.post(f"{one}/v1/contexts", json={"name": "moved", "documents": corpus}).json()["id"]
        for corpus in CORPORA[:2]
    ]

    def used() -> str:
        return str(httpx.post(f"{two}/v1/embeddings", json=body).headers["x-context-id"])

    assert used() == made[1]
    httpx.post(f"{one}/v1/contexts/moved/rollback", json={"version": 1}).raise_for_status()
    time.sleep(1)
    assert used() == made[0]


def test_created_by_both_and_built_once(servers: list[str]) -> None:
    documents = [f"Letter {i} from the year {i + 1000}." for i in range(16)]
    answers: list[dict[str, Any]] = []

    def create(url: str) -> None:
        response = httpx.post(f"{url}/v1/contexts", json={"name": "both", "documents": documents}, timeout=60)
        answers.append(response.raise_for_status().json() | {"http": response.status_code})

    threads = [threading.Thread(target=create, args=(url,)) for url in servers * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 6
    assert {(answer["id"], answer["version"], answer["status"]) for answer in answers} == {
        (answers[0]["id"], 1, "completed")
    }
    assert sorted(answer["http"] for answer in answers) == [200] * 5 + [201]
