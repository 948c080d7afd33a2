"""How far a frozen context moves a model's vectors on the user's own texts, and what it saves."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from app.domain import Arrays, FloatArray, InputType
from app.models.loading import LoadOptions
from app.offline import Offline
from app.vectors import normalized

TOP = 10


@dataclass(frozen=True, slots=True)
class Agreement:
    """Cosine of each text's two vectors; overlap of its ten nearest other texts, 0 to 1; texts a second of both."""

    texts: int
    min_cosine: float
    mean_cosine: float
    top10_overlap: float
    exact_texts_per_second: float
    frozen_texts_per_second: float


def measure(
    model: str, options: LoadOptions, context: Arrays, texts: Sequence[str], input_type: InputType
) -> Agreement:
    """Embeds `texts` under the context both ways, texts over the max length cut. Raises CheckpointError."""
    exact, exact_rate = _embedded(model, replace(options, context_attention="exact"), context, texts, input_type)
    frozen, frozen_rate = _embedded(model, replace(options, context_attention="frozen"), context, texts, input_type)
    cosines = (exact.astype(np.float64) * frozen).sum(axis=1)
    return Agreement(
        texts=len(texts),
        min_cosine=float(cosines.min()),
        mean_cosine=float(cosines.mean()),
        top10_overlap=overlap(exact, frozen),
        exact_texts_per_second=exact_rate,
        frozen_texts_per_second=frozen_rate,
    )


def overlap(a: FloatArray, b: FloatArray) -> float:
    """Mean share of the nearest neighbours, itself left out, that a text has in both of a, b (n, D), unit rows."""
    top = min(TOP, len(a) - 1)
    if top < 1:
        return 1.0
    return float(
        np.mean([len(mine & yours) / top for mine, yours in zip(_nearest(a, top), _nearest(b, top), strict=True)])
    )


def _nearest(vectors: FloatArray, top: int) -> list[set[int]]:
    found = []
    for i, row in enumerate(vectors):
        scores = vectors @ row
        scores[i] = -np.inf
        found.append(set(np.argpartition(-scores, top - 1)[:top].tolist()))
    return found


def _embedded(
    model: str, options: LoadOptions, context: Arrays, texts: Sequence[str], input_type: InputType
) -> tuple[FloatArray, float]:
    with Offline(model, options) as offline:
        payload = offline.context_from(context)
        list(offline.embed(texts[:1], payload, input_type, truncate=True))  # the context to the device, and warm
        started = time.perf_counter()
        vectors = np.concatenate(list(offline.embed(texts, payload, input_type, truncate=True)))
        return normalized(vectors), len(texts) / (time.perf_counter() - started)
