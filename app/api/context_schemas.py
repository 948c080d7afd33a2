"""Wire bodies of /v1/contexts."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from app.api.schemas import InputTypeName, Stored, Texts, WireModel
from app.compatibility import Compatibility
from app.domain import ContextInfo, Selection
from app.stores.base import NewContext

MAX_METADATA, MAX_KEY, MAX_VALUE = 16, 64, 512


def _few(value: Any) -> Any:
    """Before each pair is looked at."""
    if isinstance(value, dict) and len(value) > MAX_METADATA:
        raise PydanticCustomError("pairs", "at most {most} pairs are kept", {"most": MAX_METADATA})
    return value


Metadata = Annotated[
    dict[Annotated[Stored, Field(max_length=MAX_KEY)], Annotated[Stored, Field(max_length=MAX_VALUE)]],
    Field(max_length=MAX_METADATA),
    BeforeValidator(_few),
]


def _json_object(value: Any) -> Any:
    """A query parameter holds JSON."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        raise PydanticCustomError("json", "a JSON object of strings is expected") from None


class SelectionRequest(WireModel):
    method: Literal["random", "first", "diverse"] = Field(
        "random", description="diverse: the ones that lie farthest apart among a bounded number of candidates"
    )
    seed: int = Field(0, ge=-(2**63), lt=2**63)


class ContextRequest(WireModel):
    name: str
    documents: Texts = Field(min_length=1)
    model: str | None = None
    selection: SelectionRequest = SelectionRequest()
    metadata: Metadata = Field(default_factory=dict)
    dry_run: bool = Field(False, description="Only say what would be made; nothing is stored or computed")


class StreamParameters(WireModel):
    """The query string of an NDJSON upload; `metadata` as JSON."""

    name: str
    model: str | None = None
    method: Literal["random", "first", "diverse"] = "random"
    seed: int = Field(0, ge=-(2**63), lt=2**63, strict=False)
    metadata: Annotated[Metadata, BeforeValidator(_json_object)] = Field(default_factory=dict)
    wait: bool = Field(True, strict=False)
    dry_run: bool = Field(False, strict=False)


class CompatibilityRequest(WireModel):
    with_: str = Field(alias="with", description="The other context: name, name.version or id")
    texts: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1, max_length=2048, fail_fast=True)
    input_type: InputTypeName | None = None
    top_k: int = Field(10, ge=1, le=100)
    model: str | None = None


class RollbackRequest(WireModel):
    version: int = Field(ge=1, lt=2**31)
    model: str | None = None


def id_is_known(selection: Selection) -> bool:
    """An id says which documents were chosen, and `diverse` chooses when it has seen the vectors of many."""
    return selection.method != "diverse" or selection.candidates is not None


def context_body(info: ContextInfo) -> dict[str, Any]:
    done, total = info.progress
    return {
        "object": "context",
        "id": info.id if id_is_known(info.selection) else None,
        "name": info.name,
        "version": info.version,
        "model": info.space.model,
        "status": info.status.value,
        "error": info.error,
        "selection": _selection_body(info.selection),
        "documents": asdict(info.documents),
        "corpus_size": info.corpus_size,
        "dimensions": info.dimensions,
        "usage_bytes": info.usage_bytes,
        "metadata": dict(info.metadata),
        "created_at": int(info.created_at.timestamp()),
        "progress": {"done": done, "total": total},
    }


def dry_run_body(new: NewContext) -> dict[str, Any]:
    """What a context would be; it has no version, state or time yet."""
    return {
        "object": "context",
        "id": new.id if id_is_known(new.selection) else None,
        "name": new.name,
        "version": None,
        "model": new.space.model,
        "status": None,
        "error": None,
        "selection": _selection_body(new.selection),
        "documents": asdict(new.documents),
        "corpus_size": new.corpus_size,
        "dimensions": new.dimensions,
        "usage_bytes": 0,
        "metadata": dict(new.metadata),
        "created_at": None,
        "progress": {"done": 0, "total": new.total},
        "dry_run": True,
    }


def _selection_body(selection: Selection) -> dict[str, Any]:
    body: dict[str, Any] = {"method": selection.method, "seed": selection.seed}
    if selection.method == "diverse":
        body |= {"candidates": selection.candidates, "coverage_radius": selection.coverage_radius}
    return body


def compatibility_body(found: Compatibility) -> dict[str, Any]:
    return {
        "object": "context.compatibility",
        "model": found.model,
        "context": {"id": found.contexts[0].id, "name": found.contexts[0].name},
        "with": {"id": found.contexts[1].id, "name": found.contexts[1].name},
        "texts": found.texts,
        "cosine": {"mean": found.mean_cosine, "min": found.min_cosine},
        "overlap": {"top_k": found.top_k, "mean": found.overlap},
    }
