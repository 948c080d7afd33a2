"""/v1/files and /v1/batches: OpenAI's Batch API for /v1/embeddings."""

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.responses import StreamingResponse
from starlette.types import Message

from app.api.auth import CanEmbed
from app.api.batch_schemas import BatchRequest, FileRequest, batch_body, file_body
from app.api.body import json_body, validated
from app.api.dependencies import BatchesOf, Namespace, SettingsOf, admitted
from app.api.embeddings import request_of
from app.api.intake import incoming
from app.api.openai_errors import response_of
from app.api.openapi import form, takes
from app.api.schemas import EmbeddingsRequest, ORJSONResponse, embeddings_body, list_body
from app.batches.service import check_purpose
from app.domain import Caller
from app.errors import (
    InvalidRequest,
    RequestTooLarge,
    RetryableError,
    StoreError,
    UnsupportedMediaType,
)
from app.service import EmbeddingService
from app.settings import Settings

router = APIRouter(tags=["batches"], dependencies=[Depends(admitted)])

PIECE = 2**20
FORM_OVERHEAD = 2**16
"""What a form may hold beside the file."""

Limit = Annotated[int, Query(ge=1, le=100)]


class LineAnswers:
    """A batch line's body -> what POST /v1/embeddings answers, computed in the background."""

    def __init__(self, service: EmbeddingService, settings: Settings) -> None:
        self._service = service
        self._settings = settings

    async def __call__(self, raw: Any, namespace: str) -> tuple[int, bytes]:
        """Status and body. Raises RetryableError, and StoreError where that passes."""
        try:
            lenient = self._settings.server.unknown_parameters == "ignore"
            body = validated(EmbeddingsRequest, raw, ignore_unknown=lenient)
            caller = Caller(client=f"namespace {namespace}", background=True)
            request = request_of(body, self._settings.limits, namespace=namespace, caller=caller)
            embeddings = await self._service.embed(request)
            return 200, await asyncio.to_thread(embeddings_body, embeddings, body.encoding_format)
        except RetryableError:
            raise
        except Exception as error:
            if isinstance(error, StoreError) and error.passes:
                raise
            return self.given_up(error)

    def given_up(self, error: Exception) -> tuple[int, bytes]:
        """What the endpoint answers to this."""
        response = response_of(error)
        return response.status_code, bytes(response.body)


@router.post("/v1/files", openapi_extra=form())
async def upload_file(
    request: Request, settings: SettingsOf, _key: CanEmbed, batches: BatchesOf, namespace: Namespace
) -> Response:
    """A file of batch lines: multipart form with `file` and `purpose`."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise UnsupportedMediaType("multipart/form-data in UTF-8, with 'file' and 'purpose', is expected.")
    limit = settings.limits.max_file_bytes
    async with _bounded(request, limit).form(max_files=1, max_fields=20) as given:
        lenient = settings.server.unknown_parameters == "ignore"
        asked = validated(FileRequest, _fields(given), ignore_unknown=lenient)
        check_purpose(asked.purpose)
        file = given.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequest("Missing required parameter: 'file'.", param="file")
        if (file.size or 0) > limit:
            raise _too_large(limit)

        def content() -> Iterator[bytes]:
            file.file.seek(0)
            while piece := file.file.read(PIECE):
                yield piece

        seconds = None if asked.expires_after is None else asked.expires_after.seconds
        info = await batches.upload(namespace, _named(file), asked.purpose, content(), seconds)
    return ORJSONResponse(file_body(info))


def _fields(given: FormData) -> dict[str, Any]:
    """All but the file; `outer[inner]` is how clients write an object into a form."""
    flat: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        outer, bracket, inner = name.partition("[")
        if bracket:
            nested.setdefault(outer, {})[inner.removesuffix("]")] = value
        elif name != "file":
            flat[name] = value
    return flat | nested


def _named(file: UploadFile) -> str:
    return (file.filename or "upload.jsonl").replace("\0", "")


def _bounded(request: Request, limit: int) -> Request:
    """The request, whose body breaks off with RequestTooLarge, BodiesFull."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit + FORM_OVERHEAD:
        raise _too_large(limit)
    spooled, size = incoming(request).files, 0

    async def receive() -> Message:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > limit + FORM_OVERHEAD:
            raise _too_large(limit)
        spooled.hold(min(size, limit))
        return message

    return Request(request.scope, receive)


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The file is larger than the {limit} bytes this server takes. Split it.")


@router.get("/v1/files")
async def list_files(
    _key: CanEmbed,
    batches: BatchesOf,
    namespace: Namespace,
    *,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    found = await batches.files(namespace, purpose=purpose, after=after, limit=limit, newest_first=order == "desc")
    return ORJSONResponse(list_body([file_body(info) for info in found.items], has_more=found.has_more))


@router.get("/v1/files/{file_id}")
async def get_file(_key: CanEmbed, batches: BatchesOf, namespace: Namespace, file_id: str) -> Response:
    return ORJSONResponse(file_body(await batches.file(namespace, file_id)))


@router.get("/v1/files/{file_id}/content")
async def get_content(_key: CanEmbed, batches: BatchesOf, namespace: Namespace, file_id: str) -> Response:
    info, chunks = await batches.content(namespace, file_id)
    return StreamingResponse(chunks, media_type="application/jsonl", headers={"Content-Length": str(info.bytes)})


@router.delete("/v1/files/{file_id}")
async def delete_file(_key: CanEmbed, batches: BatchesOf, namespace: Namespace, file_id: str) -> Response:
    await batches.delete_file(namespace, file_id)
    return ORJSONResponse({"id": file_id, "object": "file", "deleted": True})


@router.post("/v1/batches", openapi_extra=takes(BatchRequest))
async def create_batch(
    _key: CanEmbed,
    batches: BatchesOf,
    namespace: Namespace,
    body: Annotated[BatchRequest, Depends(json_body(BatchRequest))],
) -> Response:
    """Accepted and durable; its lines are checked and run behind."""
    kept = None if body.output_expires_after is None else body.output_expires_after.seconds
    batch = await batches.create(
        namespace, body.input_file_id, body.endpoint, body.completion_window, body.metadata, output_seconds=kept
    )
    return ORJSONResponse(batch_body(batch))


@router.get("/v1/batches")
async def list_batches(
    _key: CanEmbed, batches: BatchesOf, namespace: Namespace, *, limit: Limit = 20, after: str | None = None
) -> Response:
    """Newest first."""
    found = await batches.list(namespace, after=after, limit=limit)
    return ORJSONResponse(list_body([batch_body(info) for info in found.items], has_more=found.has_more))


@router.get("/v1/batches/{batch_id}")
async def get_batch(_key: CanEmbed, batches: BatchesOf, namespace: Namespace, batch_id: str) -> Response:
    return ORJSONResponse(batch_body(await batches.get(namespace, batch_id)))


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(_key: CanEmbed, batches: BatchesOf, namespace: Namespace, batch_id: str) -> Response:
    """What is answered by then is kept in the output file."""
    return ORJSONResponse(batch_body(await batches.cancel(namespace, batch_id)))
