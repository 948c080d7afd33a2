"""/v1/contexts over a real server, and what survives its death."""

import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from safetensors.numpy import load, save

from tests.conftest import ANIMALS, BUILTIN, COOKING
from tests.live import V1, V2, live_server

NDJSON = {"Content-Type": "application/x-ndjson"}


def create(http: httpx.Client, name: str, documents: list[str], model: str = V1, **more: Any) -> httpx.Response:
    return http.post("/v1/contexts", json={"name": name, "documents": documents, "model": model, **more})


def test_a_context_from_json(http: httpx.Client) -> None:
    response = create(
        http, "full", [*ANIMALS, ANIMALS[0], " "], metadata={"team": "zoo"}, selection={"method": "first"}
    )
    assert response.status_code == 201
    body = response.json()
    assert list(body) == [
        "object", "id", "name", "version", "model", "status", "error", "selection", "documents", "corpus_size",
        "dimensions", "usage_bytes", "metadata", "created_at", "progress",
    ]  # fmt: skip
    assert body["object"] == "context"
    assert (body["name"], body["version"], body["model"], body["status"]) == ("full", 1, V1, "completed")
    assert body["documents"] == {"received": 14, "chosen": 12, "duplicates": 1, "truncated": 0, "repeated": 4}
    assert (body["corpus_size"], body["dimensions"]) == (16, 64)
    assert body["metadata"] == {"team": "zoo"}
    assert body["selection"] == {"method": "first", "seed": 0}
    assert abs(body["created_at"] - time.time()) < 60
    assert http.get("/v1/contexts/full", params={"model": V1}).json() == body
    again = create(http, "full", ANIMALS, selection={"method": "first"})
    assert (again.status_code, again.json()["version"], again.json()["id"]) == (200, 1, body["id"])


@pytest.mark.parametrize("method", ["random", "first"])
def test_a_stream_makes_the_same_context(http: httpx.Client, method: str) -> None:
    documents = [f"{d} Take {i}." for i, d in enumerate(ANIMALS * 10)]
    by_json = create(http, f"json-{method}", documents, selection={"method": method, "seed": 5}).json()
    lines = (json.dumps(d if i % 2 else {"text": d, "_id": i}) + "\n" for i, d in enumerate(documents))
    params = {"name": f"stream-{method}", "model": V1, "method": method, "seed": "5"}
    streamed = http.post("/v1/contexts", params=params, content=(line.encode() for line in lines), headers=NDJSON)
    assert streamed.status_code == 201, streamed.text
    assert streamed.json()["id"] == by_json["id"]
    assert streamed.json()["documents"]["received"] == 120


@pytest.mark.parametrize(
    ("content", "params", "words"),
    [
        (b'"a"\n\n{"text": 1}\n', {"name": "x"}, "Line 3"),
        (b'"a"\n{"text"\n', {"name": "x"}, "Line 2 is not valid JSON"),
        (b'"a"\n[1]', {"name": "x"}, "Line 2"),
        (b"", {"name": "x", "model": V1}, "at least one document"),
        (b'"a"', {}, "'name'"),
        (b'"a"', {"name": "x", "colour": "red"}, "'colour'"),
        (b'"a"', {"name": "x", "seed": "1.5"}, "'seed'"),
        (b'"a"', {"name": "x", "seed": "9" * 5000}, "'seed'"),
        (b'" "', {"name": "x"}, "at least one document"),
        (b'"a"', {"name": "x", "method": "best"}, "'method'"),
        (b'"a"', {"name": "X"}, "'name'"),
    ],
)
def test_bad_streams_create_nothing(http: httpx.Client, content: bytes, params: dict[str, str], words: str) -> None:
    response = http.post("/v1/contexts", params=params, content=content, headers=NDJSON)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert http.get("/v1/contexts/x").status_code == 404


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    with live_server(tmp_path, limits={"max_line_bytes": 1000}) as url:
        endless = (b"x" * 500 for _ in range(50))
        response = httpx.post(f"{url}/v1/contexts?name=x", content=endless, headers=NDJSON)
        assert response.status_code == 400
        assert "1000 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"documents": ["a"]}, "name"),
        ({"name": "x"}, "documents"),
        ({"name": "x", "documents": []}, "documents"),
        ({"name": "x", "documents": ["", " \n"], "model": V1}, "documents"),
        ({"name": "x", "documents": [1]}, "documents[0]"),
        ({"name": "Ünicode", "documents": ["a"]}, "name"),
        ({"name": "x", "documents": ["a"], "selection": {"method": "best"}}, "selection.method"),
        ({"name": "x", "documents": ["a"], "metadata": {"k" * 65: "v"}}, None),
        ({"name": "x", "documents": ["a"], "metadata": {str(i): "v" for i in range(17)}}, "metadata"),
        ({"name": "x", "documents": ["a"], "metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"name": "x", "documents": ["a"], "model": "nope"}, "model"),
    ],
)
def test_bad_json_creates_nothing(http: httpx.Client, body: dict[str, Any], param: str | None) -> None:
    response = http.post("/v1/contexts", json=body)
    assert response.status_code in (400, 404)
    if param is not None:
        assert response.json()["error"]["param"] == param
    assert http.get("/v1/contexts/x").status_code == 404


