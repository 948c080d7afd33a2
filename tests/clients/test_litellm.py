"""LiteLLM: its SDK, and its proxy as a gateway in front of the server."""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.clients import pages
from tests.clients.helpers import MODEL, TEXTS, TOO_LONG, UNKNOWN, optional, program
from tests.clients.refusing import Refusing

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's packages warn as they like

START_SECONDS = 120
MISSPELT = """\
  - model_name: misspelt
    litellm_params: {{model: openai/minilm-context@leagl:query, api_base: "{}/v1", api_key: none}}
"""


def embed(base: str, model: str = MODEL, texts: list[str] = TEXTS, **options: Any) -> list[list[float]]:
    given = {"model": f"openai/{model}", "input": texts, "api_base": base, "api_key": "none"} | options
    return [item["embedding"] for item in optional("litellm").embedding(**given).data]


def test_sdk(base: str, agrees: Callable[[Any], None]) -> None:
    agrees(embed(base))
    agrees(embed(base, "minilm-context", extra_body={"context": "legal", "input_type": "query"}))


def test_sdk_errors(base: str, locked: str) -> None:
    litellm = optional("litellm")
    with pytest.raises(litellm.NotFoundError):
        embed(base, UNKNOWN)
    with pytest.raises(litellm.ContextWindowExceededError):
        embed(base, texts=[TOO_LONG])
    with pytest.raises(litellm.BadRequestError, match="empty string"):
        embed(base, texts=[""])
    with pytest.raises(litellm.NotFoundError, match="does not exist for model"):
        embed(base, "minilm-context@nowhere")
    with pytest.raises(litellm.AuthenticationError):
        embed(locked, api_key="wrong")


def test_sdk_retries(refusing: Refusing, agrees: Callable[[Any], None]) -> None:
    agrees(embed(refusing.base))
    assert refusing.requests == 2


@pytest.fixture(scope="module")
def gateway(live: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a proxy that runs with the page's configuration."""
    config = pages.example("litellm", "yaml").replace("http://127.0.0.1:8000", live)
    misspelt = config.replace("model_list:\n", "model_list:\n" + MISSPELT.format(live))
    with proxy(tmp_path_factory.mktemp("litellm"), misspelt) as client:
        yield client


@contextmanager
def proxy(folder: Path, config: str) -> Iterator[openai.OpenAI]:
    """A client of a proxy of its own."""
    optional("litellm.proxy.proxy_server")
    key = "sk-4d1f0c9e7b5a38261f0e9d8c7b6a5f4e"
    (folder / "litellm.yaml").write_text(config)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program("litellm"), "--config", "litellm.yaml", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"LITELLM_MASTER_KEY": key}
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait(process, f"http://127.0.0.1:{port}", log)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health/readiness").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise TimeoutError(f"the proxy did not start:\n{log.read_text()[-3000:]}")


@pytest.mark.parametrize("model", ["legal-query", f"cde/{MODEL}"])
@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}], ids=str)
def test_proxy(gateway: openai.OpenAI, agrees: Callable[[Any], None], model: str, options: Any) -> None:
    answer = gateway.embeddings.create(model=model, input=TEXTS, **options)
    agrees([item.embedding for item in answer.data])


def test_proxy_passes_our_fields_and_headers(gateway: openai.OpenAI, agrees: Callable[[Any], None]) -> None:
    body = {"context": "legal", "input_type": "query"}
    raw = gateway.embeddings.with_raw_response.create(model="cde/minilm-context", input=TEXTS, extra_body=body)
    agrees([item.embedding for item in raw.parse().data])
    assert raw.headers["llm_provider-x-context-name"] == "legal"


def test_proxy_errors(gateway: openai.OpenAI) -> None:
    for _ in range(2):  # a 404 of the server sets no wildcard route aside
        with pytest.raises(openai.NotFoundError, match="does not exist here"):
            gateway.embeddings.create(model=f"cde/{UNKNOWN}", input="x")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        gateway.embeddings.create(model="legal-query", input=TOO_LONG)
    with pytest.raises(openai.BadRequestError, match="does not exist for model"):  # in the body it is a 400
        gateway.embeddings.create(model="cde/minilm-context", input="x", extra_body={"context": "nowhere"})
    assert gateway.embeddings.create(model="legal-query", input="x").data


def test_proxy_sets_a_named_deployment_aside_after_a_404(gateway: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist for model"):
        gateway.embeddings.create(model="misspelt", input="x")
    with pytest.raises(openai.RateLimitError, match="No deployments available"):
        gateway.embeddings.create(model="misspelt", input="x")
    assert gateway.embeddings.create(model="legal-query", input="x").data


def test_the_compose_files_proxy_finds_contexts(live: str, tmp_path: Path, agrees: Callable[[Any], None]) -> None:
    config = (Path(__file__).parents[2] / "config" / "litellm.yaml").read_text()
    with proxy(tmp_path, config.replace("http://gateway:8080", live)) as client:
        assert "cde/builtin/minilm-context@legal" in {model.id for model in client.models.list()}
        answer = client.embeddings.create(model=f"cde/{MODEL}", input=TEXTS)
        agrees([item.embedding for item in answer.data])
        httpx.post(f"{live}/v1/contexts", json={"name": "made-later", "documents": TEXTS}).raise_for_status()
        assert client.embeddings.create(model="cde/minilm-context@made-later", input="x").data
