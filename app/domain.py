"""The nouns that pass between rooms. Frozen, and free of behaviour that needs another room."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

FloatArray = npt.NDArray[np.float32]
Arrays = Mapping[str, FloatArray]
"""A context's payload: named float32 arrays. `dataset_embeddings` (corpus_size, hidden_size) is always among them."""

DATASET_EMBEDDINGS = "dataset_embeddings"
DEFAULT_CONTEXT = "default"
CHARACTERS_PER_TOKEN = 64
"""A text is read as far as this many characters for each token of the model's max length. A token is four or five
characters of prose, and some tens where a table is padded with blanks."""
SHARED = ""
"""The namespace of everything that belongs to no key's own: what the server makes, and what keys without one make."""


class InputType(StrEnum):
    """Which prompt stands before a text."""

    QUERY = "query"
    DOCUMENT = "document"
    NONE = "none"


class Stage(StrEnum):
    """Which of the model's two encoders runs."""

    FIRST = "first"
    SECOND = "second"


class Lane(StrEnum):
    """How urgent a request's texts are, most urgent first: few texts, many texts, texts that nobody waits for."""

    INTERACTIVE = "interactive"
    BULK = "bulk"
    BACKGROUND = "background"


@dataclass(frozen=True, slots=True)
class Caller:
    """For whom something is computed. `client`: a key, or a connection; clients have equal shares of the device.
    `deadline`: until when an answer is of use, in seconds of time.monotonic(). `background`: nobody waits for it."""

    client: str = ""
    deadline: float | None = None
    background: bool = False


ANYBODY = Caller()
BACKGROUND = Caller(background=True)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a loaded model is and takes. `revision` is the SHA-256 of its weights, wherever they came from;
    `context_rows`: how many rows are computed for each text besides its own."""

    id: str
    family: str
    semantics: str
    revision: str
    tokenizer_revision: str
    source: str
    hidden_size: int
    max_length: int
    corpus_size: int
    corpus_size_is_exact: bool
    context_rows: int
    prompts: Mapping[InputType, str]
    default_input_type: InputType
    vocab_size: int
    dtype: str
    device: str
    has_first_stage: bool
    is_cde: bool
    pads: bool = False
    """Its batches are padded to their longest text; else rows are packed."""
    config_revision: str = ""
    """Of the backbone's configuration, where the weights alone do not say what is computed."""
    approximate: bool = False
    """Context rows are frozen: not what the model was fitted to compute, and not comparable with it."""
    fallback_documents: tuple[str, ...] | None = None
    """Documents of the default context the checkpoint ships; empty: the model works without a context; None: ours."""

    @property
    def max_characters(self) -> int:
        """How much of a text to keep: all that is read of it, and one more, by which a longer one is known."""
        return self.max_length * CHARACTERS_PER_TOKEN + 1

    def fingerprint(self, context_id: str, dimensions: int, *, normalized: bool) -> str:
        """Hash over everything that decides a vector besides its text: equal fingerprints, comparable vectors."""
        model = (self.revision, self.config_revision, self.tokenizer_revision, self.semantics, self.max_length)
        parts = (*model, context_id, self.dtype, dimensions, normalized)
        return "fp_" + hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """One text as a model takes it: prompt and special tokens in, cut to the model's max length."""

    input_ids: tuple[int, ...]
    input_type: InputType
    truncated: bool = False


class ContextStatus(StrEnum):
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class DocumentCounts:
    """What became of the documents a context was made from."""

    received: int = 0
    chosen: int = 0
    duplicates: int = 0
    truncated: int = 0
    repeated: int = 0


@dataclass(frozen=True, slots=True)
class Selection:
    """How the minicorpus is chosen from the documents.

    `diverse`: from how many `candidates`, and the largest cosine distance, 0 to 2, of one of them to the nearest
    chosen document in the first stage's vectors.
    """

    method: Literal["random", "first", "diverse", "import"] = "random"
    seed: int = 0
    candidates: int | None = None
    coverage_radius: float | None = None


@dataclass(frozen=True, slots=True)
class Space:
    """Where context names live: a model, and the namespace of a key."""

    model: str
    namespace: str = SHARED


@dataclass(frozen=True, slots=True)
class ContextInfo:
    """A stored context version without its payload. `progress`: documents through the first stage, and all.
    `stale`: the store does not answer, and this is what it said last; the name may point elsewhere by now."""

    id: str
    space: Space
    model_revision: str
    name: str
    version: int
    status: ContextStatus
    progress: tuple[int, int]
    created_at: datetime
    selection: Selection
    documents: DocumentCounts
    corpus_size: int
    dimensions: int
    usage_bytes: int
    error: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    stale: bool = False


@dataclass(frozen=True, slots=True)
class ContextRef:
    """How a caller names a context: an id, a name (its current version) or name.version."""

    text: str
    id: str | None = None
    name: str | None = None
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Payload:
    """A context as the engine takes it: its arrays, under a key that names their content and whose it is."""

    key: str
    arrays: Arrays


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The answer to one request: float32 vectors (n, dimensions) in the order of the input, and how they were made."""

    vectors: FloatArray
    prompt_tokens: int
    compute_tokens: int
    truncated_inputs: Sequence[int]
    model: str
    context_id: str
    context_name: str | None
    fell_back: bool
    fingerprint: str
    stale: bool = False
    """The context is the last known one of its name; see ContextInfo."""


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a listing, and whether more follows."""

    items: Sequence[T]
    has_more: bool
