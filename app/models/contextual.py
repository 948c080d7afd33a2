"""The two stages of CDE on top of a backbone (arXiv 2410.02525).

Source: jxmorris12/cde, cde/model.py; the Hub's own model.py for the `hub` semantics. Parameter names are the
checkpoint's. Dataset embeddings are the raw output of the first stage, never normalised.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.domain import DATASET_EMBEDDINGS, Arrays, ModelSpec, TokenizedText
from app.models.attention import Entered
from app.models.base import DeviceContext, InvalidContext
from app.models.device import to_device
from app.models.graphs import LONGEST, Batch, RecordedForwards
from app.models.kernels import Kernels
from app.models.layout import Layout, fill, means, packed
from app.models.recording import Record
from app.models.stages import CdeWeights, detach_from_file
from app.models.transformer import interleaved

MAX_ROWS = {"cpu": 1100, "cuda": 16_384}
"""Rows of one forward: enough to fill the matrix products, and on a CPU no more, so that they stay in its caches."""


@dataclass(frozen=True, slots=True)
class Semantics:
    """Where code around the same weights differs: what they were trained with, or what the Hub's remote code does."""

    unrotated_context: bool = False
    """v1 training: no rotary embedding on the context rows."""
    context_token_type: bool = False
    """v1 hub: token type 0 is added to every row of the second stage, once more to the text's."""
    output_residual: bool = False
    """v2 training: output_projection(pooled) + pooled."""
    mask_instruction: bool = False
    """v2 training: tokens up to the prompt's colon are left out of the mean."""


