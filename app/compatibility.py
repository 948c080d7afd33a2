"""How far two contexts of a model part on some texts, so that a migration between them is a number."""

import asyncio
from dataclasses import dataclass, replace

from app.embed_request import EmbedRequest
from app.errors import ContextNotFound, UnknownContextNamed
from app.service import EmbeddingService
from app.vectors import cosines_of, overlap


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


async def compare(service: EmbeddingService, asked: EmbedRequest, ref: str, other: str, top_k: int) -> Compatibility:
    """Embeds the texts of `asked`, which names no context, under `ref` and under `other`. `top_k`: nearest neighbours
    that are compared. Raises ContextNotFound, and as `embed`."""
    try:
        a = await service.embed(replace(asked, contexts={"ref": ref}))
    except UnknownContextNamed as error:  # it is in the path
        raise ContextNotFound(error.message, param="ref") from error
    try:
        b = await service.embed(replace(asked, contexts={"with": other}))
    except UnknownContextNamed as error:
        raise UnknownContextNamed(error.message, param="with") from error
    cosines = cosines_of(a.vectors, b.vectors)
    shared = await asyncio.to_thread(overlap, a.vectors, b.vectors, top_k)
    return Compatibility(
        model=asked.model,
        contexts=(Compared(a.context_id, a.context_name), Compared(b.context_id, b.context_name)),
        texts=len(cosines),
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        top_k=top_k,
        overlap=shared,
    )
