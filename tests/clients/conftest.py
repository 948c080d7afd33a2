"""One live server on the embedded default, what curl says about the texts, and a gateway that refuses at first."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from app.errors import NotReady, QueueFull
from tests.api.test_auth import entry
from tests.clients.helpers import KEY, LEAST_COSINE, MODEL, TEXTS, curl_vectors, least_cosine
from tests.clients.refusing import Refusing
from tests.conftest import ANIMALS, BUILTIN, COOKING
from tests.live import V1, live_server

QUIET = {
    "ANONYMIZED_TELEMETRY": "False",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "DO_NOT_TRACK": "1",
}


@pytest.fixture(scope="session", autouse=True)
def quiet() -> Iterator[None]:
    """Clients report to nobody, fetch nothing, and find no key or address of the real OpenAI."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_BASE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What clients leave open is warned of while their own test's filters hold."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The embedded default with the context `legal`; the base URL, without /v1."""
    folder = tmp_path_factory.mktemp("clients")
    with live_server(folder, (BUILTIN,), limits={"vector_cache_bytes": 0}) as url:
        made = httpx.post(f"{url}/v1/contexts", json={"name": "legal", "documents": ANIMALS + COOKING}, timeout=60)
        made.raise_for_status()
        yield url


@pytest.fixture(scope="session")
def base(live: str) -> str:
    """The address clients take."""
    return f"{live}/v1"


@pytest.fixture(scope="session")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that wants KEY."""
    folder = tmp_path_factory.mktemp("locked")
    keys = folder / "keys.toml"
    keys.write_text(entry("clients", KEY, "embed", "contexts:read"))
    with live_server(folder / "data", (V1,), server={"keys_file": keys}) as url:
        yield f"{url}/v1"


@pytest.fixture(scope="session")
def by_curl(live: str) -> list[list[float]]:
    """What curl gets for TEXTS as a list of floats."""
    return curl_vectors(live, MODEL, TEXTS)


@pytest.fixture
def agrees(by_curl: list[list[float]], request: pytest.FixtureRequest) -> Callable[[Any], None]:
    """Holds a client's vectors for TEXTS to curl's."""

    def check(vectors: Any) -> None:
        least = least_cosine(vectors, by_curl)
        request.node.user_properties.append(("min_cosine", least))
        assert least > LEAST_COSINE

    return check


@pytest.fixture(params=[429, 503])
def refusing(base: str, request: pytest.FixtureRequest) -> Iterator[Refusing]:
    """Between client and server: answers the server's own 429 or 503 once, then lets everything pass."""
    error = QueueFull("The queue is full. Try again.") if request.param == 429 else NotReady("Not ready yet.")
    with Refusing(base, error, times=1) as gateway:
        yield gateway
