"""ModernBERT, the backbone of jxm/cde-small-v2: pre-norm, GeGLU, every third layer global, the others sliding.

Sources: transformers 4.48.3 and 5.x models/modernbert/modeling_modernbert.py (window inclusive on both sides,
activated half first); arXiv 2412.13663. Parameter names are the checkpoint's.
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

GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""What transformers calls kinds of layers."""


@dataclass(frozen=True, slots=True)
class ModernBertConfig:
    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    norm_eps: float = 1e-5
    global_attn_every_n_layers: int = 3
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    local_attention: int = 128

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModernBertConfig":
        """From a `config.json` in answerdotai/ModernBERT-base's layout. Raises ValueError for what is not built."""
        required = {"hidden_activation": "gelu", "attention_bias": False, "mlp_bias": False, "norm_bias": False}
        wrong = {k: raw[k] for k, v in required.items() if k in raw and raw[k] != v}
        if wrong:
            raise ValueError(f"ModernBERT with {wrong} is not supported")
        raw = {**raw, **_thetas(raw.get("rope_parameters"))}
        config = cls(**{k: raw[k] for k in cls.__dataclass_fields__ if raw.get(k) is not None})
        layers = [
            GLOBAL if i % config.global_attn_every_n_layers == 0 else LOCAL for i in range(config.num_hidden_layers)
        ]
        if raw.get("layer_types", layers) not in (None, layers):
            raise ValueError(
                "ModernBERT whose layer_types are not every n-th global, from the first on, is not supported"
            )
        if config.num_hidden_layers < 2:
            raise ValueError("ModernBERT with fewer than two layers is not supported")
        if config.num_attention_heads < 1 or config.hidden_size % (2 * config.num_attention_heads):
            raise ValueError("ModernBERT: hidden_size does not split into num_attention_heads heads of even size")
        return config


def _thetas(rope: Mapping[str, Any] | None) -> dict[str, float]:
    """As transformers 5 writes them. Raises ValueError."""
    if rope is None:
        return {}
    if set(rope) != {GLOBAL, LOCAL} or any(rope[kind].get("rope_type") != "default" for kind in rope):
        raise ValueError(f"ModernBERT with rope_parameters {rope} is not supported")
    return {"global_rope_theta": rope[GLOBAL]["rope_theta"], "local_rope_theta": rope[LOCAL]["rope_theta"]}


class SelfAttention(Attention):
    def __init__(self, config: ModernBertConfig, *, is_global: bool) -> None:
        base = config.global_rope_theta if is_global else config.local_rope_theta
        window = None if is_global else config.local_attention // 2
        super().__init__(config.hidden_size, config.num_attention_heads, base, window)
        self.Wo = Dense(config.hidden_size, config.hidden_size)


class GeGLU(nn.Module):
    """Wo(gelu(u) * g) with (u, g) the halves of Wi(x), in this order."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.Wi = Dense(config.hidden_size, 2 * config.intermediate_size)
        self.Wo = Dense(config.intermediate_size, config.hidden_size)

    def prepare(self, kernels: Kernels) -> None:
        """Wi in its halves, so that the activation is fused into one product and the gate into the other."""
        activated, gate = self.Wi.take().chunk(2)
        self.activated, self.gate = Dense.of(activated, kernels), Dense.of(gate, kernels)
        self.Wo.prepare(kernels)

    def forward(self, x: Tensor, rows: Tensor) -> Sum:
        """x: the residual stream; rows: normed."""
        return onto(x, self.Wo, gated(self.activated, self.gate, rows, "gelu"))


class ModernBlock(Block):
    attn: SelfAttention

    def __init__(self, config: ModernBertConfig, index: int) -> None:
        super().__init__()
        # The first block attends to its input as it is: the embedding was normed just before.
        self.attn_norm = _norm(config) if index else nn.Identity()
        self.attn = SelfAttention(config, is_global=index % config.global_attn_every_n_layers == 0)
        self.mlp_norm = _norm(config)
        self.mlp = GeGLU(config)

    def prepare(self, kernels: Kernels, *, last: bool) -> None:
        self.attn.prepare(kernels, split=last)
        self.attn.Wo.prepare(kernels.behind_attention)
        self.mlp.prepare(kernels)

    def forward(self, x: Tensor, projected: Projected, layout: Layout) -> Sum:
        x, rows = self.mlp_norm.pre(onto(x, self.attn.Wo, self.attn(projected, layout)))
        return self.mlp(x, rows)


class Embeddings(nn.Module):
    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.tok_embeddings = unset_embedding(config.vocab_size, config.hidden_size)
        self.norm = _norm(config)


class ModernBert(Transformer):
    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(ModernBlock(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = _norm(config)

    @property
    def blocks(self) -> Sequence[ModernBlock]:
        return list(self.layers)  # type: ignore[arg-type]

    def token_rows(self, input_ids: Tensor) -> Tensor:
        """The token embeddings."""
        return self.embeddings.tok_embeddings(input_ids).float()

    def text_rows(self, input_ids: Tensor) -> Tensor:
        """Normed once here, and again on the way in.

        The reference embeds the text and passes `inputs_embeds` to a backbone that norms them (cde/model.py).
        """
        return self.embeddings.norm(self.token_rows(input_ids))

    def input_norm(self, rows: Tensor) -> Tensor:
        return self.embeddings.norm(rows)

    def after(self, index: int, s: Sum) -> Normed:
        if index + 1 < len(self.blocks):
            return self.blocks[index + 1].attn_norm.pre(s)  # type: ignore[operator]
        return self.final_norm.post(s)


def _norm(config: ModernBertConfig) -> Norm:
    return Norm(config.hidden_size, eps=config.norm_eps, bias=False)
