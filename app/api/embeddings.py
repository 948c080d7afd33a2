"""POST /v1/embeddings: parse -> embed -> render."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response
from starlette.datastructures import Headers

from app.api.auth import CanEmbed
from app.api.body import check_count, json_body
from app.api.dependencies import CallerOf, Embedder, Namespace, SettingsOf, admitted
from app.api.openapi import takes
from app.api.presence import while_connected
from app.api.schemas import EmbeddingsRequest, InlineContext, embeddings_body, split_input
from app.domain import Caller, Embeddings
from app.embed_request import EmbedRequest
from app.errors import InvalidRequest
from app.settings import LimitSettings
from app.telemetry.requests import part

router = APIRouter(tags=["embeddings"], dependencies=[Depends(admitted)])

SMALL = 32
"""Answers up to this many vectors are rendered on the event loop; larger ones in a thread."""
LISTED_BYTES = 1000

MANY_DOCUMENTS = "POST /v1/contexts takes any number as NDJSON."

FALLBACK_WARNING = (
    '299 cde-server "No context was named, so the default one answered. A context made from your own documents '
    'retrieves better: POST /v1/contexts, then send its name."'
)
STALE_WARNING = (
    '110 cde-server "The context store does not answer: this is the version that the name was last known to point at."'
)


@router.post("/v1/embeddings", openapi_extra=takes(EmbeddingsRequest))
async def create_embeddings(
    http: Request,
    _key: CanEmbed,
    settings: SettingsOf,
    service: Embedder,
    *,
    namespace: Namespace,
    caller: CallerOf,
    body: Annotated[EmbeddingsRequest, Depends(json_body(EmbeddingsRequest))],
    x_context: Annotated[str | None, Header()] = None,
    x_input_type: Annotated[str | None, Header()] = None,
    x_expect_fingerprint: Annotated[str | None, Header()] = None,
) -> Response:
    """Embeds texts under a context. OpenAI's API; `context`, `input_type`, `truncate` and `normalize` are ours."""
    check_agreeing(http.headers)
    request = request_of(
        body,
        settings.limits,
        namespace=namespace,
        caller=caller,
        x_context=x_context,
        x_input_type=x_input_type,
        expect_fingerprint=x_expect_fingerprint,
    )
    embeddings = await while_connected(http, service.embed(request))
    with part("render"):
        if len(embeddings.vectors) <= SMALL:
            content = embeddings_body(embeddings, body.encoding_format)
        else:
            content = await asyncio.to_thread(embeddings_body, embeddings, body.encoding_format)
    return Response(content, media_type="application/json", headers=_headers(embeddings))


def check_agreeing(headers: Headers) -> None:
    """Raises InvalidRequest where a header of ours came with several values: a framework reads one of them."""
    for name in ("X-Context", "X-Input-Type", "X-Expect-Fingerprint"):
        values = list(dict.fromkeys(headers.getlist(name)))
        if len(values) > 1:
            sent = " and ".join(value[:80] for value in values[:2])
            raise InvalidRequest(f"The header {name} came with different values: {sent}. Send one.", param=name)


def request_of(
    body: EmbeddingsRequest,
    limits: LimitSettings,
    *,
    namespace: str,
    caller: Caller,
    x_context: str | None = None,
    x_input_type: str | None = None,
    expect_fingerprint: str | None = None,
) -> EmbedRequest:
    """The use case's request. Raises InvalidRequest for too many inputs or documents."""
    texts, token_ids = split_input(body.input)
    inputs = texts if texts is not None else token_ids or []
    check_count("input", inputs, limits.max_inputs, "Send fewer texts at a time.")
    documents = body.context.documents if isinstance(body.context, InlineContext) else None
    check_count("context.documents", documents or (), limits.max_documents, MANY_DOCUMENTS)
    named = {"context": body.context if isinstance(body.context, str) else None, "X-Context": x_context}
    types = {"input_type": body.input_type, "X-Input-Type": x_input_type}
    return EmbedRequest(
        model=body.model,
        texts=texts,
        token_ids=token_ids,
        inline_documents=documents,
        contexts={source: value for source, value in named.items() if value is not None},
        input_types={source: value for source, value in types.items() if value is not None},
        truncate=body.truncate,
        dimensions=body.dimensions,
        normalize=body.normalize,
        expect_fingerprint=expect_fingerprint,
        namespace=namespace,
        caller=caller,
    )


def listed(indices: Sequence[int]) -> str:
    """The first of them, as many as fit: nginx answers 502 where all headers of an answer take over 4 KiB."""
    text = ",".join(map(str, indices))
    return text if len(text) <= LISTED_BYTES else text[: text.rindex(",", 0, LISTED_BYTES + 1)]


def _headers(embeddings: Embeddings) -> dict[str, str]:
    headers = {
        "x-context-id": embeddings.context_id,
        "x-embedding-fingerprint": embeddings.fingerprint,
        "x-compute-tokens": str(embeddings.compute_tokens),
    }
    if embeddings.context_name is not None:
        headers["x-context-name"] = embeddings.context_name
    if embeddings.truncated_inputs:
        headers["x-truncated-inputs"] = listed(embeddings.truncated_inputs)
        headers["x-truncated-count"] = str(len(embeddings.truncated_inputs))
    warnings = [STALE_WARNING] * embeddings.stale + [FALLBACK_WARNING] * embeddings.fell_back
    if warnings:
        headers["Warning"] = ", ".join(warnings)
    return headers
