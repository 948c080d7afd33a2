"""Spans of requests, kept in memory by a provider that the process has already; over OTLP in test_privacy.py."""

import sys
from collections.abc import Iterator

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import ProxyTracerProvider, SpanKind, StatusCode

from app.errors import ConfigError
from app.main import create_app
from app.models.contextual import ContextualModel
from app.settings import Settings
from app.telemetry import requests
from app.telemetry.requests import RequestRecord, part, record_engine
from app.telemetry.tracing import Tracing
from tests.live import V1, live_server
from tests.waiting import until

TRACED = Settings.model_validate({"server": {"traces": True}})


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """Of the process's one provider; only servers with `server.traces` use it."""
    kept = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    trace.set_tracer_provider(provider)
    return kept


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, exporter: InMemorySpanExporter) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("traced")
    with live_server(folder, server={"traces": True}) as started:
        yield started


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    exporter.clear()
    yield exporter


def ended(spans: InMemorySpanExporter, *, requests: int = 1) -> tuple[ReadableSpan, ...]:
    """Those of so many requests: the last of each ends behind its answer."""
    until(lambda: sum(span.kind is SpanKind.SERVER for span in spans.get_finished_spans()) >= requests)
    return spans.get_finished_spans()


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in ended(spans)}


def test_a_request_is_a_span_with_its_parts_below(url: str, spans: InMemorySpanExporter) -> None:
    headers = {"traceparent": f"00-{'c' * 32}-{'d' * 16}-01", "x-request-id": "r-1"}
    answer = httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": ["x", "y"]}, headers=headers)
    found = by_name(spans)
    root = found.pop("POST /v1/embeddings")
    assert root.kind is SpanKind.SERVER
    assert root.parent is not None
    assert (root.parent.span_id, root.parent.is_remote) == (0xDDDDDDDDDDDDDDDD, True)
    assert root.attributes is not None
    attributes = dict(root.attributes)
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/embeddings",
        "http.response.status_code": 200,
        "cde.request_id": "r-1",
        "cde.model": V1,
        "cde.context_id": answer.headers["x-context-id"],
        "cde.inputs": 2,
        "cde.tokens": answer.json()["usage"]["prompt_tokens"],
        "cde.compute_tokens": int(answer.headers["x-compute-tokens"]),
        "cde.truncated": 0,
    }
    assert set(found) == {"tokenize", "context", "compute", "queue", "forward", "render"}
    for name, span in found.items():
        above = found["compute"] if name in ("queue", "forward") else root
        assert span.parent is not None
        assert span.parent.span_id == above.context.span_id
        assert span.context.trace_id == int("c" * 32, 16)
    metrics = httpx.get(f"{url}/metrics", headers={"Accept": "application/openmetrics-text"}).text
    assert f'# {{trace_id="{"c" * 32}"}}' in metrics, "a bucket leads to the trace"


def test_a_request_without_a_parent_begins_a_trace(url: str, spans: InMemorySpanExporter) -> None:
    assert httpx.get(f"{url}/v1/models", headers={"traceparent": "rubbish"}).is_success
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(url + path).is_success
    (root,) = ended(spans)
    assert (root.name, root.parent) == ("GET /v1/models", None)


def test_errors_are_told_by_code_and_never_by_message(
    url: str, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("private")

    monkeypatch.setattr(ContextualModel, "second_stage", broken)
    assert httpx.post(f"{url}/v1/embeddings", json={"model": "nope", "input": "x"}).status_code == 404
    assert httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": "not cached"}).status_code == 500
    finished = ended(spans, requests=2)
    refused, failed = (span for span in finished if span.name == "POST /v1/embeddings")
    assert refused.attributes is not None
    assert (refused.status.status_code, refused.attributes["cde.code"]) == (StatusCode.UNSET, "model_not_found")
    assert failed.attributes is not None
    assert (failed.status.status_code, failed.attributes["error.type"]) == (StatusCode.ERROR, "500")
    assert all("private" not in span.to_json() for span in finished)


async def test_the_engines_times_become_spans(spans: InMemorySpanExporter) -> None:
    with Tracing().request("POST", {}) as request:
        requests.current.set(RequestRecord("r-1", request))
        with part("compute"):
            record_engine(0.25, 0.5, stage="second", batch_rows=7)
    found = by_name(spans)
    compute, queue, forward = (found[name] for name in ("compute", "queue", "forward"))
    for span in (queue, forward):
        assert span.parent is not None
        assert span.parent.span_id == compute.context.span_id
    times = queue.start_time, queue.end_time, forward.start_time, forward.end_time
    assert None not in times
    began, waited, started, ended = (t for t in times if t is not None)
    assert (waited - began, started, ended - started) == (250_000_000, waited, 500_000_000)
    assert dict(forward.attributes or {}) == {"cde.stage": "second", "cde.batch_rows": 7}


def test_without_the_extra_the_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", ProxyTracerProvider)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[otel\]'"):
        create_app(TRACED)
