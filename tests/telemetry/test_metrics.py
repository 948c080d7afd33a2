"""What /metrics says, and that docs/metrics.md lists all of it."""

import asyncio
import re
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from app.engine import metrics as engine_metrics
from app.main import create_app
from app.settings import Settings
from tests.conftest import ANIMALS, COOKING
from tests.docs import metric_rows
from tests.live import V1, live_server

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Room for one context in memory."""
    folder = tmp_path_factory.mktemp("metrics")
    with live_server(folder, contexts={"cache_bytes": 5000}) as started:
        yield started


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def samples(http: httpx.Client) -> Samples:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


class Change:
    """How much samples have grown since it was made."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._before = samples(http)

    def of(self, name: str, **labels: str) -> float:
        key = name, frozenset(labels.items())
        return samples(self._http).get(key, 0.0) - self._before.get(key, 0.0)


def _table(heading: str) -> list[tuple[str, ...]]:
    """The cells of the rows below a heading of the page."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in section.splitlines() if "`" in line]
    return [row for row in rows if len(row) == 4]


def test_the_page_says_what_the_code_says() -> None:
    assert "\n".join(metric_rows()) in PAGE
    assert "\n".join(metric_rows(engine_metrics)) in PAGE


def test_the_page_lists_what_a_server_shows_and_nothing_else(http: httpx.Client) -> None:
    http.post("/v1/embeddings", json={"model": V1, "input": ["x", "y"]})
    shown = {
        f"{f.name}_total" if f.type == "counter" else f.name: f.type
        for f in text_string_to_metric_families(http.get("/metrics").text)
    }
    headings = ("Metrics", "The engine's metrics", "The process's metrics")
    listed = {row[0].strip("`"): row[1] for heading in headings for row in _table(heading)}
    assert shown == listed


def test_requests_errors_and_texts_are_counted(http: httpx.Client) -> None:
    change = Change(http)
    texts = [ANIMALS[0], COOKING[0], "word " * 3000]
    body = {"model": V1, "input": texts, "truncate": "end"}
    answer = http.post("/v1/embeddings", json=body)
    assert answer.is_success
    used = answer.json()["usage"]["prompt_tokens"]
    for wrong in ({"model": "nope", "input": "x"}, {"model": V1}, {"model": V1, "input": "word " * 3000}):
        assert http.post("/v1/embeddings", json=wrong).is_client_error
    http.get("/nowhere/private-path")
    http.request("PROPFIND", "/v1/models")
    route = {"method": "POST", "route": "/v1/embeddings"}
    assert change.of("cde_requests_total", **route, status="200") == 1
    assert change.of("cde_requests_total", **route, status="400") == 2
    assert change.of("cde_requests_total", **route, status="404") == 1
    assert change.of("cde_request_seconds_count", **route) == 4
    assert change.of("cde_requests_total", method="GET", route="unmatched", status="404") == 1
    assert change.of("cde_errors_total", status="404", code="model_not_found") == 1
    assert change.of("cde_errors_total", status="400", code="none") == 1
    assert change.of("cde_errors_total", status="400", code="context_length_exceeded") == 1
    assert change.of("cde_errors_total", status="404", code="unknown_url") == 1
    assert change.of("cde_errors_total", status="405", code="method_not_supported") == 1
    assert change.of("cde_tokens_total", model=V1) == used
    assert change.of("cde_compute_tokens_total", model=V1) == int(answer.headers["x-compute-tokens"])
    assert change.of("cde_truncated_inputs_total", model=V1) == 1
    assert change.of("cde_request_inputs_sum") == 3
    assert samples(http)["cde_requests_in_flight", frozenset()] == 1
    text = http.get("/metrics").text
    assert "private" not in text
    assert "PROPFIND" not in text, "labels never come from the caller"
    assert "nope" not in text


def test_contexts_in_memory_and_builds_are_counted(http: httpx.Client) -> None:
    change = Change(http)
    for documents in (ANIMALS, COOKING):
        body = {"model": V1, "input": "x", "context": {"documents": documents}}
        assert http.post("/v1/embeddings", json=body).is_success
    assert http.post("/v1/contexts", json={"name": "counted", "documents": ANIMALS}).is_success
    for _ in range(2):
        assert http.post("/v1/embeddings", json={"model": f"{V1}@counted", "input": "y"}).is_success
    assert change.of("cde_context_uses_total", source="built") == 2
    assert change.of("cde_context_uses_total", source="loaded") == 1
    assert change.of("cde_context_uses_total", source="resident") == 1
    assert change.of("cde_context_evictions_total") >= 2
    assert change.of("cde_context_builds_total", outcome="completed") == 1
    assert change.of("cde_first_stage_documents_total", model=V1) == 2 * len(ANIMALS) + len(COOKING)
    now = samples(http)
    assert now["cde_contexts_resident", frozenset()] == 1
    assert 4096 <= now["cde_contexts_resident_bytes", frozenset()] < 5000
    assert now["cde_contexts_building", frozenset()] == 0
    assert change.of("cde_store_seconds_count", operation="write") > 0
    assert change.of("cde_store_seconds_count", operation="read") > 0


def test_a_store_that_fails_is_counted(data_dir: Path) -> None:
    with live_server(data_dir) as url, httpx.Client(base_url=url) as http:
        change = Change(http)
        with sqlite3.connect(data_dir / "contexts.sqlite3") as database:
            database.execute("CREATE TRIGGER no BEFORE UPDATE ON payloads BEGIN SELECT RAISE(ABORT, 'no room'); END")
        response = http.post("/v1/contexts", json={"name": "lost", "documents": ANIMALS})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
        assert change.of("cde_store_failures_total", operation="write") >= 1
        assert change.of("cde_store_retries_total") >= 1, "a constraint may be another writer's doing"
        assert change.of("cde_context_builds_total", outcome="failed") == 1
        assert change.of("cde_errors_total", status="503", code="engine_unavailable") == 1


def test_a_client_that_goes_away_is_a_499(url: str, http: httpx.Client) -> None:
    change = Change(http)
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
        connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    gone = {"method": "POST", "route": "/v1/embeddings", "status": "499"}
    deadline = time.monotonic() + 20
    while change.of("cde_requests_total", **gone) == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert change.of("cde_requests_total", **gone) == 1


@pytest.mark.parametrize("version", ["", "; version=1.0.0", "; version=rubbish", "; version=999"])
def test_openmetrics_where_it_is_asked_for(http: httpx.Client, version: str) -> None:
    accept = f"application/openmetrics-text{version},text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    response = http.get("/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {f.name for f in openmetrics_families(response.text)}
    assert {"cde_requests", "cde_request_seconds"} <= families


def test_ready_is_0_before_the_models_are_loaded() -> None:
    async def page() -> str:
        transport = httpx.ASGITransport(app=create_app(Settings()))  # which starts nothing
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return (await client.get("/metrics")).text

    assert "cde_ready 0.0" in asyncio.run(page())
