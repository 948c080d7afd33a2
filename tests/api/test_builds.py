"""Contexts that take their time: progress, dry runs, deaths; and the choice of diverse documents."""

import json
import threading
import time
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load
from sqlalchemy import update

from app.builds import Builds
from app.context_refs import parse_ref
from app.domain import ContextInfo, ContextStatus, Space
from app.stores.base import Begun
from app.stores.database import Database
from app.stores.sql import SqlContextStore
from app.stores.tables import versions
from tests.api.test_contexts import NDJSON, create
from tests.conftest import ANIMALS, COOKING
from tests.contract.test_store import new_context
from tests.live import V1, live_server
from tests.processes import ForkedServer

LARGE = "v1-tiny-c512"
FIRST_STAGES = 'cde_forwards_total{stage="first"}'
LONG = [f"Letter {i}: " + " ".join(f"word{i * j % 997}" for j in range(150)) for i in range(600)]


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server whose contexts take seconds, and which keeps documents."""
    folder = tmp_path_factory.mktemp("slow")
    with (
        live_server(folder, (LARGE,), contexts={"keep_documents": True}) as url,
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        yield http


def silence(database: Database) -> None:
    """As if whoever builds there had died long ago: nobody waits for the lease to run out."""
    silent = update(versions).values(beat_at=datetime.now(UTC) - timedelta(hours=1))
    database.write(lambda connection: connection.execute(silent))


def state(http: httpx.Client, ref: str) -> dict[str, Any]:
    body: dict[str, Any] = http.get(f"/v1/contexts/{ref}").raise_for_status().json()
    return body


def when_done(http: httpx.Client, ref: str) -> dict[str, Any]:
    for _ in range(600):
        body = state(http, ref)
        if body["status"] != "in_progress":
            return body
        time.sleep(0.1)
    raise AssertionError("it never ends")


def test_without_waiting(slow: httpx.Client) -> None:
    response = slow.post("/v1/contexts", params={"wait": "false"}, json={"name": "later", "documents": LONG})
    assert response.status_code == 202
    body = response.json()
    assert (body["status"], body["version"], body["progress"]) == ("in_progress", 1, {"done": 0, "total": 512})
    assert response.headers["location"] == f"/v1/contexts/{body['id']}"
    for named in ({"context": "later"}, {"model": f"{LARGE}@later"}, {"context": "later.1"}):
        refused = slow.post("/v1/embeddings", json={"model": LARGE, "input": "x"} | named)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "context_not_ready")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert slow.get("/v1/contexts/later/embeddings").status_code == 503
    again = slow.post("/v1/contexts", params={"wait": "false"}, json={"name": "later", "documents": LONG})
    assert (again.status_code, again.json()["id"]) == (202, body["id"])
    waited = slow.post("/v1/contexts", json={"name": "later", "documents": LONG})
    assert (waited.status_code, waited.json()["version"]) == (200, 1)
    done = state(slow, body["id"])
    assert (done["status"], done["progress"]) == ("completed", {"done": 512, "total": 512})
    assert slow.post("/v1/embeddings", json={"model": LARGE, "input": "x", "context": "later"}).is_success


def test_progress_moves_and_the_name_stays(slow: httpx.Client) -> None:
    first = slow.post("/v1/contexts", json={"name": "moving", "documents": ANIMALS}).json()
    lines = "".join(json.dumps(text + " again") + "\n" for text in LONG)
    params = {"name": "moving", "wait": "false", "metadata": '{"team":"zoo"}'}
    begun = slow.post("/v1/contexts", params=params, content=lines, headers=NDJSON)
    assert (begun.status_code, begun.json()["metadata"]) == (202, {"team": "zoo"})
    assert state(slow, "moving")["id"] == first["id"]
    assert [c["status"] for c in slow.get("/v1/contexts/moving/versions").json()["data"]] == [
        "in_progress",
        "completed",
    ]
    seen = set()
    while (body := state(slow, "moving.2"))["status"] == "in_progress":
        seen.add(body["progress"]["done"])
        time.sleep(0.2)
    assert seen <= set(range(0, 513, 16))
    assert state(slow, "moving")["version"] == 2


def test_kill_9_in_the_middle_is_a_failed_version(tmp_path: Path) -> None:
    with (
        ForkedServer(tmp_path, model=LARGE) as server,  # is killed at the end
        httpx.Client(base_url=server.when_ready().url, timeout=60) as http,
    ):
        body = http.post("/v1/contexts", params={"wait": "false"}, json={"name": "cut", "documents": LONG}).json()
    file = f"sqlite:///{tmp_path / 'data' / 'contexts.sqlite3'}"
    database = Database(file)
    silence(database)
    database.close()
    with (
        ForkedServer(tmp_path, model=LARGE) as server,
        httpx.Client(base_url=server.when_ready().url, timeout=60) as http,
    ):
        failed = when_done(http, "cut")
        assert (failed["id"], failed["status"]) == (body["id"], "failed")
        assert "stopped" in failed["error"]
        refused = http.post("/v1/embeddings", json={"model": LARGE, "input": "x", "context": "cut"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_not_found")
        again = http.post("/v1/contexts", params={"wait": "false"}, json={"name": "cut", "documents": LONG})
        assert (again.status_code, again.json()["version"]) == (202, 1)
        server.stop()
    database = Database(file)
    stopped = SqlContextStore(database).get(Space(LARGE), parse_ref("cut"))
    database.close()
    assert stopped is not None
    assert stopped.status is ContextStatus.FAILED
    assert "shut down" in (stopped.error or "")


def test_what_a_dead_server_began_is_built_by_who_waits_for_it(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same documents, sent again while the dead one's lease runs."""
    body, waits, finished = {"name": "orphan", "documents": ANIMALS}, threading.Event(), Builds.finished

    def waited_for(self: Builds, info: ContextInfo) -> Awaitable[ContextInfo]:
        waits.set()
        return finished(self, info)

    with live_server(data_dir) as url, ThreadPoolExecutor(1) as pool:
        planned = httpx.post(f"{url}/v1/contexts", json=body | {"dry_run": True}).raise_for_status().json()
        database = Database(f"sqlite:///{data_dir / 'contexts.sqlite3'}")
        store, space = SqlContextStore(database), Space(V1)
        default = store.get(space, parse_ref("default"))
        assert default is not None
        orphan = replace(new_context("orphan", 1, space, builder="dead"), id=planned["id"])
        _, begun = store.begin(replace(orphan, model_revision=default.model_revision))
        assert begun is Begun.OURS
        monkeypatch.setattr(Builds, "finished", waited_for)
        waiting = pool.submit(httpx.post, f"{url}/v1/contexts", json=body, timeout=60)
        assert waits.wait(60)
        assert not waiting.done()
        silence(database)
        made = waiting.result()
        database.close()
        assert (made.status_code, made.json()["version"], made.json()["status"]) == (201, 1, "completed")
        used = httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": "x", "context": "orphan"})
        assert used.headers["x-context-id"] == planned["id"] == made.json()["id"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_dry_run_makes_nothing(http: httpx.Client, stream: bool) -> None:
    name = f"dry-{stream}".lower()
    documents = [*ANIMALS, ANIMALS[0]]
    if stream:
        lines = "".join(json.dumps(d) + "\n" for d in documents)
        params = {"name": name, "model": V1, "dry_run": "true"}
        response = http.post("/v1/contexts", params=params, content=lines, headers=NDJSON)
    else:
        response = create(http, name, documents, dry_run=True)
    assert response.status_code == 200
    body = response.json()
    assert (body["dry_run"], body["version"], body["status"]) == (True, None, None)
    assert body["documents"] == {"received": 13, "chosen": 12, "duplicates": 1, "truncated": 0, "repeated": 4}
    assert http.get(f"/v1/contexts/{name}", params={"model": V1}).status_code == 404
    assert create(http, name, documents).json()["id"] == body["id"]


def test_diverse_documents_cover_more(http: httpx.Client) -> None:
    """Thirty of a kind and a few others: the others are chosen, the radius is that of the vectors."""
    documents = [f"{COOKING[i % 12]} Step {i}." for i in range(60)] + ANIMALS
    made = create(http, "wide", documents, selection={"method": "diverse", "seed": 3})
    assert made.status_code == 201, made.text
    body = made.json()
    assert body["selection"]["method"] == "diverse"
    assert body["selection"]["candidates"] == 72
    assert body["documents"] | {"truncated": 0} == {
        "received": 72, "chosen": 16, "duplicates": 0, "truncated": 0, "repeated": 0,
    }  # fmt: skip
    again = create(http, "wide", documents[::-1], selection={"method": "diverse", "seed": 3})
    assert (again.status_code, again.json()["id"]) == (200, body["id"])
    radius = body["selection"]["coverage_radius"]
    assert 0 < radius < 2
    rows = load(http.get("/v1/contexts/wide/embeddings", params={"model": V1}).content)["dataset_embeddings"]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    apart = 1 - unit @ unit.T + 2 * np.eye(len(unit))
    assert apart.min() >= radius - 1e-5, "a chosen one is farther from the others than what was left out"


def test_a_diverse_one_in_progress_is_found_again_where_it_said(slow: httpx.Client) -> None:
    """Its id is that of the documents it will have chosen."""
    body = {"name": "wide-later", "documents": LONG, "selection": {"method": "diverse"}}
    begun = slow.post("/v1/contexts", params={"wait": "false"}, json=body)
    assert (begun.status_code, begun.json()["id"]) == (202, None)
    path = begun.headers["location"]
    assert path == "/v1/contexts/wide-later.1"
    done = when_done(slow, path.rpartition("/")[2])
    assert done["status"] == "completed"
    assert done["id"].startswith("ctx_")


@pytest.mark.parametrize("count", [12, 16])
def test_diverse_with_few_documents_takes_them_all(http: httpx.Client, count: int) -> None:
    """As many as the model's 16 are few: they are known before the first stage."""
    name, documents = f"few-{count}", (ANIMALS + COOKING)[:count]
    planned = create(http, name, documents, selection={"method": "diverse"}, dry_run=True).json()
    body = create(http, name, documents, selection={"method": "diverse"}).json()
    assert planned["id"] == body["id"]
    assert body["selection"] == {"method": "diverse", "seed": 0, "candidates": count, "coverage_radius": 0.0}
    assert body["documents"]["repeated"] == 16 - count


def test_diverse_with_the_embedded_default(http: httpx.Client) -> None:
    response = create(http, "wide-minilm", ANIMALS + COOKING, "minilm-context", selection={"method": "diverse"})
    assert response.status_code == 201, response.text


def test_documents_are_kept_where_the_operator_says_so(slow: httpx.Client, http: httpx.Client) -> None:
    slow.post("/v1/contexts", json={"name": "kept", "documents": ANIMALS}).raise_for_status()
    lines = slow.get("/v1/contexts/kept/documents")
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert sorted(json.loads(line)["text"] for line in lines.text.splitlines()) == sorted(ANIMALS)
    create(http, "forgotten", ANIMALS)
    refused = http.get("/v1/contexts/forgotten/documents", params={"model": V1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "context_not_found")


def test_compatibility_is_a_number(http: httpx.Client) -> None:
    create(http, "animals-a", ANIMALS)
    create(http, "animals-b", ANIMALS[:6])
    create(http, "cooking-c", COOKING)

    def compared(ref: str, other: str, top_k: int = 3) -> dict[str, Any]:
        body = {"with": other, "texts": ANIMALS, "model": V1, "top_k": top_k}
        response = http.post(f"/v1/contexts/{ref}/compatibility", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    same = compared("animals-a", "animals-a.1")
    assert same["cosine"]["min"] == pytest.approx(1, abs=1e-6)
    assert same["overlap"] == {"top_k": 3, "mean": 1.0}
    assert compared("animals-a", "cooking-c", len(ANIMALS) - 1)["overlap"]["mean"] is None
    far = compared("animals-a", "cooking-c")
    assert far["object"] == "context.compatibility"
    assert far["context"]["name"] == "animals-a"
    assert far["with"]["name"] == "cooking-c"
    assert far["cosine"]["min"] <= far["cosine"]["mean"] < 0.9999
    by_hand = [
        np.array([d["embedding"] for d in http.post("/v1/embeddings", json=body).json()["data"]])
        for body in ({"model": f"{V1}@{name}", "input": ANIMALS} for name in ("animals-a", "cooking-c"))
    ]
    assert far["cosine"]["mean"] == pytest.approx((by_hand[0] * by_hand[1]).sum(axis=1).mean(), abs=1e-5)


@pytest.mark.parametrize(
    ("ref", "body", "status", "param"),
    [
        ("nothing", {"with": "animals-a", "texts": ["x"]}, 404, "ref"),
        ("animals-a", {"with": "nothing", "texts": ["x"]}, 400, "with"),
        ("animals-a", {"with": "animals-a", "texts": []}, 400, "texts"),
        ("animals-a", {"texts": ["x"]}, 400, "with"),
        ("animals-a", {"with": "animals-a", "texts": [""]}, 400, "texts[0]"),
    ],
)
def test_what_cannot_be_compared(http: httpx.Client, ref: str, body: dict[str, Any], status: int, param: str) -> None:
    create(http, "animals-a", ANIMALS)
    response = http.post(f"/v1/contexts/{ref}/compatibility", json={"model": V1, **body})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def first_stages(http: httpx.Client) -> float:
    """Batches of the first stage so far."""
    found = [line for line in http.get("/metrics").text.splitlines() if line.startswith(FIRST_STAGES)]
    return float(found[0].split()[1]) if found else 0.0


def test_a_mismatch_is_refused_before_any_first_stage(slow: httpx.Client) -> None:
    """412 with documents in the request costs no more than their tokens."""
    before = first_stages(slow)
    body = {"model": LARGE, "input": "x", "context": {"documents": [text + " inline" for text in LONG]}}
    response = slow.post("/v1/embeddings", json=body, headers={"x-expect-fingerprint": "fp_other"})
    assert (response.status_code, response.json()["error"]["code"]) == (412, "fingerprint_mismatch")
    assert first_stages(slow) == before
    fingerprint = slow.post("/v1/embeddings", json=body).headers["x-embedding-fingerprint"]
    assert first_stages(slow) > before
    assert slow.post("/v1/embeddings", json=body, headers={"x-expect-fingerprint": fingerprint}).is_success