class ContextualModel:
    """A loaded CDE model: the two stages as the engine runs them. Implements models.base.TwoStageModel.

    Nothing changes after it is made: several threads may run stages at once.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: CdeWeights,
        semantics: Semantics,
        instruction_end_id: int | None,
        kernels: Kernels,
        *,
        frozen: bool = False,
    ) -> None:
        """`weights` as loaded; their backbones are packed here. `instruction_end_id`: the id of ":", where the prompt
        ends; needed for `mask_instruction` alone. `frozen`: context rows do not see the text, so that their keys and
        values are computed once a context. That is an approximation: the weights were fitted to rows that do."""
        self.spec = spec
        self.kernels = kernels
        self._weights = weights.eval().requires_grad_(requires_grad=False)
        self._semantics = semantics
        self._frozen = frozen
        self._instruction_end_id = instruction_end_id
        self._device = torch.device(spec.device)
        self._max_rows = MAX_ROWS[self._device.type]
        self._recorded: RecordedForwards | None = None
        second = weights.second_stage_model
        self._backbone = second.backbone
        with torch.inference_mode():
            self._soft_prompt = second.soft_prompt()
            del second.prompt_projection  # constant from here on
            detach_from_file(weights)
            self._backbone.prepare(kernels)
            if spec.has_first_stage:
                weights.first_stage_model.embedder.prepare(kernels)

    def record_forwards(self, record: Record) -> None:
        """Has the second stage of few texts recorded and replayed; where attention looks at nothing but tensors."""
        if self._frozen or self.kernels.attention != "varlen":
            return
        recorded = RecordedForwards(self._recorded_forward, record, self._prefix)
        shape = self.context_shapes(self.spec.corpus_size)[DATASET_EMBEDDINGS]
        noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        recorded.warm_up(self.load_context({DATASET_EMBEDDINGS: noise}), self.spec.max_length)
        self._recorded = recorded

    def corpus_arrays(self, documents: Sequence[TokenizedText]) -> Arrays:  # noqa: ARG002 - the protocol's
        return {}

    def context_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        return {DATASET_EMBEDDINGS: (rows, self.spec.hidden_size)}

    def load_context(self, arrays: Arrays) -> DeviceContext:
        """The context rows as they enter the first layer, which no text can change (`Entered` without its class); all
        layers' keys and values where they are frozen.

        More rows than corpus_size: the first ones, in order, as in the reference. Fewer: InvalidContext.
        """
        if DATASET_EMBEDDINGS not in arrays:
            return {}
        given = arrays[DATASET_EMBEDDINGS][: self.spec.corpus_size]
        if given.shape != (self.spec.corpus_size, self.spec.hidden_size):
            wanted = (self.spec.corpus_size, self.spec.hidden_size)
            raise InvalidContext(f"{DATASET_EMBEDDINGS} has shape {given.shape}; {self.spec.id} takes {wanted}")
        dataset = to_device(torch.from_numpy(np.ascontiguousarray(given)), self._device)
        with torch.inference_mode():
            rows = self._typed(torch.cat((dataset, self._soft_prompt)))
            if self._frozen:
                return self._backbone.frozen(rows, self._rotary_start)
            entered = self._backbone.enter(rows, Layout.of([len(rows)], self._device), self._rotary_start)
        # As views, they would keep all that was projected together.
        return {name: tensor.contiguous() for name, tensor in entered._asdict().items()}

    def first_stage(self, documents: Sequence[TokenizedText], corpora: Sequence[DeviceContext]) -> Tensor:  # noqa: ARG002
        stage = self._weights.first_stage_model
        out = torch.empty(len(documents), self.spec.hidden_size, device=self._device)
        for chunk in self._chunks(documents, 0):
            some, places = [documents[i] for i in chunk], to_device(torch.tensor(chunk), self._device)
            layout = self._layout(some, 0)
            entered = stage.embedder.enter(stage.embedder.token_rows(self._input_ids(some, layout)), layout)
            hidden = stage.embedder(entered, layout)
            out[places] = stage.mlp(means(hidden, layout.texts, [0] * len(some)))
        return out

    def second_stage(self, texts: Sequence[TokenizedText], contexts: Sequence[DeviceContext]) -> Tensor:
        skipped = [self._instruction_end(text.input_ids) for text in texts]
        replayed = self._recorded(texts, skipped, contexts) if self._recorded else None
        if replayed is not None:
            return replayed
        out = torch.empty(len(texts), self.spec.hidden_size, device=self._device)
        for chunk in self._chunks(texts, self._prefix):
            some, places = [texts[i] for i in chunk], to_device(torch.tensor(chunk), self._device)
            layout = self._layout(some, self._prefix)
            hidden = self._hidden([contexts[i] for i in chunk], some, layout)
            out[places] = self._projected(means(hidden, layout.texts, [skipped[i] for i in chunk]))
        return out

    def _chunks(self, texts: Sequence[TokenizedText], prefix: int) -> Iterator[list[int]]:
        """Which texts make a forward."""
        lengths = [prefix + len(text.input_ids) for text in texts]
        return packed([n + fill(n, self.kernels.row_multiple) for n in lengths], self._max_rows)

    def _layout(self, texts: Sequence[TokenizedText], prefix: int) -> Layout:
        lengths = [len(text.input_ids) for text in texts]
        return Layout.of(lengths, self._device, prefix, self.kernels.row_multiple)

    @property
    def _prefix(self) -> int:
        """Rows of a context."""
        return self.spec.corpus_size + len(self._soft_prompt)

    @property
    def _rotary_start(self) -> int:
        return self.spec.corpus_size if self._semantics.unrotated_context else 0

    def _typed(self, rows: Tensor) -> Tensor:
        """v1, hub: the token type on every row that enters the second stage."""
        if not self._semantics.context_token_type:
            return rows
        return rows + self._backbone.token_type

    def _input_ids(self, texts: Sequence[TokenizedText], layout: Layout) -> Tensor:
        """(T',) of the wanted rows, one text behind the other."""
        ids = torch.zeros(layout.wanted, dtype=torch.int64)
        for text, (start, stop) in zip(texts, layout.texts, strict=True):
            ids[start:stop] = torch.tensor(text.input_ids)
        return to_device(ids, self._device)

    def _recorded_forward(self, batch: Batch, contexts: Entered) -> Tensor:
        """(N, D): the second stage as tensors alone; every length is in their contents."""
        layout = Layout(
            segments=(),
            positions=batch.positions,
            wanted_rows=batch.wanted_rows,
            longest=self._prefix + max(self.spec.max_length, LONGEST),
            bounds=batch.bounds,
            wanted_bounds=batch.wanted_bounds,
        )
        rows = self._typed(self._backbone.text_rows(batch.input_ids))
        texts = self._backbone.enter(rows, layout.of_wanted(), self._rotary_start)
        whole = [torch.cat(pair)[batch.order] for pair in zip(contexts, texts, strict=True)]
        return self._projected(batch.shares @ self._backbone(Entered(*whole), layout, self._rotary_start))

    def _projected(self, pooled: Tensor) -> Tensor:
        projected: Tensor = self._weights.second_stage_model.output_projection(pooled)
        return projected + pooled if self._semantics.output_residual else projected

    def _hidden(self, contexts: Sequence[DeviceContext], texts: Sequence[TokenizedText], layout: Layout) -> Tensor:
        """Last hidden states of the texts' rows, each text's behind its context's."""
        rows = self._typed(self._backbone.text_rows(self._input_ids(texts, layout)))
        if self._frozen:
            return self._backbone.behind(rows, layout, contexts, self._rotary_start)
        entered = self._backbone.enter(rows, layout.of_wanted(), self._rotary_start)._asdict()
        whole = {
            name: interleaved([context[name] for context in contexts], torch.split(tensor, layout.wanted_lengths))
            for name, tensor in entered.items()
        }
        return self._backbone(Entered(**whole), layout, self._rotary_start)

    def _instruction_end(self, input_ids: Sequence[int]) -> int:
        """How many tokens in front are left out of the mean: all up to the first ":" behind position 0, or none
        (cde/model.py:455-476)."""
        if not self._semantics.mask_instruction or self._instruction_end_id not in input_ids[1:]:
            return 0
        return input_ids.index(self._instruction_end_id, 1) + 1
