"""A model whose vector betrays its input: (sum of ids, number of ids, context's mark, stage)."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from app.domain import Arrays, InputType, ModelSpec, Payload, Stage, TokenizedText
from app.models.base import DeviceContext

SPEC = ModelSpec(
    id="stub", family="stub", semantics="training", revision="r", tokenizer_revision="t", source="test",
    hidden_size=4, max_length=512, corpus_size=2, corpus_size_is_exact=True, context_rows=10,
    prompts=dict.fromkeys(InputType, ""), default_input_type=InputType.NONE, vocab_size=1000, dtype="float32",
    device="cpu", has_first_stage=True, is_cde=False,
)  # fmt: skip


class StubModel:
    """`before` runs on the device thread ahead of each batch and may raise or wait."""

    def __init__(self, before: Callable[[Sequence[TokenizedText]], None] = lambda _: None) -> None:
        self.spec = SPEC
        self.before = before
        self.batches: list[tuple[Stage, int]] = []
        self.threads: set[int] = set()

    def corpus_arrays(self, documents: Sequence[TokenizedText]) -> Arrays:
        return {}

    def context_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        return {"dataset_embeddings": (rows, 4)}

    def load_context(self, arrays: Arrays) -> DeviceContext:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def first_stage(self, documents: Sequence[TokenizedText], corpora: Sequence[DeviceContext]) -> Tensor:
        return self._run(Stage.FIRST, documents, [1.0] * len(documents))

    def second_stage(self, texts: Sequence[TokenizedText], contexts: Sequence[DeviceContext]) -> Tensor:
        return self._run(Stage.SECOND, texts, [float(c["dataset_embeddings"][0, 0]) for c in contexts])

    def _run(self, stage: Stage, texts: Sequence[TokenizedText], marks: Sequence[float]) -> Tensor:
        self.batches.append((stage, len(texts)))
        self.threads.add(threading.get_ident())
        assert torch.is_inference_mode_enabled()
        self.before(texts)
        rows = [
            [float(sum(t.input_ids)), float(len(t.input_ids)), mark, 1.0 if stage is Stage.FIRST else 2.0]
            for t, mark in zip(texts, marks, strict=True)
        ]
        return torch.tensor(rows)


def text(*ids: int) -> TokenizedText:
    return TokenizedText(ids, InputType.NONE)


def context(mark: float) -> Payload:
    return Payload(f"context {mark}", {"dataset_embeddings": np.full((2, 4), mark, np.float32)})
