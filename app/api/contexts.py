"""/v1/contexts: create, import, list, get, export, versions, documents, rollback, delete."""

import asyncio
from functools import partial
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response

from app.api.auth import CanReadContexts, CanWriteContexts
from app.api.body import check_count, json_body, media_type, ndjson_lines, read_body, validated
from app.api.context_schemas import (
    ContextRequest,
    RollbackRequest,
    StreamParameters,
    context_body,
    dry_run_body,
    id_is_known,
)
from app.api.dependencies import (
    CatalogOf,
    ModelOf,
    ModelQuery,
    Namespace,
    RegistryOf,
    SettingsOf,
    SpaceOf,
    admitted,
    model_named,
)
from app.api.openapi import arrays, takes
from app.api.schemas import NPY, SAFETENSORS, ORJSONResponse, list_body
from app.catalog import Catalog, Creation
from app.context_refs import parse_ref
from app.domain import ContextInfo, ContextStatus, Selection, Space
from app.errors import ContextModelMismatch, InvalidRequest, UnsupportedMediaType
from app.json_text import InvalidJson, parse_json
from app.payloads import read_arrays, to_npy, to_safetensors
from app.registry import Registry, ServedModel
from app.selection import Minicorpus

router = APIRouter(tags=["contexts"], dependencies=[Depends(admitted)])

NDJSON = ("application/x-ndjson", "application/ndjson", "application/jsonl")

Wait = Annotated[bool, Query(description="false: answer 202 at once, and build it behind")]


@router.post("/v1/contexts", status_code=201, openapi_extra=takes(ContextRequest, NDJSON[0]))
async def create_context(
    request: Request,
    settings: SettingsOf,
    _key: CanWriteContexts,
    catalog: CatalogOf,
    registry: RegistryOf,
    namespace: Namespace,
    *,
    model: ModelQuery = None,
    wait: Wait = True,
) -> Response:
    """A context from documents: JSON, or NDJSON of any length with the parameters in the query string."""
    if media_type(request) in NDJSON:
        return await _create_from_stream(request, catalog, registry, namespace, settings.limits.max_line_bytes)
    body = await json_body(ContextRequest, query=("model", "wait"), streams=NDJSON[0])(request)
    check_count("documents", body.documents, settings.limits.max_documents, "Send them as NDJSON, which has no limit.")
    served = model_named(registry, body.model, model)
    minicorpus = catalog.minicorpus(served, Selection(body.selection.method, body.selection.seed))
    creation = Creation(body.name, body.metadata, namespace, wait)
    await asyncio.to_thread(minicorpus.add_all, body.documents)
    return await _created(catalog, served, creation, minicorpus, dry_run=body.dry_run)


async def _create_from_stream(
    request: Request, catalog: Catalog, registry: Registry, namespace: str, max_line_bytes: int
) -> Response:
    given = validated(StreamParameters, dict(request.query_params))
    served = registry.get(given.model) if given.model else registry.default
    creation = Creation(given.name, given.metadata, namespace, given.wait)
    minicorpus = catalog.minicorpus(served, Selection(given.method, given.seed))
    async for number, line in ndjson_lines(request, max_line_bytes, lambda: minicorpus.memory):
        minicorpus.add(_document(number, line))
    return await _created(catalog, served, creation, minicorpus, dry_run=given.dry_run)


async def _created(
    catalog: Catalog, served: ServedModel, creation: Creation, minicorpus: Minicorpus, *, dry_run: bool
) -> Response:
    if dry_run:
        new, _ = await catalog.plan(served, creation, minicorpus)
        return ORJSONResponse(dry_run_body(new))
    return _stored(*await catalog.create(served, creation, minicorpus))


def _stored(info: ContextInfo, created: bool) -> Response:
    if info.status is ContextStatus.IN_PROGRESS:
        named = info.id if id_is_known(info.selection) else f"{info.name}.{info.version}"
        headers = {"Location": f"/v1/contexts/{named}", "Retry-After": "2"}
        return ORJSONResponse(context_body(info), status_code=202, headers=headers)
    return ORJSONResponse(context_body(info), status_code=201 if created else 200)


def _document(number: int, line: bytes) -> str:
    try:
        raw: Any = parse_json(line)
    except InvalidJson as error:
        raise InvalidRequest(f"Line {number} is not valid JSON: {error}. Nothing was created.", param="body") from None
    text = raw.get("text") if isinstance(raw, dict) else raw
    if not isinstance(text, str):
        raise InvalidRequest(
            f'Line {number} is neither a JSON string nor an object with a string "text". Nothing was created.',
            param="body",
        )
    return text


