"""Wire bodies, with OpenAI's names, and how vectors are written: float lists, or base64 of little-endian float32."""

import base64
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from app.domain import Embeddings, FloatArray, ModelSpec
from app.json_text import without_lone_surrogates

MAX_FIELDS = 64
"""More than any object has; behind them nothing is complained of one by one."""
SAFETENSORS, NPY = "application/vnd.safetensors", "application/x-npy"


class ORJSONResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


_KINDS = {str: "a string", int: "an integer", float: "a number", bool: "a boolean", type(None): "null"}


def _checked_input(value: Any) -> Any:
    """A string, [string], [int] or [[int]]; the message never repeats what was sent."""
    if isinstance(value, str):
        if not value:
            raise PydanticCustomError("input", "an empty string cannot be embedded")
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("input", "a string, a list of strings, or lists of token ids are expected")
    if not value:
        raise PydanticCustomError("input", "the list is empty; at least one text is needed")
    if all(type(item) is str for item in value):
        if "" in value:
            reason = f"item {value.index('')} is an empty string, which cannot be embedded"
            raise PydanticCustomError("input", "{reason}", {"reason": reason})
        return value
    if all(type(item) is int for item in value):
        return value
    if all(type(item) is list and item and all(type(t) is int for t in item) for item in value):
        return value
    first = _kind(value[0])
    odd = next((f", and item {i} is {_kind(item)}" for i, item in enumerate(value) if _kind(item) != first), "")
    reason = (
        f"the items must all be strings, all token ids, or all non-empty lists of token ids; item 0 is {first}{odd}"
    )
    raise PydanticCustomError("input", "{reason}", {"reason": reason})


def _kind(item: Any) -> str:
    """In JSON's words."""
    if isinstance(item, list):
        return "a list of token ids" if item and all(type(t) is int for t in item) else "another list"
    return _KINDS.get(type(item), "an object")


Input = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_checked_input),  # pydantic would look at every item again, once for each branch
    WithJsonSchema(
        {
            "oneOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 2048},
                {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2048},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
                    "minItems": 1,
                    "maxItems": 2048,
                },
            ]
        }
    ),
]


def _storable(value: str) -> str:
    """What every database takes as text."""
    if "\0" in value or without_lone_surrogates(value) != value:
        raise PydanticCustomError("storable", "a NUL character or half an emoji cannot be stored")
    return value


Stored = Annotated[str, AfterValidator(_storable)]
Texts = Annotated[list[str], Field(fail_fast=True)]
"""One complaint is enough: a million of them would take up a gigabyte."""
InputTypeName = Literal["query", "document", "none"]


class WireModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        given = {k: v for k, v in raw.items() if v is not None}
        if len(given) > MAX_FIELDS:
            raise PydanticCustomError("fields", "at most {most} fields are read", {"most": MAX_FIELDS})
        return given


class InlineContext(WireModel):
    documents: Texts = Field(min_length=1, description="Documents for this request alone; cached by content")


class EmbeddingsRequest(WireModel):
    input: Input = Field(description="Text or texts; integers are token ids (setting `token_ids`)")
    model: str = Field(description="MODEL[@CONTEXT[.VERSION]][:INPUT_TYPE]")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None
    context: str | InlineContext | None = Field(None, description="name, name.version, id, or documents")
    input_type: InputTypeName | None = None
    truncate: Literal["none", "end"] | None = None
    normalize: bool = True


class TokenizeRequest(WireModel):
    input: str | Texts
    model: str | None = None
    input_type: InputTypeName | None = None


class ErrorDetail(WireModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(WireModel):
    """OpenAI's error shape, on every path."""

    error: ErrorDetail


def split_input(
    given: str | list[str] | list[int] | list[list[int]],
) -> tuple[list[str] | None, list[list[int]] | None]:
    """Texts, or lists of token ids; the other one is None."""
    if isinstance(given, str):
        return [given], None
    texts = [item for item in given if isinstance(item, str)]
    if texts:
        return texts, None
    many = [item for item in given if isinstance(item, list)]
    return None, many or [[item for item in given if isinstance(item, int)]]


def embeddings_body(embeddings: Embeddings, encoding_format: str) -> bytes:
    """OpenAI's answer, rendered from one contiguous float32 array.

    Row by row: orjson keeps the interpreter lock, and one call for thousands of rows would stop the event loop.
    """
    vectors = np.ascontiguousarray(embeddings.vectors, dtype="<f4")
    rows = (
        orjson.dumps(
            {"object": "embedding", "index": i, "embedding": _encoded(row, encoding_format)},
            option=orjson.OPT_SERIALIZE_NUMPY,
        )
        for i, row in enumerate(vectors)
    )
    usage = {"prompt_tokens": embeddings.prompt_tokens, "total_tokens": embeddings.prompt_tokens}
    rest = orjson.dumps({"model": embeddings.model, "usage": usage})
    return b'{"object":"list","data":[' + b",".join(rows) + b"]," + rest[1:]


def _encoded(row: FloatArray, encoding_format: str) -> FloatArray | str:
    return base64.b64encode(row.tobytes()).decode() if encoding_format == "base64" else row


def list_body(data: Sequence[Mapping[str, Any]], *, has_more: bool = False) -> dict[str, Any]:
    return {
        "object": "list",
        "data": list(data),
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


def model_body(spec: ModelSpec, name: str, created: int, *, parent: str | None = None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "cde-server" if spec.is_cde else "cde-server (not a CDE model)",
        "root": spec.id,
        "parent": parent,
        "max_input_tokens": spec.max_length,
        "dimensions": spec.hidden_size,
        "corpus_size": spec.corpus_size,
        "approximate": spec.approximate,
    }
