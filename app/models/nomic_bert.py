"""NomicBERT, the backbone of jxm/cde-small-v1: post-norm BERT with rotary positions and SwiGLU.

Sources: nomic-ai/contrastors modeling_hf_nomic_bert.py (blocks, Wqkv order, gate, n_inner);
jxmorris12/cde cde/lib/nomic_bert (rotary start). Parameter names are the checkpoint's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from app.models.attention import Attention, Projected
from app.models.checkpoint import unset_embedding
from app.models.kernels import Dense, Kernels
from app.models.layout import Layout
from app.models.pointwise import Norm, Normed, Sum, gated, onto
from app.models.transformer import Block, Transformer


@dataclass(frozen=True, slots=True)
class NomicBertConfig:
    vocab_size: int = 30528
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 3072
    type_vocab_size: int = 2
    layer_norm_epsilon: float = 1e-12
    rotary_emb_base: float = 1000.0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "NomicBertConfig":
        """From a `config.json` of nomic-ai/nomic-bert-2048's layout. Raises ValueError for what is not built here."""
        required = {
            "activation_function": "swiglu",
            "prenorm": False,
            "use_rms_norm": False,
            "parallel_block": False,
            "rotary_emb_fraction": 1.0,
            "rotary_emb_interleaved": False,
            "rotary_scaling_factor": None,
            "rotary_emb_scale_base": None,
            "qkv_proj_bias": False,
            "mlp_fc1_bias": False,
            "mlp_fc2_bias": False,
            "causal": False,
            # As transformers' own class of that name would write it, which is not this layout.
            "rope_parameters": None,
        }
        wrong = {k: raw[k] for k, v in required.items() if k in raw and raw[k] != v}
        if wrong:
            raise ValueError(f"NomicBERT with {wrong} is not supported")
        config = cls(**{k: raw[k] for k in cls.__dataclass_fields__ if raw.get(k) is not None})
        if config.n_layer < 2:
            raise ValueError("NomicBERT with fewer than two layers is not supported")
        if config.n_head < 1 or config.n_embd % (2 * config.n_head):
            raise ValueError("NomicBERT: n_embd does not split into n_head heads of even size")
        return config

    @property
    def hidden_size(self) -> int:
        return self.n_embd


class SelfAttention(Attention):
    def __init__(self, config: NomicBertConfig) -> None:
        super().__init__(config.n_embd, config.n_head, config.rotary_emb_base)
        self.out_proj = Dense(config.n_embd, config.n_embd)


class SwiGLU(nn.Module):
    """x + fc2(fc11(x) * silu(fc12(x))); the inner size is rounded up to a multiple of 256 as the reference does."""

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        inner = (inner + 255) // 256 * 256
        self.fc11 = Dense(hidden_size, inner)
        self.fc12 = Dense(hidden_size, inner)
        self.fc2 = Dense(inner, hidden_size)

    def forward(self, x: Tensor, rows: Tensor) -> Sum:
        """rows: x in what the products take."""
        return onto(x, self.fc2, gated(self.fc12, self.fc11, rows, "silu"))


class NomicBlock(Block):
    attn: SelfAttention

    def __init__(self, config: NomicBertConfig) -> None:
        super().__init__()
        self.attn = SelfAttention(config)
        self.mlp = SwiGLU(config.n_embd, config.n_inner)
        self.norm1 = Norm(config.n_embd, eps=config.layer_norm_epsilon)
        self.norm2 = Norm(config.n_embd, eps=config.layer_norm_epsilon)

    def prepare(self, kernels: Kernels, *, last: bool) -> None:
        self.attn.prepare(kernels, split=last)
        self.attn.out_proj.prepare(kernels.behind_attention)
        for dense in (self.mlp.fc11, self.mlp.fc12, self.mlp.fc2):
            dense.prepare(kernels)

    def forward(self, x: Tensor, projected: Projected, layout: Layout) -> Sum:
        x, rows = self.norm1.post(onto(x, self.attn.out_proj, self.attn(projected, layout)))
        return self.mlp(x, rows)


class Embeddings(nn.Module):
    def __init__(self, config: NomicBertConfig) -> None:
        super().__init__()
        self.word_embeddings = unset_embedding(config.vocab_size, config.n_embd)
        self.token_type_embeddings = unset_embedding(config.type_vocab_size, config.n_embd)


class Encoder(nn.Module):
    def __init__(self, config: NomicBertConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(NomicBlock(config) for _ in range(config.n_layer))


class NomicBert(Transformer):
    def __init__(self, config: NomicBertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.emb_ln = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.encoder = Encoder(config)

    @property
    def blocks(self) -> Sequence[NomicBlock]:
        return list(self.encoder.layers)  # type: ignore[arg-type]

    @property
    def token_type(self) -> Tensor:
        """The embedding of token type 0, (D,): every token has it."""
        return self.embeddings.token_type_embeddings.weight[0].float()

    def token_rows(self, input_ids: Tensor) -> Tensor:
        """word + type."""
        return self.embeddings.word_embeddings(input_ids).float() + self.token_type

    def text_rows(self, input_ids: Tensor) -> Tensor:
        """The same in both stages."""
        return self.token_rows(input_ids)

    def input_norm(self, rows: Tensor) -> Tensor:
        return self.emb_ln(rows)

    def after(self, index: int, s: Sum) -> Normed:
        return self.blocks[index].norm2.post(s)