@router.put("/v1/contexts/{name}/embeddings", status_code=201, openapi_extra=arrays())
async def import_context(
    request: Request,
    settings: SettingsOf,
    _key: CanWriteContexts,
    catalog: CatalogOf,
    served: ModelOf,
    *,
    namespace: Namespace,
    name: str,
) -> Response:
    """A context from dataset embeddings made elsewhere: safetensors, or .npy where it is one array."""
    kind = media_type(request)
    if kind not in (SAFETENSORS, NPY, "application/octet-stream", "application/safetensors", ""):
        raise UnsupportedMediaType(f"Content-Type is {kind[:80]}; {SAFETENSORS} or {NPY} is expected.")
    creation = Creation(name, {}, namespace)
    data = await read_body(request, settings.limits.max_body_bytes)
    try:
        arrays, weights = await asyncio.to_thread(read_arrays, data, npy=kind == NPY)
    except ValueError as error:
        raise InvalidRequest(f"The body cannot be read: {error}.", param="body") from error
    if weights not in (None, served.spec.revision):
        raise ContextModelMismatch(
            f"These arrays were exported from a context of other weights than those that {served.id} is served with. "
            f"Import them for the model they were made with, or create the context from its documents.",
            param="body",
        )
    return _stored(*await catalog.import_arrays(served, creation, arrays))


@router.get("/v1/contexts")
async def list_contexts(
    _key: CanReadContexts,
    catalog: CatalogOf,
    registry: RegistryOf,
    namespace: Namespace,
    *,
    model: ModelQuery = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The version each name points at, of all models or of one."""
    served = registry.get(model) if model else None
    page = await catalog.list_current(namespace, served, after=after, limit=limit, newest_first=order == "desc")
    return ORJSONResponse(list_body([context_body(info) for info in page.items], has_more=page.has_more))


@router.get("/v1/contexts/{ref}")
async def get_context(_key: CanReadContexts, catalog: CatalogOf, space: SpaceOf, ref: str) -> Response:
    """In any state: in_progress, completed or failed."""
    return ORJSONResponse(context_body(await catalog.get(space, parse_ref(ref, param="ref"))))


@router.get("/v1/contexts/{name}/versions")
async def list_versions(_key: CanReadContexts, catalog: CatalogOf, space: SpaceOf, name: str) -> Response:
    """Newest first."""
    found = await catalog.versions(space, name)
    return ORJSONResponse(list_body([context_body(info) for info in found]))


@router.get("/v1/contexts/{ref}/documents")
async def list_documents(_key: CanReadContexts, catalog: CatalogOf, space: SpaceOf, ref: str) -> Response:
    """The chosen texts as NDJSON, as they are uploaded, where the operator keeps them (`contexts.keep_documents`)."""
    found = await catalog.texts(space, parse_ref(ref, param="ref"))
    lines = b"".join(orjson.dumps({"text": text}, option=orjson.OPT_APPEND_NEWLINE) for text in found)
    return Response(lines, media_type=NDJSON[0])


@router.get("/v1/contexts/{ref}/embeddings")
async def export_context(
    request: Request, _key: CanReadContexts, catalog: CatalogOf, space: SpaceOf, ref: str
) -> Response:
    """The arrays: safetensors, or .npy with `Accept: application/x-npy`."""
    info, arrays = await catalog.export(space, parse_ref(ref, param="ref"))
    npy = NPY in request.headers.get("accept", "")
    render = to_npy if npy else partial(to_safetensors, weights=info.model_revision)
    try:
        content = await asyncio.to_thread(render, arrays)
    except ValueError as error:
        raise InvalidRequest(f"Cannot export as .npy: {error}.", param="Accept") from error
    filename = f"{info.name}.{info.version}.{'npy' if npy else 'safetensors'}"
    headers = {"x-context-id": info.id, "Content-Disposition": f'attachment; filename="{filename}"'}
    return Response(content, media_type=NPY if npy else SAFETENSORS, headers=headers)


@router.post("/v1/contexts/{name}/rollback", openapi_extra=takes(RollbackRequest))
async def rollback_context(
    _key: CanWriteContexts,
    catalog: CatalogOf,
    registry: RegistryOf,
    namespace: Namespace,
    name: str,
    body: Annotated[RollbackRequest, Depends(json_body(RollbackRequest, query=("model",)))],
    *,
    model: ModelQuery = None,
) -> Response:
    """Points a name at one of its versions."""
    served = model_named(registry, body.model, model)
    return ORJSONResponse(context_body(await catalog.rollback(Space(served.id, namespace), name, body.version)))


@router.delete("/v1/contexts/{ref}")
async def delete_context(
    _key: CanWriteContexts, catalog: CatalogOf, served: ModelOf, namespace: Namespace, ref: str
) -> Response:
    """By name: the name and all its versions; by id or name.version: that one. The default stays."""
    await catalog.delete(served, parse_ref(ref, param="ref"), namespace)
    return ORJSONResponse({"id": ref, "object": "context.deleted", "deleted": True})
