"""POST /v1/embeddings, field by field, over a real server."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import assembly
from app.api.embeddings import listed
from app.errors import SelfCheckError
from app.models.loading import LoadedModel, LoadOptions, load_model
from tests.compare import assert_same
from tests.conftest import ANIMALS, BUILTIN, COOKING
from tests.live import V1, live_server

Vectors = npt.NDArray[np.float32]


@pytest.fixture(scope="module", autouse=True)
def _contexts(server: str) -> None:
    for model in (BUILTIN, "v1-tiny-c16", "v2-tiny-c16"):
        for name, documents in (("animals", ANIMALS), ("cooking", COOKING)):
            body = {"name": name, "documents": documents, "model": model}
            assert httpx.post(f"{server}/v1/contexts", json=body, timeout=60).status_code in (200, 201)


def post(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/embeddings", json=body)


def vectors(response: httpx.Response) -> Vectors:
    assert response.status_code == 200, response.text
    return np.array([item["embedding"] for item in response.json()["data"]], dtype=np.float32)


def test_the_answer_is_openais(http: httpx.Client) -> None:
    response = post(http, model=BUILTIN, input=["one", "two", "one"])
    body = response.json()
    assert list(body) == ["object", "data", "model", "usage"]
    assert body["object"] == "list"
    assert body["model"] == BUILTIN
    assert body["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    assert [item["index"] for item in body["data"]] == [0, 1, 2]
    assert {item["object"] for item in body["data"]} == {"embedding"}
    assert body["data"][0]["embedding"] == body["data"][2]["embedding"]
    np.testing.assert_allclose(np.linalg.norm(vectors(response), axis=1), 1, atol=1e-6)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-compute-tokens"] == "9"
    assert response.headers["openai-version"] == "2020-10-01"
    assert int(response.headers["openai-processing-ms"]) >= 0


def test_base64_is_the_same_floats(http: httpx.Client) -> None:
    plain = vectors(post(http, model=BUILTIN, input=["one", "two"]))
    coded = post(http, model=BUILTIN, input=["one", "two"], encoding_format="base64").json()["data"]
    decoded = np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in coded])
    np.testing.assert_array_equal(decoded, plain)


def test_the_openai_client_as_it_comes(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="minilm-context", input=["one", "two"])
    assert [len(item.embedding) for item in answer.data] == [384, 384]
    assert answer.usage.total_tokens == 6
    assert client.models.retrieve(BUILTIN).id == BUILTIN
    assert client.models.retrieve(f"{BUILTIN}@animals").id == f"{BUILTIN}@animals"
    assert f"{BUILTIN}@animals" in [model.id for model in client.models.list()]


def test_without_a_context_the_embedded_default_is_stock_and_says_so(http: httpx.Client) -> None:
    response = post(http, model=BUILTIN, input="one")
    assert response.headers["x-context-name"] == "default"
    assert response.headers["x-context-id"].startswith("ctx_")
    assert response.headers["warning"].startswith("299 cde-server ")
    named = post(http, model=BUILTIN, input="one", context="animals")
    assert named.headers["x-context-name"] == "animals"
    assert "warning" not in named.headers


@pytest.mark.parametrize("model", [BUILTIN, "v1-tiny-c16", "v2-tiny-c16"])
def test_all_ways_to_name_a_context_mean_the_same(http: httpx.Client, model: str) -> None:
    info = http.get("/v1/contexts/animals", params={"model": model}).json()
    text = "The owl hunts mice."
    by_field = vectors(post(http, model=model, input=text, context="animals", input_type="document"))
    ways = [
        post(http, model=model, input=text, context="animals.1", input_type="document"),
        post(http, model=model, input=text, context=info["id"], input_type="document"),
        post(http, model=f"{model}@animals:document", input=text),
        post(http, model=f"{model}@animals.1:document", input=text),
        http.post(
            "/v1/embeddings",
            json={"model": model, "input": text},
            headers={"X-Context": "animals", "X-Input-Type": "document"},
        ),
        post(http, model=model, input=text, context={"documents": ANIMALS}, input_type="document"),
        post(http, model=f"{model}@animals", input=text, context="animals", input_type="document"),
    ]
    for response in ways:
        np.testing.assert_allclose(vectors(response), by_field, atol=1e-6)
        assert response.headers["x-context-id"] == info["id"]
    other = vectors(post(http, model=model, input=text, context="cooking", input_type="document"))
    assert np.abs(other - by_field).max() > 1e-3


def test_sources_that_disagree_are_named(http: httpx.Client) -> None:
    response = http.post(
        "/v1/embeddings",
        json={"model": f"{BUILTIN}@cooking", "input": "x", "context": "animals"},
        headers={"X-Context": "animals"},
    )
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "'context' (animals)" in message
    assert "'model' (cooking)" in message
    response = post(http, model=f"{BUILTIN}:query", input="x", input_type="document")
    assert "'input_type' (document) and 'model' (query)" in response.json()["error"]["message"]
    response = post(http, model=f"{BUILTIN}@cooking", input="x", context={"documents": ["a"]})
    assert response.status_code == 400


@pytest.mark.parametrize(("name", "values"), [("X-Context", "animals cooking"), ("X-Input-Type", "query document")])
def test_a_header_that_comes_twice_says_one_thing(http: httpx.Client, name: str, values: str) -> None:
    first, second = values.split()

    def sent(*given: str) -> httpx.Response:
        headers = [(name, value) for value in given]
        return http.post("/v1/embeddings", json={"model": BUILTIN, "input": "x"}, headers=headers)

    assert sent(first, first).status_code == httpx.codes.OK
    refused = sent(first, second)
    assert refused.status_code == httpx.codes.BAD_REQUEST
    assert f"{first} and {second}" in refused.json()["error"]["message"]


def test_input_type_decides_the_prompt(http: httpx.Client) -> None:
    model = "v2-tiny-c16@animals"
    document = vectors(post(http, model=model, input="owl", input_type="document"))
    query = vectors(post(http, model=model, input="owl", input_type="query"))
    none = vectors(post(http, model=model, input="owl", input_type="none"))
    assert min(np.abs(a - b).max() for a, b in ((document, query), (query, none), (none, document))) > 1e-4
    assert_same(vectors(post(http, model=model, input="owl")), document)
    for kind in (None, "query"):
        prompted = vectors(post(http, model=model, input="search_query: owl", input_type=kind))
        assert_same(prompted, query)


def test_null_counts_as_absent(http: httpx.Client) -> None:
    fields = ("encoding_format", "dimensions", "user", "context", "input_type", "truncate", "normalize")
    response = post(http, model=BUILTIN, input="one", **dict.fromkeys(fields))
    assert_same(vectors(response), vectors(post(http, model=BUILTIN, input="one")))
    assert post(http, model=BUILTIN, input="one", surprise=None).status_code == 200


@given(st.lists(st.integers(0, 99_999), min_size=1, max_size=2048))
def test_the_list_of_cut_inputs_fits_into_a_proxys_buffer(indices: list[int]) -> None:
    text = listed(indices)
    whole = [int(index) for index in text.split(",")]
    assert whole == indices[: len(whole)]
    assert len(text) <= 1000
    assert whole == indices or len(f"{text},{indices[len(whole)]}") > 1000


def test_truncation_is_asked_for_and_reported(http: httpx.Client) -> None:
    long = "word " * 600
    refused = post(http, model=BUILTIN, input=["short", long])
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "maximum context length is 256 tokens, however you requested 602 tokens" in refused.text
    cut = post(http, model=BUILTIN, input=["short", long], truncate="end")
    assert (cut.headers["x-truncated-inputs"], cut.headers["x-truncated-count"]) == ("1", "1")
    np.testing.assert_allclose(vectors(cut)[1], vectors(post(http, model=BUILTIN, input="word " * 254))[0], atol=1e-6)


def test_dimensions(http: httpx.Client) -> None:
    assert post(http, model=BUILTIN, input="one", dimensions=384).status_code == 200
    refused = post(http, model=BUILTIN, input="one", dimensions=100)
    assert refused.json()["error"]["param"] == "dimensions"
    assert "384" in refused.json()["error"]["message"]


def test_normalize_false_gives_the_raw_vector(http: httpx.Client) -> None:
    raw = vectors(post(http, model="v2-tiny-c16@animals", input="owl", normalize=False))
    unit = vectors(post(http, model="v2-tiny-c16@animals", input="owl"))
    norm = np.linalg.norm(raw)
    assert abs(norm - 1) > 1e-2
    np.testing.assert_allclose(raw / norm, unit, atol=1e-6)


def test_fingerprints(http: httpx.Client) -> None:
    first = post(http, model=f"{BUILTIN}@animals", input="one").headers["x-embedding-fingerprint"]
    again = post(http, model=f"{BUILTIN}@animals:query", input="two").headers["x-embedding-fingerprint"]
    other = post(http, model=f"{BUILTIN}@cooking", input="one").headers["x-embedding-fingerprint"]
    raw = post(http, model=f"{BUILTIN}@animals", input="one", normalize=False).headers["x-embedding-fingerprint"]
    assert first == again
    assert len({first, other, raw}) == 3
    expect = {"x-expect-fingerprint": first}
    assert http.post("/v1/embeddings", json={"model": f"{BUILTIN}@animals", "input": "x"}, headers=expect).is_success
    refused = http.post("/v1/embeddings", json={"model": f"{BUILTIN}@cooking", "input": "x"}, headers=expect)
    assert refused.status_code == 412
    assert refused.json()["error"]["code"] == "fingerprint_mismatch"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "minilm-context", "input": "half an emoji \\ud83d"}',
        b'{"model": "minilm-context", "input": ["caf\\u00e9", "caf\xc3\xa9"]}',
        json.dumps({"model": "minilm-context", "input": "pretty"}, indent=2).encode(),
        b'{"model": "minilm-context", "input": "line\\nbreak \\u0000 nul"}',
        b'{"model": "minilm-context", "input": " "}',
    ],
)
def test_bodies_as_clients_really_send_them(http: httpx.Client, body: bytes) -> None:
    response = http.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    assert np.isfinite(vectors(response)).all()
    chunked = http.post(
        "/v1/embeddings?api-version=1",
        content=iter([body]),
        headers={"Content-Type": "application/json; charset=utf-8"},
    )
    assert chunked.json()["data"] == response.json()["data"]


@pytest.mark.parametrize("model", [BUILTIN, "v1-tiny-c16", "v2-tiny-c16"])
def test_a_vector_does_not_depend_on_its_company(http: httpx.Client, model: str) -> None:
    texts = ["a", *ANIMALS, "b " * 100, *COOKING]
    together = vectors(post(http, model=f"{model}@animals:document", input=texts))
    for i in (0, 5, 13, 20):
        alone = vectors(post(http, model=f"{model}@animals:document", input=texts[i]))
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)


def test_two_hundred_at_once_over_five_contexts(client: openai.OpenAI, http: httpx.Client) -> None:
    """Every answer equals the one computed alone; none is mixed up."""
    model = "v1-tiny-c16"
    for i in range(5):
        documents = [f"Topic {i}, item {j}: {COOKING[j % 12]}" for j in range(10 + i)]
        assert http.post("/v1/contexts", json={"name": f"mix{i}", "documents": documents, "model": model}).is_success
    jobs = [(f"{model}@mix{i % 5}", f"text number {i} {'and more ' * (i % 7)}") for i in range(200)]

    def embed(job: tuple[str, str]) -> list[float]:
        return client.embeddings.create(model=job[0], input=job[1]).data[0].embedding

    alone = [embed(job) for job in jobs]
    with ThreadPoolExecutor(200) as pool:
        together = list(pool.map(embed, jobs))
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len({tuple(row[:4]) for row in alone}) == 200


def test_tokenize(http: httpx.Client) -> None:
    body = http.post(
        "/tokenize", json={"model": "v1-tiny-c16", "input": ["owl", "x " * 600], "input_type": "query"}
    ).json()
    assert body["max_input_tokens"] == 512
    assert body["data"][0]["count"] == len(body["data"][0]["input_ids"]) == len(body["data"][0]["tokens"])
    assert body["data"][0]["tokens"][0] == "[CLS]"
    assert body["data"][1]["count"] > 600
    usage = post(http, model="v1-tiny-c16", input="owl", input_type="query").json()["usage"]
    assert usage["prompt_tokens"] == body["data"][0]["count"]


def test_several_devices_answer_as_one(tmp_path: Path) -> None:
    texts = [f"{text} Number {i}." for i, text in enumerate(ANIMALS)]
    answers = []
    for i, devices in enumerate(((), ("cpu", "cpu"))):
        with live_server(tmp_path / str(i), engine={"devices": devices, "workers": 1}) as url:
            answers.append(vectors(httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": texts})))
    assert_same(answers[1], answers[0])


def test_one_wrong_device_of_several_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[LoadedModel] = []

    def load(name: str, options: LoadOptions) -> LoadedModel:
        loads.append(load_model(name, options))
        if len(loads) == 3:
            loads[2].model._weights.second_stage_model.output_projection[0].bias += 1.0  # type: ignore[attr-defined]
        return loads[-1]

    monkeypatch.setattr(assembly, "load_model", load)
    with pytest.raises(SelfCheckError), live_server(tmp_path, engine={"devices": ("cpu",) * 3, "workers": 3}):
        pass
    assert len(loads) == 3
