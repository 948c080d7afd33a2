"""The OpenAPI page: request bodies that routes parse themselves, and the one error shape."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from app.api.batch_schemas import BatchRequest
from app.api.context_schemas import CompatibilityRequest, ContextRequest, RollbackRequest
from app.api.schemas import NPY, SAFETENSORS, EmbeddingsRequest, ErrorBody, TokenizeRequest, WireModel

COMPONENT = "#/components/schemas/{model}"
BODIES: tuple[type[WireModel], ...] = (
    EmbeddingsRequest,
    ContextRequest,
    BatchRequest,
    CompatibilityRequest,
    RollbackRequest,
    TokenizeRequest,
    ErrorBody,
)


def takes(model: type[WireModel], *other_media_types: str) -> dict[str, Any]:
    """`openapi_extra` of a route whose JSON body is `model`; other media types are streams of their own."""
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": COMPONENT.format(model=model.__name__)}}}
    content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in other_media_types}
    return {"requestBody": {"required": True, "content": content}}


def arrays() -> dict[str, Any]:
    """`openapi_extra` of the route that takes a context's arrays."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": {SAFETENSORS: binary, NPY: binary}}}


def form() -> dict[str, Any]:
    """`openapi_extra` of the route that takes a file."""
    properties = {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": ["batch"]}}
    schema = {"type": "object", "properties": properties, "required": ["file", "purpose"]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def install(app: FastAPI) -> None:
    """Adds the bodies' schemas to the page, and the error answer to every route."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            page = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            _, schemas = models_json_schema([(model, "validation") for model in BODIES], ref_template=COMPONENT)
            page.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
            error = {"$ref": COMPONENT.format(model=ErrorBody.__name__)}
            answer = {"description": "What was wrong", "content": {"application/json": {"schema": error}}}
            for path in page["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # validation errors are 400, in the same shape
                    operation["responses"]["default"] = answer
            for unused in ("HTTPValidationError", "ValidationError"):
                page["components"]["schemas"].pop(unused, None)
            app.openapi_schema = page
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]
