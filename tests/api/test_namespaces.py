"""A key with a namespace sees, lists and uses its own contexts, and cannot learn that others exist."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.catalog import neutral_documents
from tests.api.test_auth import auth, entry
from tests.conftest import ANIMALS, COOKING
from tests.live import V1, live_server

KEYS = ("red", "blue", "none")


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("namespaces")
    file = folder / "keys.toml"
    scopes = ("embed", "contexts:read", "contexts:write")
    namespaces = {"red": 'namespace = "red"\n', "blue": 'namespace = "blue"\n', "none": ""}
    file.write_text("".join(entry(name, name, *scopes) + namespaces[name] for name in KEYS))
    with (
        live_server(folder / "data", server={"keys_file": file}) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def create(http: httpx.Client, key: str, name: str, documents: list[str]) -> dict[str, Any]:
    response = http.post("/v1/contexts", json={"name": name, "documents": documents}, headers=auth(key))
    assert response.status_code == 201, response.text
    body: dict[str, Any] = response.json()
    return body


def names_of(http: httpx.Client, key: str) -> list[str]:
    return sorted(c["name"] for c in http.get("/v1/contexts", headers=auth(key)).json()["data"])


def test_names_are_each_ones_own(http: httpx.Client) -> None:
    red, blue = create(http, "red", "same", ANIMALS), create(http, "blue", "same", COOKING)
    assert (red["version"], blue["version"]) == (1, 1)
    ids = {
        key: http.post("/v1/embeddings", json={"model": f"{V1}@same", "input": "x"}, headers=auth(key)).headers
        for key in ("red", "blue")
    }
    assert ids["red"]["x-context-id"] == red["id"]
    assert ids["blue"]["x-context-id"] == blue["id"]
    assert names_of(http, "red") == ["same"]
    listed = http.get("/v1/models", headers=auth("red")).json()["data"]
    assert [model["id"] for model in listed] == [V1, f"{V1}@same"]


def test_another_ones_context_is_as_if_it_were_not(http: httpx.Client) -> None:
    """Every answer about it is the answer about something that never was, letter for letter."""
    secret = create(http, "red", "secret", [f"{text} Quietly." for text in ANIMALS])
    absent = "ctx_" + "0" * 32
    calls: list[tuple[str, str, dict[str, Any] | None]] = [
        ("GET", "/v1/contexts/{ref}", None),
        ("GET", "/v1/contexts/{ref}/embeddings", None),
        ("DELETE", "/v1/contexts/{ref}", None),
        ("GET", "/v1/models/" + V1 + "@{ref}", None),
        ("GET", "/v1/contexts?after={ref}", None),
        ("POST", "/v1/contexts/{ref}/compatibility", {"with": "default", "texts": ["x"]}),
        ("POST", "/v1/embeddings", {"model": V1, "input": "x", "context": "{ref}"}),
        ("POST", "/v1/embeddings", {"model": V1 + "@{ref}", "input": "x"}),
    ]
    for key in ("blue", "none"):
        for there, never in (("secret", "nowhere"), ("secret.1", "nowhere.1"), (secret["id"], absent)):
            for method, path, body in calls:
                answers = []
                for ref in (there, never):
                    filled = body and {k: v.replace("{ref}", ref) if isinstance(v, str) else v for k, v in body.items()}
                    url = path.replace("{ref}", ref)
                    response = http.request(method, url, json=filled, headers=auth(key))
                    answers.append((response.status_code, response.text.replace(ref, "REF")))
                assert answers[0] == answers[1], (key, method, path)
                assert answers[0][0] >= 400
        for path in ("/v1/contexts/{name}/versions", "/v1/contexts/{name}/rollback"):
            method = "POST" if path.endswith("rollback") else "GET"
            found = [
                http.request(
                    method, path.format(name=name), json={"version": 1} if method == "POST" else None, headers=auth(key)
                )
                for name in ("secret", "nowhere")
            ]
            assert {response.status_code for response in found} == {404}
    assert http.get("/v1/contexts/secret", headers=auth("red")).json() == secret


def test_the_same_content_is_new_in_each_namespace(http: httpx.Client) -> None:
    documents = [f"{text} Loudly." for text in ANIMALS]
    ids = {create(http, key, "loud", documents)["id"] for key in KEYS}
    assert len(ids) == 1
    assert http.delete("/v1/contexts/loud", headers=auth("red")).is_success
    assert http.get("/v1/contexts/loud", headers=auth("blue")).is_success


def test_the_default_context_answers_everyone(http: httpx.Client) -> None:
    body = {"model": V1, "input": "x"}
    fallback = http.post("/v1/embeddings", json=body, headers=auth("blue"))
    assert fallback.headers["x-context-name"] == "default"
    same = {"name": "same", "documents": neutral_documents(), "selection": {"method": "first"}}
    second = http.post("/v1/contexts", json=same, headers=auth("none"))
    assert second.json()["id"] == fallback.headers["x-context-id"], "found under the other name"
    for ref in ("default", fallback.headers["x-context-id"]):
        named = http.post("/v1/embeddings", json={**body, "context": ref}, headers=auth("blue"))
        assert named.json()["data"] == fallback.json()["data"]
    assert http.get("/v1/contexts/default", headers=auth("blue")).status_code == 404
    own = create(http, "blue", "default", COOKING)
    answer = http.post("/v1/embeddings", json=body, headers=auth("blue"))
    assert answer.headers["x-context-id"] == own["id"]
    other = http.post("/v1/embeddings", json=body, headers=auth("red"))
    assert other.headers["x-context-id"] == fallback.headers["x-context-id"]


def test_inline_documents_belong_to_the_request(http: httpx.Client) -> None:
    body = {"model": V1, "input": "x", "context": {"documents": ["This is said in one request only."]}}
    used = http.post("/v1/embeddings", json=body, headers=auth("red")).headers["x-context-id"]
    refused = http.post("/v1/embeddings", json={**body, "context": used}, headers=auth("red"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_not_found")


def metric(http: httpx.Client, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = [s for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()]
    return sum(sample.value for sample in samples)


@pytest.mark.parametrize("inline", [True, False])
def test_nothing_is_answered_from_what_another_namespace_has_used(http: httpx.Client, *, inline: bool) -> None:
    """It would be quicker than what nobody used before."""
    documents = [f"{text} Secretly, {inline}." for text in ANIMALS]
    if not inline:
        for key in KEYS:
            create(http, key, "secretly", documents)
    body = {"model": V1, "input": "a secret", "context": {"documents": documents} if inline else "secretly"}
    source = "built" if inline else "loaded"

    def counted() -> list[float]:
        vectors = metric(http, "cde_vector_cache_total", outcome="computed")
        return [vectors, metric(http, "cde_context_uses_total", source=source)]

    for key in KEYS:
        for new in (1, 0):
            before = counted()
            http.post("/v1/embeddings", json=body, headers=auth(key)).raise_for_status()
            assert [now - then for then, now in zip(before, counted(), strict=True)] == [new, new], key


def test_nor_under_the_shared_default(http: httpx.Client) -> None:
    body = {"model": V1, "input": "a secret under the default"}
    for key in ("red", "none"):
        before = metric(http, "cde_vector_cache_total", outcome="computed")
        answer = http.post("/v1/embeddings", json=body, headers=auth(key))
        assert answer.headers["x-context-name"] == "default"
        assert metric(http, "cde_vector_cache_total", outcome="computed") == before + 1


def test_a_listing_is_in_the_order_of_its_own_namespace(http: httpx.Client) -> None:
    documents = [f"{text} Orderly." for text in ANIMALS]
    create(http, "red", "known", documents)
    for name, some in (("first", ANIMALS[:4]), ("guess", documents), ("last", ANIMALS[4:])):
        create(http, "blue", name, some)
    listed = [c["name"] for c in http.get("/v1/contexts", headers=auth("blue")).json()["data"]]
    assert listed[:3] == ["last", "guess", "first"]
