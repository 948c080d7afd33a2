"""`builtin/minilm-context`: all-MiniLM-L6-v2 with a training-free contextualisation. Not a CDE model.

A stand-in that runs the whole product on a machine without the Hub. Stage one counts how common each word piece is in
the corpus and embeds up to 512 documents; stage two weights a text's pieces by rarity and pulls documents towards
their neighbours. With an empty context every weight is 1 and nothing is pulled: stock all-MiniLM-L6-v2.

    w(t) = 0.3 + 0.7 ln((n+1) / (df(t)+0.5)) / ln((n+1) / 0.5)
    z    = unit(sum_j w(t_j) h_j)
    document: unit(z + 0.25 sum_i a_i X_i),  a = softmax_i(z.X_i / 0.08), leaving out z.X_i > 0.999 (itself)

BERT as in transformers models/bert/modeling_bert.py; parameter names are the checkpoint's.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.domain import DATASET_EMBEDDINGS, Arrays, InputType, ModelSpec, TokenizedText
from app.models.base import DeviceContext, InvalidContext
from app.models.checkpoint import unset_embedding
from app.models.device import pad, to_device

TOKEN_WEIGHTS = "token_weights"  # noqa: S105 - not a password
FLOOR, TEMPERATURE, PULL, SAME_TEXT = 0.3, 0.08, 0.25, 0.999
GELU_ROWS = 64

HIDDEN_SIZE, LAYERS, HEADS, INNER, VOCABULARY, POSITIONS = 384, 6, 12, 1536, 30522, 512


class MiniLM(nn.Module):
    """The encoder of sentence-transformers/all-MiniLM-L6-v2, with its parameter names and without its pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states (B, S, D)."""
        x = self.embeddings(input_ids)
        for layer in self.encoder.layer:  # type: ignore[union-attr]
            x = layer(x, mask[:, None, None, :])
        return x


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = unset_embedding(VOCABULARY, HIDDEN_SIZE)
        self.position_embeddings = unset_embedding(POSITIONS, HIDDEN_SIZE)
        self.token_type_embeddings = unset_embedding(2, HIDDEN_SIZE)
        self.LayerNorm = nn.LayerNorm(HIDDEN_SIZE, eps=1e-12)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        return self.LayerNorm(self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0])


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        self.key = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        self.value = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            project(x).view(batch, length, HEADS, width // HEADS).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return mixed.transpose(1, 2).reshape(batch, length, width)


class Output(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, HIDDEN_SIZE)
        self.LayerNorm = nn.LayerNorm(HIDDEN_SIZE, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = SelfAttention()
        self.attention.output = Output(HIDDEN_SIZE)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(HIDDEN_SIZE, INNER)
        self.output = Output(INNER)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention.output(self.attention.self(x, mask), x)  # type: ignore[operator]
        inner = self.intermediate.dense(x)  # type: ignore[operator]
        # By blocks, which stay in the cache, and are of few shapes: oneDNN keeps what it compiled for each.
        for rows in inner.view(-1, INNER).split(GELU_ROWS if inner.device.type == "cpu" else inner.numel()):
            rows.copy_(F.gelu(rows))
        return self.output(inner, x)


class MiniLMContext:
    """The embedded default as a two-stage model. Implements models.base.TwoStageModel."""

    def __init__(self, spec: ModelSpec, weights: MiniLM) -> None:
        self.spec = spec
        self._encoder = weights.eval()
        self._device = torch.device(spec.device)

    def corpus_arrays(self, documents: Sequence[TokenizedText]) -> Arrays:
        """Token weights (V,) from the document frequency of each word piece."""
        frequency = np.zeros(VOCABULARY, dtype=np.float64)
        for token, count in Counter(t for d in documents for t in set(d.input_ids)).items():
            frequency[token] = count
        n = len(documents)
        idf = np.log((n + 1) / (frequency + 0.5)) / np.log((n + 1) / 0.5)
        return {TOKEN_WEIGHTS: (FLOOR + (1 - FLOOR) * idf).astype(np.float32)}

    def context_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        return {TOKEN_WEIGHTS: (VOCABULARY,), DATASET_EMBEDDINGS: (rows, HIDDEN_SIZE)}

    def load_context(self, arrays: Arrays) -> DeviceContext:
        if TOKEN_WEIGHTS not in arrays or arrays[TOKEN_WEIGHTS].shape != (VOCABULARY,):
            raise InvalidContext(f"a context of {self.spec.id} holds {TOKEN_WEIGHTS} of shape ({VOCABULARY},)")
        return {name: to_device(torch.from_numpy(np.ascontiguousarray(a)), self._device) for name, a in arrays.items()}

    def first_stage(self, documents: Sequence[TokenizedText], corpora: Sequence[DeviceContext]) -> Tensor:
        return self._weighted(documents, corpora)

    def second_stage(self, texts: Sequence[TokenizedText], contexts: Sequence[DeviceContext]) -> Tensor:
        z = self._weighted(texts, contexts)
        for i, (text, context) in enumerate(zip(texts, contexts, strict=True)):
            rows = context[DATASET_EMBEDDINGS]
            if text.input_type is InputType.DOCUMENT and len(rows):
                z[i] = self._pulled(z[i], rows)
        return z

    def _weighted(self, texts: Sequence[TokenizedText], contexts: Sequence[DeviceContext]) -> Tensor:
        """unit(sum_j w(t_j) h_j), (B, D) float32."""
        input_ids, mask = pad(texts, self._device)
        hidden = self._encoder(input_ids, mask).float()
        weights = torch.stack([c[TOKEN_WEIGHTS][ids] for c, ids in zip(contexts, input_ids, strict=True)]) * mask
        return F.normalize(torch.einsum("bsd,bs->bd", hidden, weights), dim=1)

    @staticmethod
    def _pulled(z: Tensor, rows: Tensor) -> Tensor:
        """z (D,) towards its neighbours among rows (n, D), itself left out; z where nothing else is left. The device
        decides which: a question would have to wait for it."""
        similarity = rows @ z
        others = similarity <= SAME_TEXT
        attention = torch.softmax((similarity / TEMPERATURE).masked_fill(~others, -torch.inf), dim=0)
        return torch.where(others.any(), F.normalize(z + PULL * (attention @ rows), dim=0), z)
