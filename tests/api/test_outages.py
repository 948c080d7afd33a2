"""The store is away for a while: what is in memory is served on, all else is told so, and nothing needs a restart."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from safetensors.numpy import save

from tests.api.test_batches import answers, finished, line, upload
from tests.api.test_batches import create as create_batch
from tests.api.test_embeddings import vectors
from tests.api.test_errors import check
from tests.compare import assert_same
from tests.conftest import ANIMALS, COOKING
from tests.disks import fill, small_disk
from tests.live import V1, live_server
from tests.postgres import Postgres, new_database, own_postgres

LONG = [f"Letter {i}: " + " ".join(f"word{i * j % 997}" for j in range(120)) for i in range(320)]
Away = Callable[[], Any]


@pytest.fixture(scope="module")
def own() -> Iterator[Postgres]:
    with own_postgres() as made:
        yield made


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Away]]:
    """A server, and the block in which its store is away."""
    folder = tmp_path_factory.mktemp("outage")
    contexts: dict[str, Any] = {}
    if request.param == "postgresql":
        own: Postgres = request.getfixturevalue("own")
        contexts["database_url"] = new_database(own.url)
    file = folder / "contexts.sqlite3"

    @contextmanager
    def away() -> Iterator[None]:
        if request.param == "postgresql":
            own.stop()
        else:
            file.rename(folder / "away")
        try:
            yield
        finally:
            if request.param == "postgresql":
                own.start()
            else:
                (folder / "away").rename(file)

    with live_server(folder, contexts=contexts, limits={"vector_cache_bytes": 0}) as url:
        yield url, away


def in_time(http: httpx.Client, method: str, path: str, **request: Any) -> httpx.Response:
    """As a client does that tries again when it is told to."""
    for _ in range(30):
        response = http.request(method, path, **request)
        if response.status_code != 503:
            break
        time.sleep(0.3)
    return response


def test_what_is_in_memory_is_served_on(served: tuple[str, Away]) -> None:
    url, away = served
    with httpx.Client(base_url=url, timeout=60) as http:
        made = http.post("/v1/contexts", json={"name": "legal", "documents": ANIMALS}).raise_for_status().json()
        named: list[dict[str, str]] = [{"context": "legal"}, {}]
        pinned = [{"context": made["id"]}, {"context": "legal.1"}]
        bodies = [{"model": V1, "input": "owl"} | context for context in named + pinned]
        before = [http.post("/v1/embeddings", json=body).raise_for_status() for body in bodies]
        with away():
            time.sleep(0.6)  # what was said about names is old by now
            during = [http.post("/v1/embeddings", json=body).raise_for_status() for body in bodies]
            assert [("110 cde" in answer.headers.get("warning", "")) for answer in during] == [True, True, False, False]
            for old, new in zip(before, during, strict=True):
                assert_same(vectors(new), vectors(old))
                assert new.headers["x-context-id"] == old.headers["x-context-id"]
            unknown = http.post("/v1/embeddings", json={"model": V1, "input": "owl", "context": "unknown"})
            check(unknown, 503, "engine_unavailable", None, "in memory are served on")
            assert "x-should-retry" not in unknown.headers
            for path in ("/v1/models", "/v1/contexts", "/v1/contexts/legal", "/v1/files", "/v1/batches"):
                refused = http.get(path)
                check(refused, 503, "engine_unavailable", None, "cannot be reached")
                assert 1 <= int(refused.headers["retry-after"]) <= 60
            check(
                http.post("/v1/contexts", json={"name": "new", "documents": COOKING}), 503, "engine_unavailable", None
            )
            assert http.get("/ready").status_code == 200
            assert http.get(f"/v1/models/{V1}").status_code == 200
            assert 'cde_store_fault{kind="away"} 1.0' in http.get("/metrics").text
        assert in_time(http, "POST", "/v1/contexts", json={"name": "new", "documents": COOKING}).status_code == 201
        after = [http.post("/v1/embeddings", json=body).raise_for_status() for body in bodies]
        assert [("110 cde" in answer.headers.get("warning", "")) for answer in after] == [False] * 4
        assert http.get("/v1/models").status_code == 200
        assert 'cde_store_fault{kind="away"} 0.0' in http.get("/metrics").text


def test_work_under_way_outlives_an_outage(served: tuple[str, Away]) -> None:
    """A context in its first stage when the store goes, and a batch; both are done behind it, once."""
    url, away = served
    answer: list[httpx.Response] = []

    def create() -> None:
        body = {"name": "long", "documents": LONG, "selection": {"method": "diverse"}}
        answer.append(httpx.post(f"{url}/v1/contexts", json=body, timeout=120))

    creating = threading.Thread(target=create)
    lines = [line(str(i), input=[f"{text} Line {i}." for text in ANIMALS]) for i in range(80)]
    with (
        httpx.Client(base_url=url, timeout=60) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=20) as client,
    ):
        batch = create_batch(client, upload(client, lines))
        creating.start()
        while not http.get("/v1/contexts/long").is_success:
            time.sleep(0.01)
        with away():
            creating.join(1)
            assert answer == [], "nothing is answered that is not stored"
        creating.join(120)
        assert answer[0].status_code == 201, answer[0].text
        found = in_time(http, "GET", "/v1/contexts/long").json()
        assert (found["id"], found["status"], found["version"]) == (answer[0].json()["id"], "completed", 1)
        body = {"model": V1, "input": "owl", "context": "long"}
        assert http.post("/v1/embeddings", json=body).headers["x-context-id"] == found["id"]
        done = finished(client, batch.id)
        assert (done.status, done.error_file_id) == ("completed", None)
        assert [entry["custom_id"] for entry in answers(client, done.output_file_id)] == [str(i) for i in range(80)]


def test_a_frozen_server_holds_nobody_who_does_not_need_it(own: Postgres, tmp_path: Path) -> None:
    """More callers wait for it than there are threads; texts are tokenized and embedded all the same."""
    with live_server(tmp_path, contexts={"database_url": new_database(own.url)}) as url:
        body = {"model": V1, "input": ANIMALS}
        before = httpx.post(f"{url}/v1/embeddings", json=body).raise_for_status()
        listed: list[int] = []
        callers = [
            threading.Thread(target=lambda: listed.append(httpx.get(f"{url}/v1/contexts", timeout=60).status_code))
            for _ in range(20)
        ]
        with own.frozen():
            for caller in callers:
                caller.start()
            time.sleep(0.6)
            during = [httpx.post(f"{url}/v1/embeddings", json=body, timeout=60) for _ in range(3)]
            assert httpx.post(f"{url}/tokenize", json={"input": "owl"}).status_code == 200
            assert len(listed) < len(callers), "they still wait"
        for caller in callers:
            caller.join(60)
        assert set(listed) == {200}
        for answer in during:
            assert_same(vectors(answer), vectors(before))


def test_how_long_the_last_answer_serves(tmp_path: Path) -> None:
    """With `stale_seconds` of 0 a name is asked for each time; a version that is named needs no asking."""
    with live_server(tmp_path, contexts={"stale_seconds": 0}) as url, httpx.Client(base_url=url, timeout=60) as http:
        made = http.post("/v1/contexts", json={"name": "legal", "documents": ANIMALS}).raise_for_status().json()
        bodies = [{"model": V1, "input": "owl", "context": ref} for ref in ("legal", "legal.1", made["id"])]
        for body in bodies:
            http.post("/v1/embeddings", json=body).raise_for_status()
        file = tmp_path / "contexts.sqlite3"
        away = file.rename(tmp_path / "away")
        time.sleep(0.6)
        assert [http.post("/v1/embeddings", json=body).status_code for body in bodies] == [503, 200, 200]
        away.rename(file)


def test_damaged_arrays_of_one_context(tmp_path: Path) -> None:
    """Its callers are told what to do, and not to try again; a batch does not wait for it; others are served."""
    with (
        live_server(tmp_path, contexts={"cache_bytes": 1}) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        for name, documents in (("hurt", ANIMALS), ("whole", COOKING)):
            httpx.post(f"{url}/v1/contexts", json={"name": name, "documents": documents}).raise_for_status()
        hurt = httpx.get(f"{url}/v1/contexts/hurt").json()["id"]
        with sqlite3.connect(tmp_path / "contexts.sqlite3") as database:
            database.execute("UPDATE payloads SET data = zeroblob(length(data)) WHERE id = ?", (hurt,))
        database.close()
        with pytest.raises(openai.InternalServerError, match="create it again") as refused:
            client.with_options(max_retries=5).embeddings.create(model=f"{V1}@hurt", input="owl")
        assert refused.value.status_code == 503
        assert refused.value.response.headers["x-should-retry"] == "false"
        check(httpx.get(f"{url}/v1/contexts/hurt/embeddings"), 503, "engine_unavailable", None, hurt)
        assert client.embeddings.create(model=f"{V1}@whole", input="owl").data
        lines = [line(name, input="owl", context=name) for name in ("hurt", "whole")]
        done = finished(client, create_batch(client, upload(client, lines)).id)
        assert [answer["custom_id"] for answer in answers(client, done.output_file_id)] == ["whole"]
        failed = answers(client, done.error_file_id)
        assert [(answer["custom_id"], answer["response"]["status_code"]) for answer in failed] == [("hurt", 503)]
        httpx.delete(f"{url}/v1/contexts/hurt").raise_for_status()
        httpx.post(f"{url}/v1/contexts", json={"name": "hurt", "documents": ANIMALS}).raise_for_status()
        assert client.embeddings.create(model=f"{V1}@hurt", input="owl").data


def test_a_full_disk_refuses_what_writes(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4) as disk, live_server(disk) as url:
        made = httpx.post(f"{url}/v1/contexts", json={"name": "legal", "documents": ANIMALS}).raise_for_status().json()
        filler = fill(disk)
        rows = np.zeros((16, 64), np.float32)
        for i in range(2000):  # the log has room for some
            rows[0] = i
            content = save({"dataset_embeddings": rows})
            refused = httpx.put(f"{url}/v1/contexts/import/embeddings", content=content)
            if not refused.is_success:
                break
        check(refused, 503, "engine_unavailable", None, "disk of the context store is full")
        check(httpx.delete(f"{url}/v1/contexts/legal"), 503, "engine_unavailable", None, "full")
        body = {"model": V1, "input": "owl", "context": "legal"}
        answer = httpx.post(f"{url}/v1/embeddings", json=body)
        assert (answer.headers["x-context-id"], "110" in answer.headers.get("warning", "")) == (made["id"], False)
        assert httpx.get(f"{url}/v1/models").status_code == 200
        filler.unlink()
        assert httpx.put(f"{url}/v1/contexts/import/embeddings", content=content).status_code == 201
