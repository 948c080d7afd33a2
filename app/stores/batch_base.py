"""Files and batches as they are stored. The words are those of OpenAI's Batch API; times are Unix seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

LEASE_SECONDS = 10.0
"""A batch whose process gave no sign of life for so long is taken over by another one."""


class BatchStatus(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


UNFINISHED = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.CANCELLING)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A stored file without its content. Times in Unix seconds; from `expires_at` on it is not there."""

    id: str
    namespace: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a batch's input cannot be run; `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """A batch. `times`: when it came into each state, by OpenAI's names (`in_progress_at`, …). `output_seconds`: what
    its output files have to live; None: for ever."""

    id: str
    namespace: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    status: BatchStatus = BatchStatus.VALIDATING
    times: Mapping[str, int] = field(default_factory=dict)
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    problems: Sequence[Problem] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    output_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A batch that is its owner's now. `orphaned`: its last owner has died."""

    batch: BatchInfo
    orphaned: bool


@dataclass(frozen=True, slots=True)
class LineResult:
    """The answer to a line of the input, as a line of the output (`ok`) or of the errors, newline in."""

    number: int
    ok: bool
    data: bytes


class LeaseLost(Exception):
    """Another process has taken the batch over."""
