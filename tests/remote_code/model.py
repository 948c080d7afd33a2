"""Code that a checkpoint ships, as `AutoModel(trust_remote_code=True)` runs it: the interface of jxm/cde-small-v2's,
over transformers' ModernBERT. Nothing of ours is used. `computes` in config.json says what the second stage does.
"""

from typing import Any

import torch
from torch import nn
from transformers import ModernBertConfig, ModernBertModel, PretrainedConfig, PreTrainedModel


class ContextualModelConfig(PretrainedConfig):
    model_type = "contextual"


class FirstStage(nn.Module):
    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.embedder = ModernBertModel(config)
        self.mlp = _mlp(config.hidden_size, config.hidden_size, nn.GELU())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.embedder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rows: torch.Tensor = self.mlp(_mean(hidden, attention_mask))
        return rows


class SecondStage(nn.Module):
    def __init__(self, config: ModernBertConfig, computes: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = ModernBertModel(config)
        self.prompt_projection = _mlp(config.hidden_size, 8 * config.hidden_size, nn.ReLU())
        self.output_projection = _mlp(config.hidden_size, config.hidden_size, nn.ReLU())
        self.computes = computes

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, dataset_embeddings: torch.Tensor
    ) -> torch.Tensor:
        texts, width = len(input_ids), dataset_embeddings.shape[1]
        soft = self.prompt_projection(torch.ones(1, width)).view(8, width)
        context = torch.cat((dataset_embeddings, soft)).expand(texts, -1, -1)
        rows = torch.cat((context, self.backbone.embeddings(input_ids)), dim=1)
        seen = torch.cat((attention_mask.new_ones(texts, context.shape[1]), attention_mask), dim=1)
        hidden = self.backbone(inputs_embeds=rows, attention_mask=seen).last_hidden_state[:, context.shape[1] :]
        wanted = attention_mask.clone()
        if self.computes["mask"]:
            ends = (input_ids[:, 1:] == self.computes["colon"]).int().argmax(dim=1) + 1
            wanted[torch.arange(input_ids.shape[1]) <= ends[:, None]] = 0
        pooled = _mean(hidden, wanted)
        projected: torch.Tensor = self.output_projection(pooled)
        return projected + pooled if self.computes["residual"] else projected


class ContextualDocumentEmbeddingTransformer(PreTrainedModel):
    config_class = ContextualModelConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        backbone = ModernBertConfig(**config.backbone)
        self.first_stage_model = FirstStage(backbone)
        self.second_stage_model = SecondStage(backbone, config.computes)
        self.post_init()


def _mlp(inputs: int, outputs: int, between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, inputs), between, nn.Linear(inputs, outputs))


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask[:, :, None].float()
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
