"""Every error row, on exact status, body and headers; after each of them the service serves on."""

import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from app import errors
from app.api.openai_errors import TABLE, response_of
from app.stores.errors import StoreDamaged, StoreFull
from tests.api.test_embeddings import vectors
from tests.compare import assert_same
from tests.conftest import BUILTIN
from tests.live import V1, live_server
from tests.raw import exchange

MISSING = "ctx_" + "0" * 32


def check(response: httpx.Response, status: int, code: str | None, param: str | None, *words: str) -> None:
    """OpenAI's shape, all four keys, and the headers of every answer."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    error = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(status, "invalid_request_error")
    assert (error["type"], error["code"], error["param"]) == (kind, code, param)
    assert error["message"].endswith((".", "?"))
    for word in words:
        assert word in error["message"]
    assert "rate limit" not in error["message"].lower()
    for header in ("x-request-id", "openai-processing-ms", "openai-version"):
        assert header in response.headers


BODIES: list[tuple[dict[str, Any], int, str | None, str | None, str]] = [
    ({"input": "x"}, 400, None, "model", "Missing required parameter: 'model'"),
    ({"model": BUILTIN}, 400, None, "input", "Missing required parameter: 'input'"),
    ({"model": BUILTIN, "input": None}, 400, None, "input", "Missing required parameter: 'input'"),
    ({"model": 3, "input": "x"}, 400, None, "model", "string"),
    ({"model": BUILTIN, "input": ""}, 400, None, "input", "empty"),
    ({"model": BUILTIN, "input": []}, 400, None, "input", "empty"),
    ({"model": BUILTIN, "input": ["a", ""]}, 400, None, "input", "item 1"),
    ({"model": BUILTIN, "input": [[]]}, 400, None, "input", "non-empty"),
    ({"model": BUILTIN, "input": ["a", 1]}, 400, None, "input", "all"),
    ({"model": BUILTIN, "input": ["a"] * 700 + [None]}, 400, None, "input", "item 0 is a string, and item 700 is null"),
    ({"model": BUILTIN, "input": [[1], ["a"]]}, 400, None, "input", "item 1 is another list"),
    ({"model": BUILTIN, "input": [True]}, 400, None, "input", "item 0 is a boolean"),
    ({"model": BUILTIN, "input": [1.5]}, 400, None, "input", "all"),
    ({"model": BUILTIN, "input": {"text": "x"}}, 400, None, "input", "string"),
    ({"model": BUILTIN, "input": ["x"] * 2049}, 400, None, "input", "2048"),
    ({"model": BUILTIN, "input": "x", "encoding_format": "hex"}, 400, None, "encoding_format", "base64"),
    ({"model": BUILTIN, "input": "x", "dimensions": 0}, 400, None, "dimensions", "1"),
    ({"model": BUILTIN, "input": "x", "dimensions": "384"}, 400, None, "dimensions", "integer"),
    ({"model": BUILTIN, "input": "x", "normalize": "yes"}, 400, None, "normalize", "boolean"),
    ({"model": BUILTIN, "input": "x", "input_type": "passage"}, 400, None, "input_type", "document"),
    ({"model": BUILTIN, "input": "x", "truncate": "start"}, 400, None, "truncate", "end"),
    ({"model": BUILTIN, "input": "x", "contxt": "y"}, 400, "unknown_parameter", "contxt", "Did you mean 'context'?"),
    ({"model": BUILTIN, "input": "x", "zzz": 1}, 400, "unknown_parameter", "zzz", "Known: input"),
    ({"model": BUILTIN, "texts": "x"}, 400, "unknown_parameter", "texts", "Known: input"),
    ({"model": BUILTIN, "input": "x", "context": {"documents": ["a", 1]}}, 400, None, "context.documents[1]", "string"),
    ({"model": BUILTIN, "input": "x", "context": "default.99"}, 400, "context_not_found", "context", "/versions"),
    ({"model": BUILTIN, "input": "x", "context": {"documents": []}}, 400, None, "context.documents", "1 item"),
    ({"model": BUILTIN, "input": "x", "context": {"docs": ["a"]}}, 400, None, "context.documents", "Missing"),
    ({"model": BUILTIN, "input": "x", "context": "No Such"}, 400, None, "context", "name.version"),
    (
        {"model": BUILTIN, "input": "x", "context": "none-such"},
        400,
        "context_not_found",
        "context",
        "POST /v1/contexts",
    ),
    ({"model": BUILTIN, "input": "x", "context": MISSING}, 400, "context_not_found", "context", MISSING),
    ({"model": f"{BUILTIN}@none-such", "input": "x"}, 404, "context_not_found", "model", "none-such"),
    (
        {"model": "gpt-9", "input": "x"},
        404,
        "model_not_found",
        "model",
        "Served: builtin/minilm-context, minilm-context",
    ),
    ({"model": f"{V1}:passage", "input": "x"}, 404, "model_not_found", "model", "one of query, document, none"),
    ({"model": f"{V1}@default:passage", "input": "x"}, 404, "model_not_found", "model", "one of query, document, none"),
    ({"model": BUILTIN, "input": "x " * 300}, 400, "context_length_exceeded", "input", "maximum context length is 256"),
    ({"model": V1, "input": "x", "context": {"documents": [" "]}}, 400, None, "context", "at least one document"),
]


@pytest.mark.parametrize(("body", "status", "code", "param", "words"), BODIES)
def test_bad_bodies(  # noqa: PLR0917
    http: httpx.Client, body: dict[str, Any], status: int, code: str | None, param: str | None, words: str
) -> None:
    check(http.post("/v1/embeddings", json=body), status, code, param, words)
    assert http.post("/v1/embeddings", json={"model": BUILTIN, "input": "x"}).is_success


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"model": NaN}', b'{"a":' * 5000, b'{"input": "\xff"}'],
)
def test_bodies_that_are_no_json_object(http: httpx.Client, content: bytes) -> None:
    response = http.post("/v1/embeddings", content=content, headers={"Content-Type": "application/json"})
    check(response, 400, None, None)


def test_wrong_media_type(http: httpx.Client) -> None:
    response = http.post(
        "/v1/embeddings", content="model=x", headers={"Content-Type": "application/x-www-form-urlencoded"}
    )
    check(response, 415, "unsupported_media_type", None, "application/json is expected")
    response = http.post("/v1/contexts", content="a\n", headers={"Content-Type": "text/plain"})
    check(response, 415, "unsupported_media_type", None, "application/json or application/x-ndjson")
    response = http.put("/v1/contexts/x/embeddings", content="x", headers={"Content-Type": "text/html"})
    check(response, 415, "unsupported_media_type", None, "safetensors")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "unknown_url"),
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1", 404, "unknown_url"),
        ("GET", "/v1/v1", 404, "unknown_url"),
        ("POST", "/v1/embedding", 404, "unknown_url"),
        ("GET", "/v1/embeddings", 405, "method_not_supported"),
        ("PATCH", "/v1/contexts", 405, "method_not_supported"),
        ("DELETE", "/health", 405, "method_not_supported"),
    ],
)
def test_unknown_paths_and_methods(http: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    response = http.request(method, path)
    check(response, status, code, None, f"{method} {path}")
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(
    "path", ["/embeddings", "/v1/v1/embeddings", "/embeddings/", "/v1//embeddings", "//v1/embeddings"]
)
def test_a_base_url_that_is_not_quite_right_is_guessed(http: httpx.Client, path: str) -> None:
    url = f"{str(http.base_url).rstrip('/')}{path}"
    check(http.post(url, json={}), 404, "unknown_url", None, "Did you mean /v1/embeddings?")


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/contexts//", "/health/", "/", "/ready/", "/docs/"])
def test_a_slash_at_the_end_changes_nothing(http: httpx.Client, path: str) -> None:
    """No redirect: it would name this server as it calls itself, which is not what a client behind a proxy calls it."""
    assert http.get(path).status_code == httpx.codes.OK


@pytest.mark.parametrize("path", ["/metrics/", "/metrics//", "//metrics", "/metrics%2F", "/metrics%2f/"])
def test_metrics_have_one_name(http: httpx.Client, path: str) -> None:
    """A gateway that keeps them from the public need not know others."""
    response = http.get(f"{str(http.base_url).rstrip('/')}{path}")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/embeddings?context=legal", "'context' goes into the JSON body"),
        ("/v1/contexts?dry_run=true", "'dry_run' goes into the JSON body"),
        ("/v1/contexts?model=nope&name=x", "'name' goes into the JSON body"),
    ],
)
def test_a_field_of_the_body_in_the_query_string_is_not_passed_over(http: httpx.Client, path: str, words: str) -> None:
    body = {"model": BUILTIN, "input": "x"} if "embeddings" in path else {"name": "stray", "documents": ["a"]}
    check(http.post(path, json=body), 400, None, words.split("'")[1], words)
    assert http.get("/v1/contexts/stray").status_code == httpx.codes.NOT_FOUND


def test_a_parameter_of_the_query_string_in_the_body_is_told_where_it_goes(http: httpx.Client) -> None:
    response = http.post("/v1/contexts", json={"name": "stray", "documents": ["a"], "wait": False})
    check(response, 400, "unknown_parameter", "wait", "into the query string: ?wait=…")


def test_selectors_where_a_model_is_named_alone(http: httpx.Client) -> None:
    response = http.post("/v1/contexts", json={"name": "stray", "documents": ["a"], "model": f"{V1}:query"})
    check(response, 404, "model_not_found", "model", "without @CONTEXT and :INPUT_TYPE")


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "param"),
    [
        ("GET", "/v1/models/nope", 404, "model_not_found", "model"),
        ("GET", f"/v1/models/{BUILTIN}@nope", 404, "context_not_found", "model"),
        ("GET", "/v1/contexts/nope", 404, "context_not_found", "ref"),
        ("GET", "/v1/contexts/nope.7", 404, "context_not_found", "ref"),
        ("GET", f"/v1/contexts/{MISSING}", 404, "context_not_found", "ref"),
        ("GET", "/v1/contexts/Bad!", 400, None, "ref"),
        ("GET", "/v1/contexts/nope/versions", 404, "context_not_found", "name"),
        ("GET", "/v1/contexts/nope/embeddings", 404, "context_not_found", "ref"),
        ("DELETE", "/v1/contexts/nope", 404, "context_not_found", "ref"),
        ("DELETE", "/v1/contexts/nope.1", 404, "context_not_found", "ref"),
        ("GET", "/v1/contexts?limit=0", 400, None, "limit"),
        ("GET", "/v1/contexts?limit=ten", 400, None, "limit"),
        ("GET", "/v1/contexts?order=up", 400, None, "order"),
        ("GET", f"/v1/contexts?after={MISSING}", 400, None, "after"),
        ("GET", "/v1/contexts?model=nope", 404, "model_not_found", "model"),
    ],
)
def test_paths_that_name_nothing(  # noqa: PLR0917
    http: httpx.Client, method: str, path: str, status: int, code: str | None, param: str
) -> None:
    check(http.request(method, path), status, code, param)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "half \\ud83d", "input": "x"}',
        b'{"model": "minilm-context", "input": "x", "half \\ud83d": 1}',
        b'{"model": "minilm-context", "input": "x", "context": "half \\ud83d"}',
        b'{"model": "minilm-context", "input": "x", "context": ""}',
    ],
)
def test_half_an_emoji_is_no_500(http: httpx.Client, body: bytes) -> None:
    response = http.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json", "X-Context": "a"})
    assert response.status_code in (400, 404)
    assert list(response.json()["error"]) == ["message", "type", "param", "code"]


def test_an_unexpected_exception_is_openais_500_and_the_connection_lives(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("inner words")

    monkeypatch.setattr("app.api.operations.model_body", broken)
    check(http.get("/v1/models"), 500, None, None, "x-request-id")
    monkeypatch.undo()
    assert http.get("/v1/models").is_success


def test_openai_error_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        client.embeddings.create(model="nope", input="x")
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.embeddings.create(model=BUILTIN, input="x", extra_body={"conext": "y"})
    assert bad.value.param == "conext"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/none")


def test_request_ids(http: httpx.Client) -> None:
    assert http.get("/health", headers={"X-Request-Id": "abc-1.2:3_4"}).headers["x-request-id"] == "abc-1.2:3_4"
    for odd in ("", "a b", "x" * 129, "é"):
        made = http.get("/health", headers={b"X-Request-Id": odd.encode("latin-1")}).headers["x-request-id"]
        assert made.startswith("req_")
        assert len(made) == 36


def test_inputs_never_come_back_in_errors(http: httpx.Client) -> None:
    secret = "s3cret-t3xt"
    for body in (
        {"model": BUILTIN, "input": [secret, 1]},
        {"model": BUILTIN, "input": f"{secret} " * 400},
        {"model": BUILTIN, "input": "x", "context": {"documents": [secret, 1]}},
    ):
        response = http.post("/v1/embeddings", json=body)
        assert response.status_code == 400
        assert secret not in response.text


def test_body_limit(data_dir: Path) -> None:
    with live_server(data_dir, limits={"max_body_bytes": 1000}) as url:
        body = json.dumps({"model": V1, "input": "x" * 2000})
        headers = {"Content-Type": "application/json"}
        check(httpx.post(f"{url}/v1/embeddings", content=body, headers=headers), 413, "request_too_large", None, "1000")
        chunked = (body[i : i + 100].encode() for i in range(0, len(body), 100))
        check(httpx.post(f"{url}/v1/embeddings", content=chunked, headers=headers), 413, "request_too_large", None)
        announced = (
            b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1001\r\n\r\n"
        )
        [answer] = exchange(url, announced)  # before any of it is sent
        assert (answer.status, answer.code) == (413, "request_too_large")
        assert httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": "x"}).is_success


def test_token_limits(data_dir: Path) -> None:
    with live_server(data_dir, limits={"max_tokens_per_request": 50, "max_inputs": 20}, token_ids="reject") as url:
        response = httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": ["some words here"] * 10})
        check(response, 400, "max_tokens_per_request", "input", "at most 50")
        response = httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": ["x"] * 21})
        check(response, 400, None, "input", "at most 20")
        for ids in ([5, 6], [[5, 6]]):
            response = httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": ids})
            check(response, 400, "token_ids_not_accepted", "input", "check_embedding_ctx_length=False")


def test_token_ids_of_the_model(data_dir: Path) -> None:
    with live_server(data_dir, token_ids="model") as url:
        tokens = httpx.post(f"{url}/tokenize", json={"input": "owl", "input_type": "document"}).json()["data"][0]
        by_text = httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": "owl"}).json()["data"]
        by_ids = httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": tokens["input_ids"]}).json()["data"]
        assert by_ids == by_text
        response = httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": [[5, 1_000_000]]})
        check(response, 400, None, "input", "1000000")


def test_context_required_and_other_defaults(data_dir: Path) -> None:
    with live_server(data_dir, contexts={"require_context": True}) as url:
        response = httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": "x"})
        check(response, 400, "context_required", "context", "X-Context")
        assert httpx.post(f"{url}/v1/embeddings", json={"model": f"{V1}@default", "input": "x"}).is_success
    with live_server(data_dir, contexts={"default": "ours"}) as url:
        response = httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": "x"})
        check(response, 400, "context_required", "context", "'ours'")
        assert httpx.post(f"{url}/v1/contexts", json={"name": "ours", "documents": ["a"]}).is_success
        response = httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": "x"})
        assert response.headers["x-context-name"] == "ours"
        assert "warning" not in response.headers


def test_unknown_fields_ignored_when_told(data_dir: Path) -> None:
    with live_server(data_dir, server={"unknown_parameters": "ignore"}) as url:
        assert httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": "x", "extra": 1}).is_success


def test_without_the_first_stage(data_dir: Path) -> None:
    with live_server(data_dir / "a") as url:
        exported = httpx.get(f"{url}/v1/contexts/default/embeddings").content
        expected = vectors(httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": "x"}))
    folder = str(Path(__file__).parents[1] / "goldens" / V1)
    with live_server(data_dir / "b", [{"name": folder, "first_stage": False}]) as url:
        response = httpx.post(f"{url}/v1/contexts", json={"name": "a", "documents": ["x"]})
        check(response, 400, None, "documents", "PUT /v1/contexts/NAME/embeddings")
        check(httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": "x"}), 400, "context_required", "context")
        assert httpx.put(f"{url}/v1/contexts/default/embeddings", content=exported).status_code == 201
        assert_same(vectors(httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": "x"})), expected)


def test_every_error_has_a_row() -> None:
    def leaves(cls: type[Exception]) -> list[type[Exception]]:
        return [cls, *(leaf for sub in cls.__subclasses__() for leaf in leaves(sub))]

    abstract = {errors.ServiceError, errors.RetryableError}
    missing = [cls.__name__ for cls in leaves(errors.ServiceError) if cls not in TABLE and cls not in abstract]
    assert missing == []


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = errors.__doc__ or ""
    classes = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert [c.__name__ for c in classes if c.__name__ not in drawn and c is not errors.RetryableError] == []


@pytest.mark.parametrize(
    ("error", "status", "code", "headers"),
    [
        (errors.QueueFull("Busy.", retry_after=2.4), 429, "rate_limit_exceeded", {"retry-after": "3"}),
        (errors.QueueFull("Busy.", retry_after=2.4), 429, "rate_limit_exceeded", {"retry-after-ms": "2400"}),
        (errors.QueueFull("Busy.", retry_after=999), 429, "rate_limit_exceeded", {"retry-after": "60"}),
        (errors.NotReady("Soon.", retry_after=0.1), 503, "not_ready", {"retry-after": "1", "retry-after-ms": "1000"}),
        (errors.ContextNotReady("Soon."), 503, "context_not_ready", {"retry-after": "1"}),
        (errors.ShuttingDown("Bye."), 503, "shutting_down", {"retry-after": "1"}),
        (errors.EngineUnavailable("Ill."), 503, "engine_unavailable", {"retry-after": "1"}),
        (errors.StoreError("/secret/path broke"), 503, "engine_unavailable", {"retry-after": "1"}),
        (StoreFull("/secret/path broke"), 503, "engine_unavailable", {"retry-after": "10"}),
        (StoreDamaged("/secret/path broke"), 503, "engine_unavailable", {"x-should-retry": "false"}),
        (errors.NonFiniteEmbedding("NaN."), 500, "non_finite_embedding", {"x-should-retry": "false"}),
        (errors.ServerFault("inner words"), 500, None, {"x-should-retry": "false"}),
        (errors.Unauthenticated("Key."), 401, "invalid_api_key", {"www-authenticate": "Bearer"}),
        (RuntimeError("inner words"), 500, None, {}),
    ],
)  # fmt: skip
def test_rows_that_need_bad_luck(error: Exception, status: int, code: str | None, headers: dict[str, str]) -> None:
    response = response_of(error)
    body = json.loads(bytes(response.body))["error"]
    assert (response.status_code, body["code"]) == (status, code)
    assert headers.items() <= dict(response.headers).items()
    assert "secret" not in body["message"]
    assert "inner" not in body["message"]


def test_http_1_0_and_expect_continue(server: str) -> None:
    host, port = urlsplit(server).hostname, urlsplit(server).port
    body = json.dumps({"model": BUILTIN, "input": "x"}).encode()
    head = f"Host: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n".encode()
    for first, more in (
        (b"POST /v1/embeddings HTTP/1.0\r\n", b""),
        (b"POST /v1/embeddings HTTP/1.1\r\nConnection: close\r\n", b"Expect: 100-continue\r\n"),
    ):
        with socket.create_connection((host, port), timeout=20) as connection:
            connection.sendall(first + head + more + b"\r\n")
            if more:
                assert connection.recv(100).startswith(b"HTTP/1.1 100")
            connection.sendall(body)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
            assert b" 200 OK" in answer.split(b"\r\n")[0]
