"""How far a frozen context moves a model's vectors on the user's own texts, and what it saves."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from app.domain import Arrays, FloatArray, InputType
from app.models.loading import LoadOptions
from app.offline import Offline
from app.vectors import cosines_of, normalized, overlap

TOP = 10


@dataclass(frozen=True, slots=True)
class Agreement:
    """Cosine of each text's two vectors; overlap of its ten nearest other texts, 0 to 1, None of no more than ten
    others; texts a second of both."""

    texts: int
    min_cosine: float
    mean_cosine: float
    top10_overlap: float | None
    exact_texts_per_second: float
    frozen_texts_per_second: float


def measure(
    model: str, options: LoadOptions, context: Arrays, texts: Sequence[str], input_type: InputType
) -> Agreement:
    """Embeds `texts` under the context both ways, texts over the max length cut. Raises CheckpointError."""
    exact, exact_rate = _embedded(model, replace(options, context_attention="exact"), context, texts, input_type)
    frozen, frozen_rate = _embedded(model, replace(options, context_attention="frozen"), context, texts, input_type)
    cosines = cosines_of(exact, frozen)
    return Agreement(
        texts=len(texts),
        min_cosine=float(cosines.min()),
        mean_cosine=float(cosines.mean()),
        top10_overlap=overlap(exact, frozen, TOP),
        exact_texts_per_second=exact_rate,
        frozen_texts_per_second=frozen_rate,
    )


def _embedded(
    model: str, options: LoadOptions, context: Arrays, texts: Sequence[str], input_type: InputType
) -> tuple[FloatArray, float]:
    with Offline(model, options) as offline:
        payload = offline.context_from(context)
        list(offline.embed(texts[:1], payload, input_type, truncate=True))  # the context to the device, and warm
        started = time.perf_counter()
        vectors = np.concatenate(list(offline.embed(texts, payload, input_type, truncate=True)))
        return normalized(vectors), len(texts) / (time.perf_counter() - started)
