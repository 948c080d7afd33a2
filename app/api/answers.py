"""The bodies of answers as the OpenAPI page describes them. Answers are rendered without them, for speed; the tests
hold every answer against them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Answered(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EmbeddingItem(Answered):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or base64 of little-endian float32")


class Usage(Answered):
    prompt_tokens: int = Field(description="Prompt and special tokens in, context rows not")
    total_tokens: int


class EmbeddingsAnswer(Answered):
    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: Usage


class SelectionAnswer(Answered):
    method: Literal["random", "first", "diverse", "import"]
    seed: int
    candidates: int | None = Field(None, description="diverse: from how many it was chosen")
    coverage_radius: float | None = Field(
        None, description="diverse: largest cosine distance of a candidate to the nearest chosen document"
    )


class DocumentsAnswer(Answered):
    received: int
    chosen: int
    duplicates: int
    truncated: int
    repeated: int


class ProgressAnswer(Answered):
    done: int
    total: int


class ContextAnswer(Answered):
    """null where a dry run has none; `id` also while `diverse` still chooses."""

    object: Literal["context"]
    id: str | None
    name: str
    version: int | None
    model: str
    status: Literal["in_progress", "completed", "failed"] | None
    error: str | None
    selection: SelectionAnswer
    documents: DocumentsAnswer
    corpus_size: int
    dimensions: int
    usage_bytes: int
    metadata: dict[str, str]
    created_at: int | None
    progress: ProgressAnswer
    dry_run: bool = False


class _List(Answered):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ContextListAnswer(_List):
    data: list[ContextAnswer]


class DeletedAnswer(Answered):
    id: str
    object: Literal["context.deleted", "file"]
    deleted: bool


class NamedContext(Answered):
    id: str
    name: str | None


class CosineAnswer(Answered):
    mean: float
    min: float


class OverlapAnswer(Answered):
    top_k: int
    mean: float | None


class CompatibilityAnswer(Answered):
    object: Literal["context.compatibility"]
    model: str
    context: NamedContext
    with_: NamedContext = Field(alias="with")
    texts: int
    cosine: CosineAnswer
    overlap: OverlapAnswer


class ModelAnswer(Answered):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_input_tokens: int
    dimensions: int
    corpus_size: int
    approximate: bool


class ModelListAnswer(Answered):
    object: Literal["list"]
    data: list[ModelAnswer]


class TokensAnswer(Answered):
    index: int
    input_ids: list[int]
    tokens: list[str]
    count: int


class TokenizeAnswer(Answered):
    object: Literal["list"]
    data: list[TokensAnswer]
    model: str
    max_input_tokens: int


class InfoAnswer(Answered):
    version: str
    models: list[dict[str, Any]]
    limits: dict[str, int]
    default_context: str
    require_context: bool
    truncate: Literal["none", "end"]
    token_ids: Literal["cl100k_base", "model", "reject"]


class StatusAnswer(Answered):
    status: Literal["ok", "ready"]


class FileAnswer(Answered):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: str | None


class FileListAnswer(_List):
    data: list[FileAnswer]


class BatchProblem(Answered):
    code: str
    message: str
    line: int | None
    param: str | None


class BatchProblems(Answered):
    object: Literal["list"]
    data: list[BatchProblem]


class RequestCounts(Answered):
    total: int
    completed: int
    failed: int


class BatchAnswer(Answered):
    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchProblems | None
    input_file_id: str
    completion_window: str
    status: Literal["validating", "failed", "in_progress", "finalizing", "completed", "cancelling", "cancelled"]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchListAnswer(_List):
    data: list[BatchAnswer]