def test_versions_rollback_and_delete(http: httpx.Client) -> None:
    first = create(http, "moving", ANIMALS).json()
    second = create(http, "moving", COOKING).json()
    params = {"model": V1}
    assert (first["version"], second["version"]) == (1, 2)
    assert http.get("/v1/contexts/moving", params=params).json() == second
    versions = http.get("/v1/contexts/moving/versions", params=params).json()
    assert [c["version"] for c in versions["data"]] == [2, 1]

    def used() -> str:
        return http.post("/v1/embeddings", json={"model": f"{V1}@moving", "input": "x"}).headers["x-context-id"]

    assert used() == second["id"]
    rolled = http.post("/v1/contexts/moving/rollback", json={"version": 1, "model": V1})
    assert rolled.json() == first
    assert used() == first["id"]
    assert http.post("/v1/contexts/moving/rollback", json={"version": 9, "model": V1}).status_code == 404

    in_use = http.delete("/v1/contexts/moving.1", params=params)
    assert (in_use.status_code, in_use.json()["error"]["code"]) == (400, "context_in_use")
    deleted = http.delete("/v1/contexts/moving.2", params=params)
    assert deleted.json() == {"id": "moving.2", "object": "context.deleted", "deleted": True}
    assert http.get("/v1/contexts/moving.2", params=params).status_code == 404
    assert http.delete("/v1/contexts/moving", params=params).status_code == 200
    gone = http.post("/v1/embeddings", json={"model": V1, "context": "moving", "input": "x"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (400, "context_not_found")


def test_what_answers_without_a_name_is_not_deleted(http: httpx.Client) -> None:
    params = {"model": V1}
    refused = http.delete("/v1/contexts/default", params=params)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_in_use")
    assert "contexts.default" in refused.json()["error"]["message"]
    assert http.post("/v1/embeddings", json={"model": V1, "input": "x"}).headers["x-context-name"] == "default"
    other = create(http, "default", [f"{text} By default." for text in ANIMALS]).json()
    assert http.post("/v1/embeddings", json={"model": V1, "input": "x"}).headers["x-context-id"] == other["id"]
    assert http.post("/v1/contexts/default/rollback", json={"version": 1, "model": V1}).status_code == 200
    assert http.delete(f"/v1/contexts/{other['id']}", params=params).status_code == 200, "a version that is not used"


def test_the_listing_pages_through_everything(http: httpx.Client) -> None:
    for i in range(7):
        create(http, f"page{i}", [*ANIMALS[:4], f"Number {i // 2}."], model=V2)
    for order in ("asc", "desc"):
        names: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = http.get("/v1/contexts", params={"model": V2, "limit": 2, "order": order, **after}).json()
            names += [c["name"] for c in page["data"]]
            assert page["object"] == "list"
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
        assert len(names) == len(set(names))
        assert {f"page{i}" for i in range(7)} | {"default"} <= set(names)


@pytest.mark.parametrize("model", [BUILTIN, V1])
def test_export_and_import_make_the_same_vectors(http: httpx.Client, model: str) -> None:
    made = create(http, "source", ANIMALS, model=model).json()
    exported = http.get("/v1/contexts/source/embeddings", params={"model": model})
    assert exported.headers["content-type"] == "application/vnd.safetensors"
    assert exported.headers["x-context-id"] == made["id"]
    imported = http.put("/v1/contexts/copy/embeddings", params={"model": model}, content=exported.content)
    assert imported.status_code == 201, imported.text
    assert imported.json()["selection"]["method"] == "import"
    texts = {"input": ["an owl", "a bear"], "input_type": "document"}
    a = http.post("/v1/embeddings", json={"model": f"{model}@source", **texts}).json()["data"]
    b = http.post("/v1/embeddings", json={"model": f"{model}@copy", **texts}).json()["data"]
    assert a == b


def test_an_export_is_not_imported_for_a_model_of_the_same_shape(http: httpx.Client) -> None:
    create(http, "of-v1", ANIMALS, model=V1)
    exported = http.get("/v1/contexts/of-v1/embeddings", params={"model": V1}).content
    refused = http.put("/v1/contexts/of-v1/embeddings", params={"model": V2}, content=exported)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_model_mismatch")
    assert http.get("/v1/contexts/of-v1", params={"model": V2}).status_code == 404
    # One that does not say whose it is, or whose header has no metadata at all, is taken at its word.
    nobodys = save(load(exported))
    end = 8 + int.from_bytes(nobodys[:8], "little")
    header = b'{"__metadata__":null,' + nobodys[9:end]
    for content in (nobodys, len(header).to_bytes(8, "little") + header + nobodys[end:]):
        assert http.put("/v1/contexts/nobodys/embeddings", params={"model": V2}, content=content).is_success


def test_npy_in_and_out(http: httpx.Client) -> None:
    create(http, "arrays", ANIMALS)
    accept = {"Accept": "application/x-npy"}
    exported = http.get("/v1/contexts/arrays/embeddings", params={"model": V1}, headers=accept)
    rows = np.load(io.BytesIO(exported.content))
    assert rows.shape == (16, 64)
    headers = {"Content-Type": "application/x-npy"}
    assert (
        http.put(
            "/v1/contexts/arrays2/embeddings", params={"model": V1}, content=exported.content, headers=headers
        ).status_code
        == 201
    )
    refused = http.get("/v1/contexts/default/embeddings", headers=accept)
    assert refused.status_code == 400
    assert "safetensors" in refused.json()["error"]["message"]


def _bad_imports() -> Iterator[tuple[bytes, str]]:
    good = np.ones((16, 64), np.float32)
    yield b"", "safetensors"
    yield b"rubbish" * 10, "safetensors"
    yield save({"other": good}), "dataset_embeddings"
    yield save({"dataset_embeddings": good[:15]}), "exactly 16"
    yield save({"dataset_embeddings": good[:, :63].copy()}), "shape"
    yield save({"dataset_embeddings": good, "more": good}), "more"
    yield save({"dataset_embeddings": np.where(np.eye(16, 64) > 0, np.nan, good).astype(np.float32)}), "NaN"
    yield save({"dataset_embeddings": good.astype(np.int32)}), "int32"
    yield b"\x93NUMPY rubbish", ".npy"
    yield save({"dataset_embeddings": np.array(1, dtype=np.float32)}), "0 dimensions"
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 64)})
    yield huge.getvalue(), "shorter than its header"
    for header in (
        b"{",
        b"-" * 9000 + b"1",
        b"{1: 2, 'a': 3}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 0)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
    ):
        yield b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header, "header"
    yield save({f"none {i}": np.empty(0, np.float32) for i in range(2000)}), "header is over"


