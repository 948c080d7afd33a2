"""What everyone would run without this server: transformers' NomicBert and ModernBert, one padded batch.

It computes what the authors' code computes in `hub` semantics (the second stage's rows enter as `inputs_embeds`), with
PyTorch's SDPA. For benchmarks alone: transformers is no dependency of the server.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.bench.models import Checkpoint
from app.domain import TokenizedText
from app.errors import ConfigError
from app.models.device import pad

NOMIC_NAMES = {
    "emb_ln": "embeddings.LayerNorm",
    "encoder.layers": "layers",
    "attn.out_proj": "self_attn.o_proj",
    "mlp.fc11": "mlp.up_proj",
    "mlp.fc12": "mlp.gate_proj",
    "mlp.fc2": "mlp.down_proj",
    "norm1": "post_attention_layernorm",
    "norm2": "post_mlp_layernorm",
}


class Reference:
    """Both stages over a checkpoint; on a CPU in float32 its tensors are used, not copied, but for v1's projections."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """`device` None: the CPU."""
        self._device, self._dtype = device or torch.device("cpu"), dtype
        self._tensors = {name: tensor.to(self._device, dtype) for name, tensor in checkpoint.tensors.items()}
        build = _nomic_bert if checkpoint.family == "v1" else _modern_bert
        self._is_v1 = checkpoint.family == "v1"
        self._first = build(self._under("first_stage_model.embedder."), checkpoint.backbone_config)
        self._second = build(self._under("second_stage_model.backbone."), checkpoint.backbone_config)

    @torch.inference_mode()
    def first_stage(self, documents: Sequence[TokenizedText]) -> Tensor:
        """(B, D) float32."""
        input_ids, mask = self._padded(documents)
        if self._is_v1:
            rows = self._first.embeddings.word_embeddings(input_ids)  # inputs_embeds get the token type and the norm
            hidden = self._first(inputs_embeds=rows, attention_mask=mask).last_hidden_state
        else:
            hidden = self._first(input_ids=input_ids, attention_mask=mask).last_hidden_state
        pooled = _mean(hidden, mask)
        return self._head("first_stage_model.mlp", pooled, F.gelu)

    @torch.inference_mode()
    def second_stage(self, texts: Sequence[TokenizedText], dataset: Tensor) -> Tensor:
        """(B, D) float32 under one context, dataset (C, D)."""
        input_ids, mask = self._padded(texts)
        dataset = dataset.to(self._device, self._dtype)
        rows = self._text_rows(input_ids)
        soft = self._head("second_stage_model.prompt_projection", torch.ones_like(dataset[:1]), F.relu)
        context = torch.cat((dataset, soft.view(-1, dataset.shape[1])))
        rows = torch.cat((context.expand(len(texts), -1, -1), rows), dim=1)
        seen = torch.cat((mask.new_ones(len(texts), len(context)), mask), dim=1)
        hidden = self._second(inputs_embeds=rows, attention_mask=seen).last_hidden_state
        return self._head("second_stage_model.output_projection", _mean(hidden[:, len(context) :], mask), F.relu)

    def _padded(self, texts: Sequence[TokenizedText]) -> tuple[Tensor, Tensor]:
        """Ids and mask, (B, S) int64."""
        input_ids, mask = pad(texts, self._device)
        return input_ids, mask.long()

    def _text_rows(self, input_ids: Tensor) -> Tensor:
        embeddings = self._second.embeddings
        words: Tensor = embeddings.word_embeddings(input_ids) if self._is_v1 else embeddings(input_ids)
        return words + embeddings.token_type_embeddings.weight[0] if self._is_v1 else words

    def _head(self, name: str, x: Tensor, activation: Any) -> Tensor:
        t = self._tensors
        return F.linear(
            activation(F.linear(x, t[f"{name}.0.weight"], t[f"{name}.0.bias"])),
            t[f"{name}.2.weight"],
            t[f"{name}.2.bias"],
        )

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self._tensors.items() if name.startswith(prefix)}


def _nomic_bert(tensors: Mapping[str, Tensor], config: Mapping[str, int]) -> Any:
    transformers = _transformers()
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        renamed = name
        for ours, theirs in NOMIC_NAMES.items():
            renamed = renamed.replace(ours, theirs)
        if renamed.endswith("attn.Wqkv.weight"):
            start = renamed.removesuffix("attn.Wqkv.weight")
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{start}self_attn.{letter}_proj.weight"] = part
        else:
            state[renamed] = tensor
    layers = {"num_hidden_layers": config["n_layer"]} if config else {}
    return _filled(transformers.NomicBertModel, transformers.NomicBertConfig(**layers), state)


def _modern_bert(tensors: Mapping[str, Tensor], config: Mapping[str, int]) -> Any:
    transformers = _transformers()
    return _filled(transformers.ModernBertModel, transformers.ModernBertConfig(**config), tensors)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            "The variant reference needs transformers: pip install -e '.[bench]' in a checkout"
        ) from error


def _filled(kind: Callable[[Any], nn.Module], config: Any, state: Mapping[str, Tensor]) -> nn.Module:
    with importlib.import_module("transformers.initialization").no_init_weights():  # replaced at once
        model = kind(config)
    model.load_state_dict(dict(state), assign=True)
    # Buffers, as of rotations, are in no checkpoint.
    return model.to(next(iter(state.values())).device).eval()


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
