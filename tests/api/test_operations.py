"""Models, health, readiness, metrics, info."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from app.api import operations
from app.errors import CheckpointError, ConfigError
from app.main import create_app
from app.models.loading import load_model
from app.serving import server_config
from app.settings import Settings
from tests.conftest import ANIMALS, BUILTIN
from tests.live import GOLDENS, V1, V2, live_server


def test_models_name_their_contexts(http: httpx.Client) -> None:
    models = {m["id"]: m for m in http.get("/v1/models").json()["data"]}
    assert {BUILTIN, f"{BUILTIN}@default", "v1-tiny-c16", "v1-tiny-c16@default"} <= set(models)
    own = models[BUILTIN]
    assert set(own) == {
        "id", "object", "created", "owned_by", "root", "parent", "max_input_tokens", "dimensions", "corpus_size",
        "approximate",
    }  # fmt: skip
    assert own["approximate"] is False
    assert (own["object"], own["parent"], own["max_input_tokens"], own["dimensions"]) == ("model", None, 256, 384)
    assert isinstance(own["created"], int)
    assert "not a CDE model" in own["owned_by"]
    assert models["v1-tiny-c16@default"]["parent"] == "v1-tiny-c16"


def test_every_context_is_a_model_however_many_there_are(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"page-{i}" for i in range(5)]
    for i, name in enumerate(names):
        documents = [f"The same for two of them: {i // 2}"]
        http.post("/v1/contexts", json={"name": name, "documents": documents}).raise_for_status()
    listed = [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert set(listed) >= {f"{BUILTIN}@{name}" for name in names}
    monkeypatch.setattr(operations, "PAGE", 2)
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == listed


@pytest.mark.parametrize("path", [BUILTIN, "builtin%2Fminilm-context", "minilm-context", f"{BUILTIN}@default:query"])
def test_one_model_raw_or_encoded(http: httpx.Client, path: str) -> None:
    assert http.get(f"/v1/models/{path}").json()["root"] == BUILTIN


def test_health_info_and_metrics(http: httpx.Client) -> None:
    assert http.get("/health").json() == http.get("/health/live").json() == {"status": "ok"}
    assert http.get("/ready").json() == http.get("/health/ready").json() == {"status": "ready"}
    for path in ("/health", "/health/live", "/ready", "/health/ready"):
        head = http.head(path)
        assert (head.status_code, head.content) == (200, b"")
    info = http.get("/info").json()
    assert info["models"][0]["is_cde"] is False
    assert info["models"][1] | {"semantics": "training", "dtype": "float32", "corpus_size": 16} == info["models"][1]
    http.post("/v1/embeddings", json={"model": BUILTIN, "input": "x"})
    families = {f.name: f for f in text_string_to_metric_families(http.get("/metrics").text)}
    assert any(s.labels["route"] == "/v1/embeddings" for s in families["cde_requests"].samples)
    assert families["cde_queue_tokens"].samples[0].value == 0


def test_the_api_pages_need_no_other_machine(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.status_code == 200
    parts = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert [part.rpartition(".")[2] for part in parts] == ["css", "png", "js"]
    assert all(http.get(part).status_code == 200 for part in parts)
    assert "https://" not in page.text
    assert http.get("/static-offline-docs/nothing.js").json()["error"]["code"] == "unknown_url"


def test_the_port_opens_before_the_models_are_loaded(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        loading.set()
        assert go_on.wait(30)
        return load_model(*args)

    monkeypatch.setattr("app.assembly.load_model", slow)
    tree = {"models": [{"name": str(GOLDENS / V1)}], "data_dir": data_dir, "server": {"port": 0}}
    settings = Settings.model_validate(tree)
    server = uvicorn.Server(server_config(create_app(settings), settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert loading.wait(30)
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    assert httpx.get(f"{url}/health").status_code == 200
    for path in ("/ready", "/v1/models", "/v1/contexts"):
        response = httpx.get(url + path)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
        assert response.headers["retry-after"] == "2"
    go_on.set()
    while httpx.get(f"{url}/ready").status_code != 200:
        time.sleep(0.01)
    server.should_exit = True
    thread.join(30)


def test_a_failed_start_is_told(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with (
        pytest.raises(CheckpointError, match=r"has no config\.json"),
        live_server(data_dir, (str(tmp_path / "nothing"),)),
    ):
        pass


def test_matryoshka_cuts_then_normalises(data_dir: Path) -> None:
    model = {"name": str(GOLDENS / V1), "matryoshka": True, "aliases": ["text-embedding-3-small"]}
    with live_server(data_dir, [model]) as url:
        body = {"model": "text-embedding-3-small", "input": "x"}
        raw = httpx.post(f"{url}/v1/embeddings", json={**body, "normalize": False}).json()["data"][0]["embedding"]
        cut = httpx.post(f"{url}/v1/embeddings", json={**body, "dimensions": 10}).json()["data"][0]["embedding"]
        np.testing.assert_allclose(cut, np.array(raw[:10]) / np.linalg.norm(raw[:10]), atol=1e-6)
        assert httpx.post(f"{url}/v1/embeddings", json={**body, "dimensions": 65}).status_code == 400


def test_cors_is_off_unless_set(http: httpx.Client, data_dir: Path) -> None:
    headers = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    assert "access-control-allow-origin" not in http.options("/v1/embeddings", headers=headers).headers
    with live_server(data_dir, server={"cors_origins": ["https://a.example"]}) as url:
        allowed = httpx.options(f"{url}/v1/embeddings", headers=headers)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        private = {**headers, "Access-Control-Request-Private-Network": "true"}
        allowed = httpx.options(f"{url}/v1/embeddings", headers=private)
        assert (allowed.status_code, allowed.headers["access-control-allow-private-network"]) == (200, "true")
        readable = httpx.get(f"{url}/health", headers=headers).headers["access-control-expose-headers"]
        for name in ("retry-after", "x-request-id", "x-context-id", "x-truncated-inputs", "warning"):
            assert name in readable.lower().split(", ")


def test_a_browser_may_read_every_refusal(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError

    origin = {"Origin": "https://a.example"}
    compressed = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    with live_server(data_dir, server={"cors_origins": [origin["Origin"]]}) as url:
        monkeypatch.setattr("app.api.operations.model_body", broken)
        for status, answer in (
            (500, httpx.get(f"{url}/v1/models", headers=origin)),
            (415, httpx.post(f"{url}/v1/embeddings", content=b"{}", headers=origin | compressed)),
            (404, httpx.get(f"{url}/none", headers=origin)),
        ):
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == origin["Origin"]
            assert "x-request-id" in answer.headers


def test_the_openapi_page_is_whole(http: httpx.Client) -> None:
    page = http.get("/openapi.json").json()
    schemas = page["components"]["schemas"]
    referred = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(page)))
    assert referred <= set(schemas)
    assert "EmbeddingsRequest" in referred
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            assert "422" not in operation["responses"], path
            takes_a_body = method in ("post", "put") and not path.endswith("/cancel")
            assert ("requestBody" in operation) == takes_a_body, (path, method)


def test_a_repeated_request_is_answered_without_a_forward(data_dir: Path) -> None:
    with live_server(data_dir) as url, httpx.Client(base_url=url) as http:

        def forwards() -> tuple[float, float]:
            families = {f.name: f for f in text_string_to_metric_families(http.get("/metrics").text)}
            hits = [s.value for s in families["cde_vector_cache"].samples if s.labels.get("outcome") == "hit"]
            return sum(s.value for s in families["cde_forwards"].samples if s.name.endswith("_total")), sum(hits[:1])

        body = {"model": V1, "input": ["seen once", "and this"], "input_type": "query"}
        first = http.post("/v1/embeddings", json=body)
        before, hits = forwards()
        again = http.post("/v1/embeddings", json=body)
        assert again.content == first.content
        assert forwards() == (before, hits + 2)


def test_models_of_one_name_do_not_start(data_dir: Path) -> None:
    twice = [{"name": str(GOLDENS / V1), "semantics": s} for s in ("training", "hub")]
    with pytest.raises(ConfigError, match="Several models are called"), live_server(data_dir, twice):
        pass


def test_a_model_without_its_first_stage_beside_another(data_dir: Path) -> None:
    models: list[str | dict[str, Any]] = [V1, {"name": str(GOLDENS / "v2-tiny-c16"), "first_stage": False}]
    with live_server(data_dir, models) as url:
        body = {"model": "v2-tiny-c16", "input": "x"}
        assert httpx.post(f"{url}/v1/embeddings", json=body).json()["error"]["code"] == "context_required"


def test_a_default_that_other_weights_made_is_made_anew_and_told(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = []
    for checkpoint in (V1, V2, V2):
        caplog.clear()
        with live_server(data_dir, [{"name": str(GOLDENS / checkpoint), "served_name": "m"}]) as url:
            answer = httpx.post(f"{url}/v1/embeddings", json={"model": "m", "input": "x"}).raise_for_status()
        ids.append(answer.headers["x-context-id"])
        assert ("create it again" in caplog.text) == (len(ids) == 2)
    assert ids[0] != ids[1] == ids[2]


def test_a_default_of_ones_own_outlives_its_server(data_dir: Path) -> None:
    """It is not made anew, not even where that could not be done."""

    def answered(url: str, model: str) -> str:
        answer = httpx.post(f"{url}/v1/embeddings", json={"model": model, "input": "x"}).raise_for_status()
        return str(answer.headers["x-context-id"])

    with live_server(data_dir, [V1, V2]) as url:
        fallback = answered(url, V2)
        body = {"model": V1, "name": "default", "documents": ANIMALS}
        own = httpx.post(f"{url}/v1/contexts", json=body).raise_for_status().json()["id"]
        assert answered(url, V1) == own
    with live_server(data_dir, [V1, {"name": str(GOLDENS / V2), "first_stage": False}]) as url:
        assert (answered(url, V1), answered(url, V2)) == (own, fallback)
