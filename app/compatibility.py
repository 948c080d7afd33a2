"""How far two contexts of a model part on some texts, so that a migration between them is a number."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from app.domain import ANYBODY, SHARED, Caller, Embeddings
from app.embed_request import EmbedRequest
from app.errors import ContextNotFound, UnknownContextNamed
from app.registry import ServedModel
from app.service import EmbeddingService
from app.vectors import cosines_of, overlap


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to compare: two contexts as a caller names them, and on which texts."""

    served: ServedModel
    ref: str
    other: str
    texts: Sequence[str]
    input_type: str | None = None
    top_k: int = 10
    namespace: str = SHARED
    caller: Caller = ANYBODY


@dataclass(frozen=True, slots=True)
class Compared:
    """A context of the report."""

    id: str
    name: str | None


@dataclass(frozen=True, slots=True)
class Compatibility:
    """Cosine of each text's two vectors; `overlap`: of its `top_k` nearest other texts, 0 to 1, None where there are
    no more than those."""

    model: str
    contexts: tuple[Compared, Compared]
    texts: int
    mean_cosine: float
    min_cosine: float
    top_k: int
    overlap: float | None


async def compare(service: EmbeddingService, comparison: Comparison) -> Compatibility:
    """Embeds the texts under both contexts, cut where they are too long. Raises ContextNotFound, and as `embed`."""
    try:
        a = await service.embed(_request(comparison, comparison.ref, "ref"))
    except UnknownContextNamed as error:  # it is in the path
        raise ContextNotFound(error.message, param="ref") from error
    try:
        b = await service.embed(_request(comparison, comparison.other, "with"))
    except UnknownContextNamed as error:
        raise UnknownContextNamed(error.message, param="with") from error
    cosines = cosines_of(a.vectors, b.vectors)
    shared = await asyncio.to_thread(overlap, a.vectors, b.vectors, comparison.top_k)
    contexts = _compared(a), _compared(b)
    mean, least = float(cosines.mean()), float(cosines.min())
    return Compatibility(comparison.served.id, contexts, len(comparison.texts), mean, least, comparison.top_k, shared)


def _request(comparison: Comparison, ref: str, source: str) -> EmbedRequest:
    return EmbedRequest(
        model=comparison.served.id,
        texts=comparison.texts,
        contexts={source: ref},
        input_types={} if comparison.input_type is None else {"input_type": comparison.input_type},
        truncate="end",
        namespace=comparison.namespace,
        caller=comparison.caller,
    )


def _compared(embeddings: Embeddings) -> Compared:
    return Compared(embeddings.context_id, embeddings.context_name)
