"""The one interface all models have: a first stage that reads a corpus, a second stage that embeds texts in its light.

Shapes, here and in the rest of `app/models`:
    B  texts in a batch            S  tokens of a text, special ones included (padded: of the longest)
    C  context slots (corpus_size) D  hidden_size           H  attention heads        V  vocabulary
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from app.domain import DATASET_EMBEDDINGS, Arrays, ModelSpec, TokenizedText

DeviceContext = dict[str, Tensor]
"""A context's arrays on the device, ready for the forward."""


class InvalidContext(ValueError):
    """Arrays that are no context of this model."""


class TwoStageModel(Protocol):
    """A loaded model. The engine calls its stages and `load_context` from several threads, in torch.inference_mode."""

    @property
    def spec(self) -> ModelSpec: ...

    def corpus_arrays(self, documents: Sequence[TokenizedText]) -> Arrays:
        """What the first stage has to know of the whole minicorpus before it embeds one document; no forward."""

    def context_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a context's arrays with `rows` dataset embeddings."""

    def load_context(self, arrays: Arrays) -> DeviceContext:
        """Arrays to the device. Raises InvalidContext."""

    def first_stage(self, documents: Sequence[TokenizedText], corpora: Sequence[DeviceContext]) -> Tensor:
        """Dataset embeddings of B documents, (B, D) float32, each with its `corpus_arrays`, loaded."""

    def second_stage(self, texts: Sequence[TokenizedText], contexts: Sequence[DeviceContext]) -> Tensor:
        """Embeddings of B texts, each under its own context, (B, D) float32, not normalised."""


def check_arrays(model: TwoStageModel, arrays: Arrays) -> None:
    """Raises InvalidContext unless `arrays` are finite and have the names and shapes of a whole context of `model`."""
    embeddings = arrays.get(DATASET_EMBEDDINGS)
    if embeddings is None:
        raise InvalidContext(f"there is no array named {DATASET_EMBEDDINGS!r}, only {sorted(arrays)}")
    if embeddings.ndim != 2:
        raise InvalidContext(f"{DATASET_EMBEDDINGS} has {embeddings.ndim} dimensions, not 2")
    rows, spec = len(embeddings), model.spec
    if rows > spec.corpus_size or (spec.corpus_size_is_exact and rows != spec.corpus_size):
        wanted = f"exactly {spec.corpus_size}" if spec.corpus_size_is_exact else f"at most {spec.corpus_size}"
        raise InvalidContext(f"{DATASET_EMBEDDINGS} has {rows} rows; {spec.id} takes {wanted}")
    shapes = model.context_shapes(rows)
    if set(arrays) != set(shapes):
        raise InvalidContext(f"the arrays are {sorted(arrays)}; {spec.id} takes {sorted(shapes)}")
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise InvalidContext(f"{name} has shape {list(arrays[name].shape)}; {spec.id} takes {list(shape)}")
        if not np.isfinite(arrays[name]).all():
            raise InvalidContext(f"{name} holds NaN or infinite values")
