"""Models, health, metrics, and what the tokenizer sees."""

import asyncio
from collections.abc import Iterator
from importlib.metadata import version
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import REGISTRY, exposition
from prometheus_client.openmetrics import exposition as openmetrics

from app.api.auth import AnyKey, CanEmbed
from app.api.body import json_body
from app.api.dependencies import (
    CatalogOf,
    ContextsOf,
    Embedder,
    Namespace,
    RegistryOf,
    SettingsOf,
    admitted,
    lifecycle,
)
from app.api.openapi import takes
from app.api.schemas import ORJSONResponse, TokenizeRequest, model_body
from app.context_refs import parse_ref
from app.domain import ContextInfo, InputType, ModelSpec
from app.errors import ContextModelMismatch, ContextNotFound, InvalidRequest, TooManyTokens, UnknownContextNamed

router = APIRouter(tags=["operations"])
served = APIRouter(tags=["models"], dependencies=[Depends(admitted)])
"""Routes that need the models; the others answer at any time."""

PAGE = 10_000
"""Contexts read at a time; each page sorts all of them."""


@served.get("/v1/models")
async def list_models(
    request: Request, _key: AnyKey, catalog: CatalogOf, registry: RegistryOf, namespace: Namespace
) -> Response:
    """One entry for each model, and one for each of its contexts: MODEL@CONTEXT."""
    created = request.app.state.created
    data = []
    for model in registry.models:
        data.append(model_body(model.spec, model.id, created))
        found: list[ContextInfo] = []
        more = True
        while more:
            after = found[-1].id if found else None
            page = await catalog.list_current(namespace, model, after=after, limit=PAGE, newest_first=False)
            found.extend(page.items)
            more = page.has_more
        for info in found:
            at = int(info.created_at.timestamp())
            data.append(model_body(model.spec, f"{model.id}@{info.name}", at, parent=model.id))
    return ORJSONResponse({"object": "list", "data": data})


@served.get("/v1/models/{name:path}")
async def get_model(
    request: Request, _key: AnyKey, contexts: ContextsOf, registry: RegistryOf, namespace: Namespace, name: str
) -> Response:
    choice = registry.choose(name)
    model = choice.served
    if choice.context is None:
        return ORJSONResponse(model_body(model.spec, name, request.app.state.created))
    try:
        info, _ = await contexts.resolve(model, parse_ref(choice.context, param="model"), namespace)
    except (UnknownContextNamed, ContextModelMismatch) as error:
        raise ContextNotFound(error.message, param="model") from error
    return ORJSONResponse(model_body(model.spec, name, int(info.created_at.timestamp()), parent=model.id))


@router.head("/", include_in_schema=False)
@router.get("/", include_in_schema=False)
async def root() -> Response:
    """For people with a browser, and load balancers that look here unless told otherwise."""
    return ORJSONResponse({"service": "cde-server", "docs": "/docs", "models": "/v1/models", "ready": "/ready"})


@router.head("/health", include_in_schema=False)
@router.head("/health/live", include_in_schema=False)
@router.get("/health")
@router.get("/health/live")
async def health() -> Response:
    """200 while the process turns."""
    return ORJSONResponse({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.head("/health/ready", include_in_schema=False)
@router.get("/ready")
@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """200 when requests will be answered; else 503 with the reason."""
    await lifecycle(request).check_ready()
    return ORJSONResponse({"status": "ready"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format, or OpenMetrics where that is asked for."""
    wanted = openmetrics if "application/openmetrics-text" in request.headers.get("accept", "") else exposition
    return Response(await asyncio.to_thread(wanted.generate_latest, REGISTRY), media_type=wanted.CONTENT_TYPE_LATEST)


@served.get("/info")
async def info(_key: AnyKey, registry: RegistryOf, settings: SettingsOf) -> Response:
    """Models, revisions, dtypes, devices, limits, version."""
    return ORJSONResponse(
        {
            "version": version("cde-server"),
            "models": [_model_info(model.names, model.spec) for model in registry.models],
            "limits": settings.limits.model_dump(),
            "default_context": settings.contexts.default,
            "require_context": settings.contexts.require_context,
            "truncate": settings.truncate,
            "token_ids": settings.token_ids,
        }
    )


def _model_info(names: tuple[str, ...], spec: ModelSpec) -> dict[str, Any]:
    return {
        "id": spec.id,
        "names": list(names),
        "family": spec.family,
        "is_cde": spec.is_cde,
        "semantics": spec.semantics,
        "approximate": spec.approximate,
        "source": spec.source,
        "weights_sha256": spec.revision,
        "tokenizer_sha256": spec.tokenizer_revision,
        "dtype": spec.dtype,
        "device": spec.device,
        "dimensions": spec.hidden_size,
        "max_input_tokens": spec.max_length,
        "corpus_size": spec.corpus_size,
        "first_stage": spec.has_first_stage,
        "prompts": {kind.value: prompt for kind, prompt in spec.prompts.items()},
        "default_input_type": spec.default_input_type.value,
    }


@served.post("/tokenize", openapi_extra=takes(TokenizeRequest))
async def tokenize(
    _key: CanEmbed,
    registry: RegistryOf,
    service: Embedder,
    settings: SettingsOf,
    namespace: Namespace,
    body: Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))],
) -> Response:
    """Token ids, tokens and counts as the model sees them: prompt and special tokens in, nothing cut."""
    model = registry.choose(body.model).served if body.model else registry.default
    texts = [body.input] if isinstance(body.input, str) else body.input
    if len(texts) > settings.limits.max_inputs:
        raise InvalidRequest(f"Invalid 'input': at most {settings.limits.max_inputs} items.", param="input")
    characters, most = sum(map(len, texts)), settings.limits.max_tokens_per_request
    if characters > most:
        raise TooManyTokens(f"Invalid 'input': {characters} characters, at most {most} are shown.", param="input")
    kind = InputType(body.input_type) if body.input_type else None

    def render() -> Iterator[list[bytes]]:
        id_lists = model.tokenizer.uncut(texts, kind)
        data = [
            orjson.dumps({"index": i, "input_ids": ids, "tokens": model.tokenizer.tokens(ids), "count": len(ids)})
            for i, ids in enumerate(id_lists)
        ]
        rest = orjson.dumps({"model": model.id, "max_input_tokens": model.spec.max_length})
        yield [b'{"object":"list","data":[' + b",".join(data) + b"]," + rest[1:]]

    (content,) = await service.threads.run(render(), characters, f"namespace {namespace}")
    return Response(content, media_type="application/json")
