"""The application of the committed file on Ray Serve: two replicas behind Ray's HTTP, on one PostgreSQL."""

import importlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as families

from app.errors import ConfigError
from app.settings import Settings
from tests.compare import assert_same
from tests.conftest import ANIMALS, COOKING
from tests.live import GOLDENS, V1, live_server
from tests.postgres import new_database

FILE = Path(__file__).parents[2] / "config" / "ray-serve.yaml"
WAIT_SECONDS = 120

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),  # Ray's own
]


class Replicas:
    """The committed application with two replicas of a tiny model, deployed again with other settings at will."""

    def __init__(self, database: str) -> None:
        self.serve = importlib.import_module("ray.serve")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.arguments = yaml.safe_load(FILE.read_text())["applications"][0]["args"]
        self.arguments |= {"model": str(GOLDENS / V1), "device": "cpu", "num_cpus": 1}
        self.arguments |= {"min_replicas": 2, "max_replicas": 2}
        self.database = database
        self.url = f"http://127.0.0.1:{self.port}"
        self.serve.start(http_options={"host": "127.0.0.1", "port": self.port})

    def deploy(self, **settings: Any) -> None:
        settings |= {"contexts": {"database_url": self.database}}
        self.serve.run(built({**self.arguments, "settings": settings}), name="cde-server")


def built(arguments: dict[str, Any]) -> Any:
    serving = importlib.import_module("app.scale.serving")
    return serving.build(serving.ServeArgs.model_validate(arguments))


@pytest.fixture(scope="module")
def replicas(cluster: None, postgres: str) -> Iterator[Replicas]:
    started = Replicas(new_database(postgres))
    started.deploy()
    yield started
    started.serve.shutdown()


def measured(url: str, name: str, **labels: str) -> tuple[float, float]:
    """When the replica that answered this was started, and the sum of one of its metrics."""
    samples = [s for family in families(httpx.get(f"{url}/metrics").text) for s in family.samples]
    (started,) = (s.value for s in samples if s.name == "process_start_time_seconds")
    return started, sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def test_two_replicas_answer_under_one_context(replicas: Replicas, tmp_path: Path) -> None:
    body = "\n".join(json.dumps(text) for text in ANIMALS)
    headers = {"content-type": "application/x-ndjson"}
    made = httpx.post(f"{replicas.url}/v1/contexts?name=zoo", content=body, headers=headers, timeout=60).json()
    with live_server(tmp_path) as alone:
        documents = {"model": V1, "context": {"documents": ANIMALS}, "input_type": "query", "input": COOKING}
        response = httpx.post(f"{alone}/v1/embeddings", json=documents, timeout=60)
        expected = [item["embedding"] for item in response.json()["data"]]

    client = openai.OpenAI(base_url=f"{replicas.url}/v1", api_key="none", max_retries=0)
    seen: dict[float, float] = {}
    deadline = time.monotonic() + WAIT_SECONDS
    while len(seen) < 2 or not all(seen.values()):
        assert time.monotonic() < deadline, seen
        raw = client.embeddings.with_raw_response.create(model=f"{V1}@zoo:query", input=COOKING)
        assert raw.headers["x-context-id"] == made["id"]
        assert raw.headers.get_list("x-request-id") == [raw.headers["x-request-id"]]
        assert_same([item.embedding for item in raw.parse().data], np.array(expected))
        started, count = measured(replicas.url, "cde_requests_total", route="/v1/embeddings")
        seen[started] = count


def test_replicas_that_are_replaced_answer_what_they_took(replicas: Replicas) -> None:
    inputs = [f"Slow text number {i} of many." * 4 for i in range(500)]
    statuses: list[int] = []

    def embed(number: int) -> None:
        texts = [f"{number} {text}" for text in inputs]
        response = httpx.post(f"{replicas.url}/v1/embeddings", json={"model": V1, "input": texts}, timeout=WAIT_SECONDS)
        statuses.append(response.status_code)
        assert len(response.json()["data"]) == len(texts)

    threads = [threading.Thread(target=embed, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + WAIT_SECONDS
    while not measured(replicas.url, "cde_queue_tokens")[1]:
        assert time.monotonic() < deadline
    assert len(statuses) < 4
    replicas.deploy(limits={"max_inputs": 5})
    assert httpx.get(f"{replicas.url}/info").json()["limits"]["max_inputs"] == 5
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert statuses == [200] * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_replicas": 2}, "through PostgreSQL"),
        ({"dtype": "bfloat16"}, "name it too"),
        ({"settings": {"limits": {"max_inputs": 0}}}, "limits.max_inputs"),
        ({"config": "nowhere.toml"}, "does not exist"),
    ],
)
def test_arguments_that_cannot_be(
    arguments: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        built(arguments)


@pytest.mark.parametrize(
    ("arguments", "settings", "expected"),
    [
        ({}, {"models": [{"device": "cuda"}]}, 1),
        ({}, {"models": [{"device": "cuda"}], "engine": {"devices": ["cuda:0", "cuda:1"]}}, 2),
        ({}, {"models": [{"device": "cpu"}]}, 0),
        ({"num_gpus": 0.5}, {"models": [{"device": "cuda"}]}, 0.5),
    ],
)
def test_gpus_of_a_replica(arguments: dict[str, Any], settings: dict[str, Any], expected: float) -> None:
    serving = importlib.import_module("app.scale.serving")
    assert serving.gpus(serving.ServeArgs(**arguments), Settings.model_validate(settings)) == expected


def test_the_committed_file_is_one_of_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDE__CONTEXTS__DATABASE_URL", "postgresql://127.0.0.1/contexts")
    schema = importlib.import_module("ray.serve.schema").ServeDeploySchema
    file = schema.model_validate(yaml.safe_load(FILE.read_text())).applications[0]
    assert file.import_path == "app.scale.serving:build"
    built(file.args)
