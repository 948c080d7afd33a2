"""The OpenAPI page: bodies that routes parse and render themselves, headers, and the one error shape."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.api import answers
from app.api.batch_schemas import BatchRequest
from app.api.context_schemas import CompatibilityRequest, ContextRequest, RollbackRequest
from app.api.schemas import NPY, SAFETENSORS, EmbeddingsRequest, ErrorBody, TokenizeRequest, WireModel

COMPONENT = "#/components/schemas/{model}"
BINARY = {"schema": {"type": "string", "format": "binary"}}
BODIES: tuple[type[WireModel], ...] = (
    EmbeddingsRequest,
    ContextRequest,
    CompatibilityRequest,
    BatchRequest,
    RollbackRequest,
    TokenizeRequest,
    ErrorBody,
)
EXAMPLES: dict[str, Any] = {
    "EmbeddingsRequest": {"model": "minilm-context@legal:query", "input": ["Who pays?", "When?"], "truncate": "end"},
    "ContextRequest": {"name": "legal", "documents": ["The tenant pays.", "By the third of the month."]},
    "CompatibilityRequest": {"with": "legal.2", "texts": ["Who pays?", "When?"]},
    "BatchRequest": {"input_file_id": "file-1", "endpoint": "/v1/embeddings", "completion_window": "24h"},
    "RollbackRequest": {"version": 1},
    "TokenizeRequest": {"input": "Who pays?"},
}
ANSWERS: dict[tuple[str, str], type[BaseModel]] = {
    ("post", "/v1/embeddings"): answers.EmbeddingsAnswer,
    ("post", "/v1/contexts"): answers.ContextAnswer,
    ("get", "/v1/contexts"): answers.ContextListAnswer,
    ("get", "/v1/contexts/{ref}"): answers.ContextAnswer,
    ("delete", "/v1/contexts/{ref}"): answers.DeletedAnswer,
    ("get", "/v1/contexts/{name}/versions"): answers.ContextListAnswer,
    ("put", "/v1/contexts/{name}/embeddings"): answers.ContextAnswer,
    ("post", "/v1/contexts/{name}/rollback"): answers.ContextAnswer,
    ("post", "/v1/contexts/{ref}/compatibility"): answers.CompatibilityAnswer,
    ("post", "/v1/files"): answers.FileAnswer,
    ("get", "/v1/files"): answers.FileListAnswer,
    ("get", "/v1/files/{file_id}"): answers.FileAnswer,
    ("delete", "/v1/files/{file_id}"): answers.DeletedAnswer,
    ("post", "/v1/batches"): answers.BatchAnswer,
    ("get", "/v1/batches"): answers.BatchListAnswer,
    ("get", "/v1/batches/{batch_id}"): answers.BatchAnswer,
    ("post", "/v1/batches/{batch_id}/cancel"): answers.BatchAnswer,
    ("get", "/v1/models"): answers.ModelListAnswer,
    ("get", "/v1/models/{name}"): answers.ModelAnswer,
    ("post", "/tokenize"): answers.TokenizeAnswer,
    ("get", "/info"): answers.InfoAnswer,
    **{("get", path): answers.StatusAnswer for path in ("/health", "/health/live", "/ready", "/health/ready")},
}
STREAMS = {
    ("get", "/v1/contexts/{ref}/embeddings"): (SAFETENSORS, NPY),
    ("get", "/v1/contexts/{ref}/documents"): ("application/x-ndjson",),
    ("get", "/v1/files/{file_id}/content"): ("application/jsonl",),
    ("get", "/metrics"): ("text/plain", "application/openmetrics-text"),
}
STATUSES = {
    ("post", "/v1/contexts"): {
        "200": "This content was there already, or a dry run",
        "201": "Created",
        "202": "In progress",
    },
    ("put", "/v1/contexts/{name}/embeddings"): {"200": "This content was there already", "201": "Created"},
}
ERRORS = {
    "400": "The request cannot be served as it is",
    "401": "The key is missing or wrong",
    "403": "The key lacks the scope",
    "404": "Nothing is there",
    "408": "The request came too slowly",
    "413": "The body is over the limit",
    "415": "Another Content-Type is expected",
    "429": "No room at the moment; `Retry-After` says when to try again",
    "431": "The headers are over the limit",
    "500": "Our fault",
    "503": "Not now; `Retry-After` says when to try again",
}
OTHER_SPACE = {"412": "The fingerprint is another one"}
EVERYWHERE = {
    "x-request-id": "The caller's, when sane, else ours",
    "openai-processing-ms": "Milliseconds until the answer began",
    "openai-version": "2020-10-01",
}
OF_EMBEDDINGS = {
    "x-context-id": "The exact context version used",
    "x-context-name": "Its name, where it has one",
    "x-embedding-fingerprint": "Equal fingerprints, comparable vectors",
    "x-compute-tokens": "Tokens as computed, context rows counted",
    "Server-Timing": "Milliseconds of each part: tokenize, context, compute (queue and forward in it), render, total",
    "x-truncated-inputs": "Which inputs were cut: 0,5; the first of them, where they are hundreds",
    "x-truncated-count": "How many were cut",
    "Warning": "Where the default context answered",
}


def takes(model: type[WireModel], *other_media_types: str) -> dict[str, Any]:
    """`openapi_extra` of a route whose JSON body is `model`; other media types are streams of their own."""
    name = model.__name__
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": COMPONENT.format(model=name)}, "example": EXAMPLES[name]}
    }
    content |= dict.fromkeys(other_media_types, BINARY)
    return {"requestBody": {"required": True, "content": content}}


def arrays() -> dict[str, Any]:
    """`openapi_extra` of the route that takes a context's arrays."""
    return {"requestBody": {"required": True, "content": {SAFETENSORS: BINARY, NPY: BINARY}}}


