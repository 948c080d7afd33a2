"""Servers that many tests share, and the texts they talk about."""

import gc
import os
import ssl
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import HealthCheck, settings

from tests.live import V1, V2, live_server
from tests.postgres import postgres_server

# Read as Triton is imported: kernels for GPUs are interpreted in tests.
os.environ["TRITON_INTERPRET"] = "1"

# Clients make one each, of a tenth of a second, also for servers that speak plain HTTP: all of them here.
ssl.create_default_context = lru_cache(ssl.create_default_context)  # type: ignore[assignment]

# How long an example takes is the machine's affair.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

BUILTIN = "builtin/minilm-context"

ANIMALS = [
    f"The {a} {v} in the {p}." for a in ("fox", "owl", "bear") for v in ("sleeps", "hunts") for p in ("wood", "barn")
]
COOKING = [
    f"{v} the {f} for {m} minutes." for v in ("Boil", "Fry") for f in ("rice", "fish", "egg") for m in ("two", "ten")
]


def pytest_itemcollected(item: pytest.Item) -> None:
    """schemathesis names a test after each operation, but pytest, since 9.2, does not make its id from the name: all
    had the same, and of those pytest-xdist runs one."""
    if item.parent is not None and not item.nodeid.endswith(f"::{item.name}"):
        item._id = item.parent.id.child(item.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    twice = [nodeid for nodeid, times in Counter(item.nodeid for item in items).items() if times > 1]
    if twice:
        raise pytest.UsageError(f"of tests with the same id only one would run: {', '.join(twice)}")


def pytest_collection_finish() -> None:
    """Modules and tests stay: collections that engines ask for need not walk them, a quarter of a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The embedded default first, then both tiny CDE models; nothing is answered from a cache of vectors."""
    folder = tmp_path_factory.mktemp("server")
    with live_server(folder, (BUILTIN, V1, V2), limits={"vector_cache_bytes": 0}) as url:
        yield url


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server; `tests.postgres.new_database` makes databases on it."""
    with postgres_server() as url:
        yield url


@pytest.fixture
def http(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"
