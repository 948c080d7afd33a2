"""What both backbones are: blocks over packed rows, entered in a way that lets a context's rows be computed once."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from app.models.attention import Attention, Entered, Projected, turns_of
from app.models.kernels import Kernels
from app.models.layout import Layout
from app.models.pointwise import Normed, Sum


class Block(nn.Module, ABC):
    """One layer."""

    attn: Attention

    @abstractmethod
    def prepare(self, kernels: Kernels, *, last: bool) -> None:
        """Packs the weights; once, before the first forward."""

    @abstractmethod
    def forward(self, x: Tensor, projected: Projected, layout: Layout) -> Sum:
        """x: the residual stream of the rows (T', D) that ask in `projected`, which is of all rows."""


class BackboneConfig(Protocol):
    """What is asked of every backbone's configuration."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...


class Transformer(nn.Module, ABC):
    """Packed rows (T, D) float32 -> last hidden states (T', D) float32 of the wanted ones.

    Norms its input, so that stage two can put context rows in front of the text.
    """

    config: BackboneConfig

    @property
    @abstractmethod
    def blocks(self) -> Sequence[Block]:
        """Two or more."""

    @property
    def token_type(self) -> Tensor:
        """The embedding of token type 0, (D,), where there are types."""
        raise NotImplementedError

    @abstractmethod
    def token_rows(self, input_ids: Tensor) -> Tensor:
        """What enters the first stage for (T,) ids: (T, D) float32, not normed yet."""

    @abstractmethod
    def text_rows(self, input_ids: Tensor) -> Tensor:
        """What stands behind the context in the second stage, likewise."""

    @abstractmethod
    def input_norm(self, rows: Tensor) -> Tensor: ...

    @abstractmethod
    def after(self, index: int, s: Sum) -> Normed:
        """What block `index` gave, for the next one: the residual stream, and the rows that it projects. Of the last
        block: the last hidden states, as the stream."""

    def prepare(self, kernels: Kernels) -> None:
        """Packs the weights; once, before the first forward."""
        for block in self.blocks:
            block.prepare(kernels, last=block is self.blocks[-1])

    def enter(self, rows: Tensor, layout: Layout, rotary_start: int = 0) -> Entered:
        """Up to and with the first layer's projections: nothing here mixes rows."""
        x, attention = self.input_norm(rows), self.blocks[0].attn
        return Entered(x, *attention.project(x, turns_of(layout, *attention.rotary, rotary_start)))

    def forward(self, entered: Entered, layout: Layout, rotary_start: int = 0) -> Tensor:
        """`layout`: of all entered rows; no rotation before position `rotary_start` of a sequence."""
        first, *others = self.blocks
        rotaries = {block.attn.rotary for block in others}
        turns = {rotary: turns_of(layout, *rotary, rotary_start) for rotary in rotaries}
        x, rows = self.after(0, first(entered.x, entered.projected, layout))
        for i, block in enumerate(others, 1):
            wanted = layout.wanted_rows if block is others[-1] else None
            projected = block.attn.project(rows, turns[block.attn.rotary], wanted)
            x, rows = self.after(i, block(x if wanted is None else x[wanted], projected, layout))
        return x

    def frozen(self, rows: Tensor, rotary_start: int = 0) -> dict[str, Tensor]:
        """Keys and values (C, H, d) of every layer, `k0`, `v0`, …, for a context alone (C, D)."""
        layout = Layout.of([len(rows)], rows.device)
        entered = self.enter(rows, layout, rotary_start)
        x, projected = entered.x, entered.projected
        kept: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            if i:
                projected = block.attn.project(rows, turns_of(layout, *block.attn.rotary, rotary_start))
            kept |= {f"k{i}": projected.k, f"v{i}": projected.v}
            if block is not self.blocks[-1]:
                x, rows = self.after(i, block(x, projected, layout))
        return {name: tensor.contiguous() for name, tensor in kept.items()}

    def behind(
        self, rows: Tensor, layout: Layout, frozen: Sequence[dict[str, Tensor]], rotary_start: int = 0
    ) -> Tensor:
        """Last hidden states (T', D) of texts' rows behind frozen contexts, one a text.

        `layout`: of contexts and texts; its wanted rows are `rows`, normed here as in `enter`.
        """
        own = layout.of_wanted()
        lengths = layout.wanted_lengths
        x = rows = self.input_norm(rows)
        for i, block in enumerate(self.blocks):
            q, k, v = block.attn.project(rows, turns_of(own, *block.attn.rotary, rotary_start))
            k = interleaved([context[f"k{i}"] for context in frozen], torch.split(k, lengths))
            v = interleaved([context[f"v{i}"] for context in frozen], torch.split(v, lengths))
            x, rows = self.after(i, block(x, Projected(q, k, v), layout))
        return x


def interleaved(contexts: Sequence[Tensor], texts: Sequence[Tensor]) -> Tensor:
    """Each context's rows with its text's behind them, all in a row."""
    return torch.cat([part for pair in zip(contexts, texts, strict=True) for part in pair])
