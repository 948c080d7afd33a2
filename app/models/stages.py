"""A CDE checkpoint as modules: two backbones and the heads around them. Parameter names are the checkpoint's.

Source: jxmorris12/cde, cde/model.py.
"""

import torch
from torch import Tensor, nn

from app.models.transformer import Transformer


class FirstStage(nn.Module):
    """mean over all tokens -> Linear -> GELU (exact) -> Linear."""

    def __init__(self, embedder: Transformer) -> None:
        super().__init__()
        hidden_size = embedder.config.hidden_size
        self.embedder = embedder
        self.mlp = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))


class SecondStage(nn.Module):
    """Heads around the second backbone: soft prompt tokens behind the context rows, and the output projection."""

    def __init__(self, backbone: Transformer, soft_tokens: int) -> None:
        super().__init__()
        hidden_size = backbone.config.hidden_size
        self.backbone = backbone
        self.prompt_projection = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, soft_tokens * hidden_size)
        )
        self.output_projection = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size)
        )

    def soft_prompt(self) -> Tensor:
        """(soft_tokens, D): the projection of ones, the same for every text."""
        projection = self.prompt_projection.float()
        weight = next(projection.parameters())
        return projection(torch.ones_like(weight[0])).view(-1, weight.shape[1])


class CdeWeights(nn.Module):
    """The checkpoint as modules; without the first stage its contexts can only be imported."""

    def __init__(self, first_stage: FirstStage | None, second_stage: SecondStage) -> None:
        super().__init__()
        if first_stage is not None:
            self.first_stage_model = first_stage
        self.second_stage_model = second_stage


def detach_from_file(weights: nn.Module) -> None:
    """Copies what is small: norms and heads, as float32. Each layer's matrices then are all that keeps its part of
    the file mapped; embedding tables stay there, and of them only the pages that are read are ever in memory."""
    for module in weights.modules():
        if isinstance(module, nn.LayerNorm | nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float32, copy=True)
