"""What the routes take from the app: the services, typed, and whether requests can be answered at all.

All are async, though none waits: FastAPI would run any other one in a thread, at every request.
"""

import time
from typing import Annotated, Any, Protocol

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


def _state(name: str) -> Any:
    """What is there under this name since the application was made, or has started."""

    async def found(request: Request) -> Any:
        return getattr(request.app.state, name)

    return Depends(found)


async def _namespace(request: Request) -> str:
    """Of the caller's key; routes depend on a key first."""
    found: str = getattr(request.state, "namespace", SHARED)
    return found


async def _caller(
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


SettingsOf = Annotated[Settings, _state("settings")]
RegistryOf = Annotated[Registry, _state("registry")]
ContextsOf = Annotated[Contexts, _state("contexts")]
BatchesOf = Annotated[Batches, _state("batches")]
CatalogOf = Annotated[Catalog, _state("catalog")]
Embedder = Annotated[EmbeddingService, _state("service")]
Namespace = Annotated[str, Depends(_namespace)]
"""Declare it behind the route's key: dependencies are resolved in order."""
CallerOf = Annotated[Caller, Depends(_caller)]
"""Behind the route's key, as `Namespace`; before its body, whose arrival is part of the time."""

ModelQuery = Annotated[str | None, Query(description="Whose context; absent: the default model's")]


async def _of_query(registry: RegistryOf, model: ModelQuery = None) -> ServedModel:
    return registry.get(model) if model else registry.default


ModelOf = Annotated[ServedModel, Depends(_of_query)]


async def _space(served: ModelOf, namespace: Namespace) -> Space:
    return Space(served.id, namespace)


SpaceOf = Annotated[Space, Depends(_space)]
"""Behind the route's key, as `Namespace`."""


def model_named(registry: Registry, named: str | None, query: str | None) -> ServedModel:
    """The model of a body or of `?model=`; both may name it, if they agree."""
    if named is not None and query is not None and registry.get(named) is not registry.get(query):
        raise InvalidRequest("'model' in the body and in the query string name different models.", param="model")
    name = named or query
    return registry.get(name) if name else registry.default
