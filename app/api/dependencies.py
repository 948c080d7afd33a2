"""What the routes take from the app: the services, typed, and whether requests can be answered at all."""

import time
from typing import Annotated, Protocol

from fastapi import Depends, Header, Query, Request

from app.batches.service import Batches
from app.catalog import Catalog
from app.contexts import Contexts
from app.domain import SHARED, Caller, Space
from app.errors import InvalidRequest
from app.registry import Registry, ServedModel
from app.service import EmbeddingService
from app.settings import Settings

MAX_TIMEOUT_MS = 24 * 3600 * 1000


class Lifecycle(Protocol):
    """Where the process is in its life; see lifecycle.py."""

    @property
    def is_ending(self) -> bool: ...

    def check_admitted(self) -> None: ...

    async def check_ready(self) -> None: ...


def lifecycle(request: Request) -> Lifecycle:
    found: Lifecycle = request.app.state.server
    return found


async def admitted(request: Request) -> None:
    """Raises NotReady or ShuttingDown."""
    lifecycle(request).check_admitted()


def _settings(request: Request) -> Settings:
    found: Settings = request.app.state.settings
    return found


def _registry(request: Request) -> Registry:
    found: Registry = request.app.state.registry
    return found


def _contexts(request: Request) -> Contexts:
    found: Contexts = request.app.state.contexts
    return found


def _catalog(request: Request) -> Catalog:
    found: Catalog = request.app.state.catalog
    return found


def _batches(request: Request) -> Batches:
    found: Batches = request.app.state.batches
    return found


def _service(request: Request) -> EmbeddingService:
    found: EmbeddingService = request.app.state.service
    return found


def _namespace(request: Request) -> str:
    """Of the caller's key; routes depend on a key first."""
    found: str = getattr(request.state, "namespace", SHARED)
    return found


def _caller(
    request: Request,
    *,
    x_timeout_ms: Annotated[
        int | None, Header(ge=1, le=MAX_TIMEOUT_MS, description="Until when an answer is of use; absent: a setting")
    ] = None,
) -> Caller:
    """Who shares the device fairly: the key, or where there is none the connection."""
    settings: Settings = request.app.state.settings
    seconds = settings.limits.timeout_seconds if x_timeout_ms is None else x_timeout_ms / 1000
    key = getattr(request.state, "key_name", None)
    client = f"key {key}" if key is not None else "{}:{}".format(*(request.client or ("", 0)))
    return Caller(client, time.monotonic() + seconds)


SettingsOf = Annotated[Settings, Depends(_settings)]
RegistryOf = Annotated[Registry, Depends(_registry)]
ContextsOf = Annotated[Contexts, Depends(_contexts)]
BatchesOf = Annotated[Batches, Depends(_batches)]
CatalogOf = Annotated[Catalog, Depends(_catalog)]
Embedder = Annotated[EmbeddingService, Depends(_service)]
Namespace = Annotated[str, Depends(_namespace)]
"""Declare it behind the route's key: dependencies are resolved in order."""
CallerOf = Annotated[Caller, Depends(_caller)]
"""Behind the route's key, as `Namespace`; before its body, whose arrival is part of the time."""

ModelQuery = Annotated[str | None, Query(description="Whose context; absent: the default model's")]


def _of_query(registry: RegistryOf, model: ModelQuery = None) -> ServedModel:
    return registry.get(model) if model else registry.default


ModelOf = Annotated[ServedModel, Depends(_of_query)]


def _space(served: ModelOf, namespace: Namespace) -> Space:
    return Space(served.id, namespace)


SpaceOf = Annotated[Space, Depends(_space)]
"""Behind the route's key, as `Namespace`."""


def model_named(registry: Registry, named: str | None, query: str | None) -> ServedModel:
    """The model of a body or of `?model=`; both may name it, if they agree."""
    if named is not None and query is not None and registry.get(named) is not registry.get(query):
        raise InvalidRequest("'model' in the body and in the query string name different models.", param="model")
    name = named or query
    return registry.get(name) if name else registry.default
