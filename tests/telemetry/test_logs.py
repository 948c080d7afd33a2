"""The lines of one server process: JSON or for a person, each with its request's id."""

import asyncio
import io
import json
import logging
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from app.models.contextual import ContextualModel
from app.telemetry.logs import LogFormat, configure_logging
from app.telemetry.requests import RequestRecord, current, note, part, record_engine
from tests.live import V1, live_server
from tests.own_logging import own_logging

PARTS = ["tokenize", "context", "queue", "forward", "compute", "render", "total"]


@contextmanager
def logging_as(level: str, style: LogFormat) -> Iterator[io.StringIO]:
    """What is logged in the block."""
    with own_logging(), redirect_stderr(io.StringIO()) as stream:
        configure_logging(level, style)
        yield stream


def objects(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def of_request(stream: io.StringIO, identifier: str) -> dict[str, Any]:
    (line,) = [o for o in objects(stream) if o.get("request_id") == identifier and o["logger"] == "app.access"]
    return line


def test_a_request_is_one_line_of_json(data_dir: Path) -> None:
    with logging_as("info", "json") as stream, live_server(data_dir) as url, httpx.Client(base_url=url) as http:
        body = {"model": V1, "input": ["one", "word " * 3000], "truncate": "end"}
        answer = http.post("/v1/embeddings", json=body, headers={"x-request-id": "r-1"})
        http.post("/v1/embeddings", json={"model": "nope", "input": "x"}, headers={"x-request-id": "r-2"})
        http.get("/health", headers={"x-request-id": "r-3"})
        sent = len(answer.request.content)
    line = of_request(stream, "r-1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\+00:00", line["time"])
    parts = {f"{part}_ms": line[f"{part}_ms"] for part in PARTS}
    assert all(milliseconds >= 0 for milliseconds in parts.values())
    assert line == {
        "time": line["time"],
        "level": "INFO",
        "logger": "app.access",
        "message": "POST /v1/embeddings 200",
        "request_id": "r-1",
        "method": "POST",
        "route": "/v1/embeddings",
        "status": 200,
        "model": V1,
        "context_id": answer.headers["x-context-id"],
        "inputs": 2,
        "tokens": answer.json()["usage"]["prompt_tokens"],
        "compute_tokens": int(answer.headers["x-compute-tokens"]),
        "truncated": 1,
        "bytes_in": sent,
        "bytes_out": len(answer.content),
        **parts,
    }
    refused = of_request(stream, "r-2")
    assert (refused["status"], refused["code"], "model" in refused) == (404, "model_not_found", False)
    assert all(o.get("request_id") != "r-3" for o in objects(stream)), "looks at the health are debug"


def test_a_line_for_a_person(data_dir: Path) -> None:
    with logging_as("info", "console") as stream, live_server(data_dir) as url:
        httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": "x"}, headers={"x-request-id": "r-1"})
    (line,) = [line for line in stream.getvalue().splitlines() if " r-1 " in line]
    pattern = r"\S+ \S+ INFO    r-1 app\.access: POST /v1/embeddings 200 model=v1-tiny-c16 inputs=1 tokens=\d+ .*"
    assert re.fullmatch(pattern, line)
    assert " - uvicorn.error: Started server process" in stream.getvalue()


def test_a_traceback_has_the_requests_id(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    with logging_as("info", "json") as stream, live_server(data_dir) as url, httpx.Client(base_url=url) as http:
        monkeypatch.setattr(ContextualModel, "second_stage", broken)
        body = {"model": V1, "input": "x"}
        assert http.post("/v1/embeddings", json=body, headers={"x-request-id": "r-1"}).status_code == 500
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        line = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": body}
        file = client.files.create(file=("lines.jsonl", json.dumps(line).encode()), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        while client.batches.retrieve(made.id).status not in ("completed", "failed"):
            time.sleep(0.05)
        errors = client.batches.retrieve(made.id).error_file_id
        assert errors is not None
        answered = json.loads(client.files.content(errors).text)
    for identifier in ("r-1", answered["response"]["request_id"]):
        (error,) = [o for o in objects(stream) if o["level"] == "ERROR" and o.get("request_id") == identifier]
        assert "RuntimeError: no such kernel" in error["exception"]
        assert error["logger"] == "app.api.openai_errors"


def test_libraries_and_warnings_go_the_same_way() -> None:
    with warnings.catch_warnings(), logging_as("debug", "json") as stream:
        logging.getLogger("somebody.else").debug("never")
        logging.getLogger("somebody.else").info("their line")
        logging.getLogger("urllib3").info("never")
        logging.getLogger("app.anything").debug("our line, \ud800 and all")
        warnings.simplefilter("always")
        warnings.warn("careful", UserWarning, stacklevel=1)
    lines = objects(stream)
    assert [line["logger"] for line in lines] == ["somebody.else", "app.anything", "py.warnings"]
    assert lines[1]["message"] == "our line, \ud800 and all"
    assert "careful" in lines[2]["message"]


@pytest.mark.parametrize("style", ["console", "json"])
def test_one_event_is_one_line(style: LogFormat) -> None:
    with logging_as("info", style) as stream:
        logging.getLogger("app.x").info("a name: %s", "first\nsecond")
    assert len(stream.getvalue().splitlines()) == 1


async def test_parts_add_up_and_belong_to_their_request() -> None:
    async def request(identifier: str) -> RequestRecord:
        record = RequestRecord(identifier)
        current.set(record)
        for _ in range(2):
            with part("context"):
                await asyncio.sleep(0)
        with pytest.raises(KeyError), part("compute"):
            raise KeyError
        note(model=identifier)
        record_engine(0.25, 0.5, rows=3)
        return record

    first, second = await asyncio.gather(request("a"), request("b"))
    assert (first.facts, second.facts) == ({"model": "a"}, {"model": "b"})
    assert [*first.seconds] == ["context", "compute", "queue", "forward"]
    first.seconds |= {"context": 0.001, "compute": 0.76}
    assert first.server_timing(0.8) == (
        "context;dur=1.00, compute;dur=760.00, queue;dur=250.00, forward;dur=500.00, total;dur=800.00"
    )
    with part("nothing is noted outside of a request"):
        note(model="nobody's")
    assert current.get() is None


def test_server_timing_is_in_the_answer(server: str) -> None:
    answer = httpx.post(f"{server}/v1/embeddings", json={"model": V1, "input": "x"})
    timing = dict(entry.split(";dur=") for entry in answer.headers["server-timing"].split(", "))
    assert [*timing] == PARTS
    seconds = {name: float(duration) for name, duration in timing.items()}
    assert sum(seconds[name] for name in ("tokenize", "context", "compute", "render")) <= seconds["total"] + 0.05
    assert seconds["queue"] + seconds["forward"] <= seconds["compute"] + 0.05
    assert "server-timing" not in httpx.get(f"{server}/health").headers
