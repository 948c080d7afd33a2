"""/v1/contexts: create, import, list, get, export, versions, rollback, delete."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from app.api.auth import CanReadContexts, CanWriteContexts
from app.api.body import json_body, media_type, ndjson_lines, parse_json, read_body, validated
from app.api.dependencies import Contexts, ModelOf, ModelQuery, RegistryOf, SettingsOf, admitted
from app.api.openapi import arrays, takes
from app.api.schemas import (
    NPY,
    SAFETENSORS,
    ContextRequest,
    ORJSONResponse,
    RollbackRequest,
    SelectionRequest,
    context_body,
    list_body,
)
from app.contexts import ContextService
from app.domain import ContextInfo, Selection
from app.errors import InvalidRequest, UnsupportedMediaType
from app.payloads import from_npy, from_safetensors, to_npy, to_safetensors
from app.registry import Registry, ServedModel, check_name, parse_ref
from app.selection import Minicorpus, select

router = APIRouter(tags=["contexts"], dependencies=[Depends(admitted)])

MAX_DIGITS = 20
NDJSON = ("application/x-ndjson", "application/ndjson", "application/jsonl")


@router.post("/v1/contexts", status_code=201, openapi_extra=takes(ContextRequest, NDJSON[0]))
async def create_context(
    request: Request,
    settings: SettingsOf,
    _key: CanWriteContexts,
    service: Contexts,
    registry: RegistryOf,
    *,
    model: ModelQuery = None,
) -> Response:
    """A context from documents: JSON, or NDJSON of any length with the parameters in the query string."""
    if media_type(request) in NDJSON:
        return await _create_from_stream(request, service, registry, settings.limits.max_line_bytes)
    body = await json_body(ContextRequest)(request)
    served = _of_body(registry, body.model, model)
    selection = Selection(body.selection.method, body.selection.seed)
    check_name(body.name)
    minicorpus = await asyncio.to_thread(select, body.documents, selection, served.spec.corpus_size)
    return _created(await service.create(served, body.name, minicorpus, selection, body.metadata))


async def _create_from_stream(
    request: Request, service: ContextService, registry: Registry, max_line_bytes: int
) -> Response:
    query = request.query_params
    known = {"name", "model", "method", "seed"}
    unknown = next((key for key in query if key not in known), None)
    if unknown or "name" not in query:
        problem = f"Unknown query parameter: '{unknown[:80]}'." if unknown else "Missing required parameter: 'name'."
        raise InvalidRequest(f"{problem} NDJSON uploads take ?name=…&model=…&method=…&seed=…", param=unknown or "name")
    seed = query.get("seed", "0")
    if not seed.removeprefix("-").isdecimal() or len(seed) > MAX_DIGITS:
        raise InvalidRequest("Invalid 'seed': it is a whole number.", param="seed")
    wanted = validated(SelectionRequest, {"method": query.get("method", "random"), "seed": int(seed)})
    selection = Selection(wanted.method, wanted.seed)
    served = registry.get(query["model"]) if query.get("model") else registry.default
    name = check_name(query["name"])
    minicorpus = Minicorpus(selection, served.spec.corpus_size)
    async for number, line in ndjson_lines(request, max_line_bytes):
        minicorpus.add(_document(number, line))
    return _created(await service.create(served, name, minicorpus, selection, {}))


def _document(number: int, line: bytes) -> str:
    try:
        raw: Any = parse_json(line)
    except InvalidRequest:
        raise InvalidRequest(f"Line {number} is not valid JSON. Nothing was created.", param="body") from None
    text = raw.get("text") if isinstance(raw, dict) else raw
    if not isinstance(text, str):
        raise InvalidRequest(
            f'Line {number} is neither a JSON string nor an object with a string "text". Nothing was created.',
            param="body",
        )
    return text


@router.put("/v1/contexts/{name}/embeddings", status_code=201, openapi_extra=arrays())
async def import_context(
    request: Request, settings: SettingsOf, _key: CanWriteContexts, service: Contexts, served: ModelOf, name: str
) -> Response:
    """A context from dataset embeddings made elsewhere: safetensors, or .npy where it is one array."""
    kind = media_type(request)
    if kind not in (SAFETENSORS, NPY, "application/octet-stream", "application/safetensors", ""):
        raise UnsupportedMediaType(f"Content-Type is {kind[:80]}; {SAFETENSORS} or {NPY} is expected.")
    check_name(name)
    data = await read_body(request, settings.limits.max_body_bytes)
    parse = from_npy if kind == NPY or data.startswith(b"\x93NUMPY") else from_safetensors
    try:
        arrays = await asyncio.to_thread(parse, data)
    except ValueError as error:
        raise InvalidRequest(f"The body cannot be read: {error}.", param="body") from error
    return _created(await service.import_arrays(served, name, arrays, {}))


@router.get("/v1/contexts")
async def list_contexts(
    _key: CanReadContexts,
    service: Contexts,
    registry: RegistryOf,
    *,
    model: ModelQuery = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The version each name points at, of all models or of one."""
    served = registry.get(model) if model else None
    page = await service.list_current(served, after=after, limit=limit, newest_first=order == "desc")
    return ORJSONResponse(list_body([context_body(info) for info in page.items], has_more=page.has_more))