def form() -> dict[str, Any]:
    """`openapi_extra` of the route that takes a file."""
    properties = {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after": {"$ref": COMPONENT.format(model="ExpiresAfter")},
    }
    schema = {"type": "object", "properties": properties, "required": ["file", "purpose"]}
    encoding = {"expires_after": {"style": "deepObject", "explode": True}}
    form = {"schema": schema, "encoding": encoding}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": form}}}


def install(app: FastAPI) -> None:
    """Makes the page whole: schemas of bodies and answers, headers, errors, keys."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            page = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            components = page.setdefault("components", {})
            requests = [(model, "validation") for model in BODIES]
            replies = [(model, "serialization") for model in dict.fromkeys(ANSWERS.values())]
            _, schemas = models_json_schema([*requests, *replies], ref_template=COMPONENT)  # type: ignore[list-item]
            components["schemas"] = dict(sorted(schemas["$defs"].items()))
            components["headers"] = _headers(EVERYWHERE | OF_EMBEDDINGS)
            components["responses"] = {status: _error(text) for status, text in (ERRORS | OTHER_SPACE).items()}
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, operations in page["paths"].items():
                for method, operation in operations.items():
                    operation["responses"] = _responses(method, path)
                    if path.startswith(("/v1/", "/tokenize", "/info")):
                        operation["security"] = [{"key": []}, {}]
            app.openapi_schema = page
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def _responses(method: str, path: str) -> dict[str, Any]:
    key = method, path
    if key in STREAMS:
        content: dict[str, Any] = dict.fromkeys(STREAMS[key], BINARY)
    else:
        content = {"application/json": {"schema": {"$ref": COMPONENT.format(model=ANSWERS[key].__name__)}}}
    embeds = path == "/v1/embeddings"
    headers = _references("headers", [*EVERYWHERE, *(OF_EMBEDDINGS if embeds else ())])
    found = {
        status: {"description": description, "headers": headers, "content": content}
        for status, description in STATUSES.get(key, {"200": "The answer"}).items()
    }
    return found | _references("responses", sorted([*ERRORS, *(OTHER_SPACE if embeds else ())]))


def _error(description: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": COMPONENT.format(model=ErrorBody.__name__)}}}
    return {"description": description, "headers": _references("headers", [*EVERYWHERE]), "content": content}


def _references(kind: str, names: Sequence[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/{kind}/{name}"} for name in names}


def _headers(descriptions: dict[str, str]) -> dict[str, Any]:
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in descriptions.items()}