@pytest.mark.parametrize(("content", "words"), list(_bad_imports()))
def test_bad_imports_create_nothing(http: httpx.Client, content: bytes, words: str) -> None:
    response = http.put("/v1/contexts/broken/embeddings", params={"model": V1}, content=content)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]
    assert http.get("/v1/contexts/broken", params={"model": V1}).status_code == 404


def test_half_precision_is_taken_as_float32(http: httpx.Client) -> None:
    rows = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float16)
    content = save({"dataset_embeddings": rows})
    assert http.put("/v1/contexts/half/embeddings", params={"model": V1}, content=content).status_code == 201
    exported = http.get("/v1/contexts/half/embeddings", params={"model": V1}).content
    np.testing.assert_array_equal(load(exported)["dataset_embeddings"], rows.astype(np.float32))


def test_a_context_belongs_to_its_model(http: httpx.Client) -> None:
    made = create(http, "only-v1", ANIMALS, model=V1).json()
    for ref in ("only-v1", made["id"]):
        response = http.post("/v1/embeddings", json={"model": V2, "context": ref, "input": "x"})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "context_model_mismatch")


def test_a_stream_that_breaks_off_creates_nothing(http: httpx.Client, server: str) -> None:
    where = urlsplit(server)
    head = f"POST /v1/contexts?name=broken-off&model={V1} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
        connection.sendall(f"{head}Content-Type: application/x-ndjson\r\n\r\n".encode())
        for i in range(50):
            line = json.dumps(f"document {i}").encode() + b"\n"
            connection.sendall(f"{len(line):x}\r\n".encode() + line + b"\r\n")
    time.sleep(0.3)  # the server has seen the end by then; if not, the check below is the weaker for it
    assert http.get("/v1/contexts/broken-off", params={"model": V1}).status_code == 404
    assert http.post("/v1/embeddings", json={"model": V1, "input": "x"}).is_success
