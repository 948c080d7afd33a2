"""Wire bodies of /v1/files and /v1/batches, as OpenAI's."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field

from app.api.context_schemas import Metadata
from app.api.schemas import Stored, WireModel
from app.stores.batch_base import BatchInfo, BatchStatus, FileInfo

TIMES = (
    "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at",
    "cancelled_at",
)  # fmt: skip
"""`expires_at` and `expired_at` stay null: a batch here runs until it is done."""


class ExpiresAfter(WireModel):
    anchor: Literal["created_at"] = Field(description="the time the file is created")
    seconds: Annotated[int, Field(strict=False, ge=3600, le=2_592_000)]  # a form holds it as text


class FileRequest(WireModel):
    purpose: str = Field(description="batch")
    expires_after: ExpiresAfter | None = None


class BatchRequest(WireModel):
    input_file_id: Stored
    endpoint: str = Field(description="/v1/embeddings")
    completion_window: str = Field(description="24h; a batch runs until it is done")
    metadata: Metadata = Field(default_factory=dict)
    output_expires_after: ExpiresAfter | None = Field(None, description="of the output and error files")


def file_body(info: FileInfo) -> dict[str, Any]:
    return {
        "id": info.id,
        "object": "file",
        "bytes": info.bytes,
        "created_at": info.created_at,
        "expires_at": info.expires_at,
        "filename": info.filename,
        "purpose": info.purpose,
        "status": "processed",
        "status_details": None,
    }


def batch_body(info: BatchInfo) -> dict[str, Any]:
    failed = info.status is BatchStatus.FAILED
    return {
        "id": info.id,
        "object": "batch",
        "endpoint": info.endpoint,
        "errors": {"object": "list", "data": [asdict(problem) for problem in info.problems]} if failed else None,
        "input_file_id": info.input_file_id,
        "completion_window": info.completion_window,
        "status": info.status.value,
        "output_file_id": info.output_file_id,
        "error_file_id": info.error_file_id,
        "created_at": info.created_at,
        **{name: info.times.get(name) for name in TIMES},
        "request_counts": {"total": info.total, "completed": info.completed, "failed": info.failed},
        "metadata": dict(info.metadata) or None,
    }
