"""A real process at its most talkative: what callers send it is in no log line, metric, span or error."""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ANIMALS
from tests.live import V1
from tests.processes import ForkedServer
from tests.telemetry.collector import Collector, collector

SECRET = "xyzzyplugh"
KEY = {"Authorization": f"Bearer sk-{SECRET}"}
TEXT = f"What is {SECRET}?"
DOCUMENTS = [f"{text} {SECRET}" for text in ANIMALS]


@dataclass
class Traces:
    """What a process left behind: its log, its metrics, its refusals, its spans, and a vector it answered with."""

    log: str
    metrics: str
    refusals: list[httpx.Response]
    collected: Collector
    vector: list[float]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traces]:
    folder = tmp_path_factory.mktemp("private")
    keys = folder / "keys.toml"
    keys.write_text(f'[[keys]]\nname = "team"\nsha256 = "{hashlib.sha256(f"sk-{SECRET}".encode()).hexdigest()}"\n')
    with collector() as collected:
        variables = {
            "CDE__SERVER__LOG_FORMAT": "json",
            "CDE__SERVER__LOG_LEVEL": "debug",
            "CDE__SERVER__KEYS_FILE": str(keys),
            "CDE__SERVER__TRACES": "true",
            "CDE__CONTEXTS__KEEP_DOCUMENTS": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collected.url,
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        }
        with ForkedServer(folder, **variables) as server:
            with httpx.Client(base_url=server.when_ready().url, headers=KEY, timeout=60) as http:
                vector, refusals = _talk(http)
                _break(folder / "data" / "contexts.sqlite3")
                refusals += _talk_to_a_broken_store(http)
                metrics = http.get("/metrics").text
            server.stop()
        yield Traces(server.log, metrics, refusals, collected, vector)


def _talk(http: httpx.Client) -> tuple[list[float], list[httpx.Response]]:
    def post(path: str, **body: Any) -> httpx.Response:
        return http.post(path, json=body)

    parent = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "x-request-id": "r-1"}
    answer = http.post("/v1/embeddings", json={"model": V1, "input": TEXT, "user": SECRET}, headers=parent)
    taken = [
        answer,
        post("/v1/embeddings", model=V1, input="x", context={"documents": DOCUMENTS}),
        post("/v1/contexts", name="kept", documents=DOCUMENTS),
        post("/tokenize", model=V1, input=TEXT),
        http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("lines.jsonl", _lines())}),
    ]
    assert [response.is_success for response in taken] == [True] * len(taken)
    made = post("/v1/batches", input_file_id=taken[-1].json()["id"], endpoint="/v1/embeddings", completion_window="24h")
    while http.get(f"/v1/batches/{made.json()['id']}").json()["status"] not in ("completed", "failed"):
        time.sleep(0.05)
    as_json, ndjson = {"Content-Type": "application/json"}, {"Content-Type": "application/x-ndjson"}
    wrong_key = {"Authorization": f"Bearer no-{SECRET}"}
    refused = [
        http.post("/v1/embeddings", json={"model": V1, "input": TEXT}, headers=wrong_key),
        http.post("/v1/embeddings", content=f'{{"input": "{SECRET}'.encode(), headers=as_json),
        post("/v1/embeddings", model=V1, input=[TEXT, {"text": SECRET}]),
        post("/v1/embeddings", model=V1, input=f"{SECRET} " * 1000),
        post("/v1/embeddings", model=V1, input=TEXT, context={"documents": [SECRET, 1]}),
        http.post("/v1/contexts?name=bad", content=f'"a"\n{{"no": "{SECRET}"}}\n'.encode(), headers=ndjson),
    ]
    assert all(response.is_client_error for response in refused)
    return answer.json()["data"][0]["embedding"], refused


def _break(database: Path) -> None:
    """From now on statements fail that carry what callers sent."""
    refusal = "BEGIN SELECT RAISE(ABORT, 'no room'); END"
    with sqlite3.connect(database) as connection:
        connection.execute(f"CREATE TRIGGER no_context BEFORE INSERT ON versions {refusal}")
        connection.execute(f"CREATE TRIGGER no_file BEFORE INSERT ON files {refusal}")


def _talk_to_a_broken_store(http: httpx.Client) -> list[httpx.Response]:
    failed = [
        http.post("/v1/contexts", json={"name": "lost", "documents": DOCUMENTS[1:], "metadata": {"for": SECRET}}),
        http.post("/v1/files", data={"purpose": "batch"}, files={"file": (f"{SECRET}.jsonl", _lines())}),
    ]
    assert [response.status_code for response in failed] == [503, 503]
    return failed


def _lines() -> bytes:
    line = {"method": "POST", "url": "/v1/embeddings"}
    bodies = [{"model": V1, "input": TEXT}, {"model": V1, "input": [SECRET, 1]}]
    return "\n".join(json.dumps({"custom_id": str(i), "body": b} | line) for i, b in enumerate(bodies)).encode()


def test_nothing_that_was_sent_is_in_the_log(left: Traces) -> None:
    lines = [json.loads(line) for line in left.log.splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(line) for line in lines))
    assert {"DEBUG", "INFO", "ERROR"} <= {line["level"] for line in lines}
    broken = [line for line in lines if line["level"] == "ERROR" and "refuses a row: no room" in line["message"]]
    assert len(broken) >= 2, "the store's failures are told with their cause"
    assert {line["key"] for line in lines if "key" in line} == {"team"}
    assert SECRET not in left.log
    assert str(left.vector[0])[:8] not in left.log


def test_nothing_that_was_sent_is_in_metrics_or_errors(left: Traces) -> None:
    assert SECRET not in left.metrics
    for response in left.refusals:
        assert response.json()["error"]["message"]
        assert SECRET not in response.text


def test_spans_reach_the_collector_without_what_was_sent(left: Traces) -> None:
    assert left.collected.bodies
    assert all(SECRET.encode() not in body for body in left.collected.bodies)
    (resource, *_) = left.collected.resources
    about = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert (about["service.name"], about["deployment.environment.name"]) == ("cde-server", "test")
    spans = left.collected.spans
    (root,) = [span for span in spans if span.parent_span_id.hex() == "b" * 16]
    assert (root.name, root.trace_id.hex()) == ("POST /v1/embeddings", "a" * 32)
    assert {span.name for span in spans if span.parent_span_id == root.span_id} == {
        "tokenize", "context", "compute", "render",
    }  # fmt: skip
    assert all("/metrics" not in span.name and "/ready" not in span.name for span in spans)
    (line,) = [json.loads(line) for line in left.log.splitlines() if '"r-1"' in line]
    assert line["trace_id"] == "a" * 32
