"""A full queue, deadlines, clients that leave, and who goes first: over HTTP, with the device held in a forward."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from app.builds import MOST
from app.domain import TokenizedText
from app.models.base import DeviceContext, TwoStageModel
from app.models.loading import LoadedModel, load_model
from tests.api.test_auth import auth, entry
from tests.live import V1, live_server
from tests.waiting import until

TEXT = "a fox"
COST = 40
"""Tokens as computed of one of `different`, at most: 16 + 8 context rows, and its own with its prompt."""


def different(texts: int, mark: str = "") -> list[str]:
    """Equal ones would be computed once."""
    return [f"{chr(97 + i // 26)} {chr(97 + i % 26)} {mark}" for i in range(texts)]


class Held:
    """A model whose forwards wait for `open`, once the server is up; notes what runs."""

    def __init__(self, model: TwoStageModel) -> None:
        self._model = model
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)
        self.runs: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def second_stage(self, texts: Sequence[TokenizedText], contexts: Sequence[DeviceContext]) -> Tensor:
        self._wait(len(texts))
        return self._model.second_stage(texts, contexts)

    def first_stage(self, documents: Sequence[TokenizedText], corpora: Sequence[DeviceContext]) -> Tensor:
        self._wait(len(documents))
        return self._model.first_stage(documents, corpora)

    def _wait(self, rows: int) -> None:
        self.entered.release()
        assert self.open.wait(60)
        self.runs.append(rows)


class Bench:
    """A server with one worker whose device can be held."""

    def __init__(self, url: str, model: Held) -> None:
        self.url = url
        self.model = model
        self.pool = ThreadPoolExecutor(32)

    def hold(self) -> "Future[httpx.Response]":
        """The device, in a forward of one text, behind whatever came before it."""
        self.queued(0)
        self.post("the last of what came before").result(20)
        while self.model.entered.acquire(blocking=False):
            pass
        self.model.open.clear()
        holding = self.post(TEXT)
        assert self.model.entered.acquire(timeout=20)
        self.model.runs.clear()
        return holding

    def post(
        self, texts: str | list[str], timeout: float = 60, headers: dict[str, str] | None = None, **body: Any
    ) -> "Future[httpx.Response]":
        """On a connection of its own."""
        content = {"model": V1, "input": texts, **body}
        return self.pool.submit(httpx.post, f"{self.url}/v1/embeddings", json=content, timeout=timeout, headers=headers)

    def metric(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        samples = [s for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(s.value for s in samples)

    def queued(self, jobs: int) -> None:
        """Waits until so many texts do. For a moment the gauge may be that of another engine in this process."""
        until(lambda: self.metric("cde_queue_jobs") == jobs)


@contextmanager
def held_server(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[Bench]:
    models: list[Held] = []

    def load(*args: Any) -> LoadedModel:
        loaded = load_model(*args)
        models.append(Held(loaded.model))
        return replace(loaded, model=models[0])

    monkeypatch.setattr("app.assembly.load_model", load)
    limits = {"vector_cache_bytes": 0} | settings.pop("limits", {})
    with live_server(folder, engine={"workers": 1, "batch_tokens": 4 * COST}, limits=limits, **settings) as url:
        bench = Bench(url, models[0])
        try:
            yield bench
        finally:
            bench.model.open.set()
            bench.pool.shutdown()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with held_server(tmp_path, monkeypatch, limits={"queue_tokens": 100 * COST}) as made:
        yield made


def test_a_full_queue_answers_429_at_once_and_says_when_to_come_again(bench: Bench) -> None:
    holding = bench.hold()
    first = bench.post(different(60))
    bench.queued(60)
    refused = bench.post(different(60, "x")).result(20)
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert 1000 <= int(refused.headers["retry-after-ms"]) <= 60_000
    client = openai.OpenAI(base_url=f"{bench.url}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.RateLimitError):
        client.embeddings.create(model=V1, input=different(60, "x"))
    bench.queued(60)  # still: a refusal takes no room
    bench.model.open.set()
    assert (holding.result(20).status_code, first.result(20).status_code) == (200, 200)
    assert bench.post(different(60, "x")).result(20).status_code == 200


def test_a_request_that_could_never_fit_is_a_400(bench: Bench) -> None:
    refused = bench.post(different(200)).result(20)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "max_tokens_per_request"


def test_a_deadline_passes_before_the_device_is_free(bench: Bench) -> None:
    holding = bench.hold()
    late = bench.post(different(5), headers={"x-timeout-ms": "200"}).result(20)
    assert late.status_code == 503
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert int(late.headers["retry-after"]) >= 1
    bench.queued(0)
    bench.model.open.set()
    assert holding.result(20).status_code == 200
    assert bench.model.runs == [1], "what was too late is not computed"


@pytest.mark.parametrize("given", ["0", "-5", "soon", "1.5", str(10**12)])
def test_a_deadline_is_a_number_of_milliseconds(http: httpx.Client, given: str) -> None:
    refused = http.post("/v1/embeddings", json={"model": V1, "input": TEXT}, headers={"x-timeout-ms": given})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "x-timeout-ms"


def test_a_client_that_leaves_takes_its_texts_out_of_the_queue(bench: Bench) -> None:
    before = bench.metric("cde_cancelled_texts_total", state="queued")
    holding = bench.hold()
    leaving = [bench.post(different(10, chr(97 + k)), timeout=0.3) for k in range(8)]
    for future in leaving:
        with pytest.raises(httpx.TimeoutException):
            future.result(20)
    bench.queued(0)
    assert bench.metric("cde_cancelled_texts_total", state="queued") == before + 80
    bench.model.open.set()
    assert holding.result(20).status_code == 200
    assert bench.post(TEXT).result(20).status_code == 200
    assert sum(bench.model.runs) == 2
    assert bench.metric("cde_requests_total", route="/v1/embeddings", status="499") >= 8


def test_a_client_that_leaves_ends_the_first_stage_it_waited_for(bench: Bench) -> None:
    holding = bench.hold()
    documents = {"documents": [f"the {i}th document" for i in range(400)]}
    dropped = bench.metric("cde_cancelled_texts_total", state="queued")
    leaving = bench.post(TEXT, timeout=3, context=documents)
    with pytest.raises(httpx.TimeoutException):
        leaving.result(20)
    # What was dropped had been queued. The gauge may be another engine's in this process for as long as it waits.
    until(lambda: bench.metric("cde_cancelled_texts_total", state="queued") > dropped)
    bench.queued(0)
    bench.model.open.set()
    holding.result(20)
    assert bench.model.runs == [1]


def test_a_first_stage_that_others_wait_for_goes_on(bench: Bench) -> None:
    holding = bench.hold()
    documents = {"documents": [f"the {i}th document" for i in range(20)]}
    leaving = bench.post(TEXT, timeout=0.5, context=documents)
    staying = bench.post(TEXT, context=documents)
    with pytest.raises(httpx.TimeoutException):
        leaving.result(20)
    bench.model.open.set()
    assert (holding.result(20).status_code, staying.result(20).status_code) == (200, 200)


def test_more_contexts_than_may_be_made_at_once_come_again_later(bench: Bench) -> None:
    holding = bench.hold()

    def begin(name: str) -> httpx.Response:
        body = {"name": name, "documents": [f"a document of {name}"]}
        return httpx.post(f"{bench.url}/v1/contexts", params={"wait": "false"}, json=body, timeout=20)

    assert [begin(f"c{i}").status_code for i in range(MOST)] == [202] * MOST
    refused = begin("one-more")
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert httpx.get(f"{bench.url}/v1/contexts/one-more").status_code == 404
    bench.model.open.set()
    assert holding.result(20).status_code == 200
    until(lambda: bench.metric("cde_contexts_building") == 0)
    assert begin("one-more").status_code == 202


def test_few_texts_pass_many(bench: Bench) -> None:
    holding = bench.hold()
    bulk = bench.post(different(60))
    bench.queued(60)
    single = bench.post(different(3, "y"))
    bench.queued(63)
    bench.model.open.set()
    for future in (holding, bulk, single):
        assert future.result(20).status_code == 200
    assert bench.model.runs[:2] == [1, 3]


def test_keys_have_equal_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key's many requests do not stand before another's one."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("a", "k-a", "embed") + entry("b", "k-b", "embed"))
    with held_server(tmp_path / "data", monkeypatch, server={"keys_file": file}) as bench:
        bench.model.open.clear()
        many = [bench.post(different(40, mark), headers=auth("k-a")) for mark in "abcd"]
        until(lambda: bench.metric("cde_queue_jobs") >= 156)
        few = bench.post(different(40, "e"), headers=auth("k-b"))
        until(lambda: bench.metric("cde_queue_jobs") >= 196)
        done: list[str] = []
        for name, future in (("b", few), *(("a", future) for future in many)):
            future.add_done_callback(lambda _, name=name: done.append(name))  # type: ignore[misc]
        bench.model.open.set()
        assert {future.result(20).status_code for future in (few, *many)} == {200}
        until(lambda: len(done) == 5)
        assert "b" in done[:2], "half of the device was its own"