@router.get("/v1/contexts/{ref}")
async def get_context(_key: CanReadContexts, service: Contexts, served: ModelOf, ref: str) -> Response:
    info = await service.get(served, parse_ref(ref, param="ref"))
    return ORJSONResponse(context_body(info))


@router.get("/v1/contexts/{name}/versions")
async def list_versions(_key: CanReadContexts, service: Contexts, served: ModelOf, name: str) -> Response:
    """Newest first."""
    found = await service.versions(served, name)
    return ORJSONResponse(list_body([context_body(info) for info in found]))


@router.get("/v1/contexts/{ref}/embeddings")
async def export_context(
    request: Request, _key: CanReadContexts, service: Contexts, served: ModelOf, ref: str
) -> Response:
    """The arrays: safetensors, or .npy with `Accept: application/x-npy`."""
    info, arrays = await service.export(served, parse_ref(ref, param="ref"))
    npy = NPY in request.headers.get("accept", "")
    try:
        content = await asyncio.to_thread(to_npy if npy else to_safetensors, arrays)
    except ValueError as error:
        raise InvalidRequest(f"Cannot export as .npy: {error}.", param="Accept") from error
    filename = f"{info.name}.{info.version}.{'npy' if npy else 'safetensors'}"
    headers = {"x-context-id": info.id, "Content-Disposition": f'attachment; filename="{filename}"'}
    return Response(content, media_type=NPY if npy else SAFETENSORS, headers=headers)


@router.post("/v1/contexts/{name}/rollback", openapi_extra=takes(RollbackRequest))
async def rollback_context(
    _key: CanWriteContexts,
    service: Contexts,
    registry: RegistryOf,
    name: str,
    body: Annotated[RollbackRequest, Depends(json_body(RollbackRequest))],
    *,
    model: ModelQuery = None,
) -> Response:
    """Points a name at one of its versions."""
    served = _of_body(registry, body.model, model)
    info = await service.rollback(served, name, body.version)
    return ORJSONResponse(context_body(info))


@router.delete("/v1/contexts/{ref}")
async def delete_context(_key: CanWriteContexts, service: Contexts, served: ModelOf, ref: str) -> Response:
    """By name: the name and all its versions; by id or name.version: that one."""
    await service.delete(served, parse_ref(ref, param="ref"))
    return ORJSONResponse({"id": ref, "object": "context.deleted", "deleted": True})


def _of_body(registry: Registry, named: str | None, query: str | None) -> ServedModel:
    """The model of a body or of `?model=`; both may name it, if they agree."""
    if named is not None and query is not None and registry.get(named) is not registry.get(query):
        raise InvalidRequest("'model' in the body and in the query string name different models.", param="model")
    name = named or query
    return registry.get(name) if name else registry.default


def _created(result: tuple[ContextInfo, bool]) -> Response:
    info, created = result
    return ORJSONResponse(context_body(info), status_code=201 if created else 200)
