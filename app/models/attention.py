"""Rotary self-attention of the backbones over packed rows.

T rows, H heads, d = D / H; B sequences of S rows in a segment. Sources: RoFormer (arXiv 2104.09864) for the rotation,
transformers models/modernbert for the window, inclusive on both sides.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.models.kernels import Dense, Kernels
from app.models.layout import Layout, Segment
from app.models.pointwise import rotate

TILE = 176  # queries a time in a sliding window: with 64 keys on either side, a score block stays in the cache
UNSEEN = -1e30  # no weight beside any score there is; finite, as a row of filler may see nothing else
BLOCK = 1_600_000  # scores computed at once; larger blocks leave the cache between the two products


class Projected(NamedTuple):
    """Queries (T', H, d), rotated and times d^-1/2; keys, rotated, and values (T, H, d). T' < T in the last layer."""

    q: Tensor
    k: Tensor
    v: Tensor


class Entered(NamedTuple):
    """Rows as they enter the first layer, (T, D) float32, with its projections. A context's are computed once."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def projected(self) -> Projected:
        return Projected(self.q, self.k, self.v)


@cache
def rotations(head_size: int, base: float, length: int, start: int, device: torch.device) -> Tensor:
    """Unit complex numbers by position and frequency, (S, 2, 1, d/2) complex64; for queries, [:, 0], times d^-1/2.

    The first `start` positions get angle 0, which is exactly no rotation. All are kept, as recorded forwards read them:
    they are few, of half a megabyte each.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), 1.0 / base**exponents)
    angles[:start] = 0.0
    turns = torch.complex(angles.cos(), angles.sin())[:, None, None, :]
    return torch.cat((turns * head_size**-0.5, turns), dim=1)


def turns_of(layout: Layout, head_size: int, base: float, start: int = 0) -> Tensor:
    """The rotations of a layout's rows, (T, 2, 1, d/2)."""
    longest = (layout.longest + 127) // 128 * 128  # few tables are kept
    return rotations(head_size, base, longest, start, layout.positions.device)[layout.positions]


class Attention(nn.Module):
    """Wqkv packs (q, k, v) x heads x d. `window`: keys at most that far away, on either side; None: all."""

    def __init__(self, hidden_size: int, heads: int, rotary_base: float, window: int | None = None) -> None:
        super().__init__()
        self.Wqkv = Dense(hidden_size, 3 * hidden_size)
        self.heads, self.head_size = heads, hidden_size // heads
        self.rotary = (self.head_size, rotary_base)
        self.window = window
        self.kernels = Kernels()
        self.Wq: Dense | None = None  # split off where not all rows ask

    def prepare(self, kernels: Kernels, *, split: bool) -> None:
        """Packs the projection; `split`: for queries of the wanted rows alone.

        The two halves that a rotation pairs are put side by side in q and k alike: scores stay the same sums, and
        rotating is one complex product. Triton's kernel reads halves as they are.
        """
        self.kernels = kernels
        q, k, v = self.Wqkv.take().float().view(3, self.heads, 2, self.head_size // 2, -1)
        if kernels.pointwise == "torch":
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k, v = (part.reshape(self.heads * self.head_size, -1) for part in (q, k, v))
        if split:
            self.Wq, self.Wqkv = Dense.of(q, kernels), Dense.of(torch.cat((k, v)), kernels)
        else:
            self.Wqkv = Dense.of(torch.cat((q, k, v)), kernels)

    def project(self, x: Tensor, turns: Tensor, wanted: Tensor | None = None) -> Projected:
        """Rows (T, D), the rotations of their positions (T, 2, 1, d/2); `wanted`: which of them ask, where split."""
        if self.Wq is None:
            qkv = self._heads(self.Wqkv(self.Wqkv.operand(x)), 3)
            q, k = rotate(qkv[:, :2], turns, self.kernels.pointwise).unbind(1)
            return Projected(q, k, qkv[:, 2])
        kv = self._heads(self.Wqkv(self.Wqkv.operand(x)), 2)
        asking, turns_of_asking = (x, turns) if wanted is None else (x[wanted], turns[wanted])
        q = self._heads(self.Wq(self.Wq.operand(asking)), 1)
        q = rotate(q, turns_of_asking[:, :1], self.kernels.pointwise)[:, 0]
        k = rotate(kv[:, :1], turns[:, 1:], self.kernels.pointwise)[:, 0]
        return Projected(q, k, kv[:, 1])

    def forward(self, projected: Projected, layout: Layout) -> Tensor:
        """(T', D): what each query sees, before the output projection."""
        q, k, v = projected
        if self.kernels.attention == "varlen":
            return attend_packed(q, k, v, layout, self.window).view(len(q), -1)
        mixed = torch.empty(len(q), self.heads, self.head_size, dtype=v.dtype, device=v.device)
        all_rows = len(q) == len(k)
        for s in layout.segments:
            first, queries = (s.start, s.length) if all_rows else (s.wanted_start, s.wanted)
            asked, seen = slice(first, first + s.count * queries), slice(s.start, s.start + s.count * s.length)
            out = self._segment(q[asked], k[seen], v[seen], s)
            mixed[asked] = out.view(-1, self.heads, self.head_size)
        return mixed.view(len(q), -1)

    def _segment(self, q: Tensor, k: Tensor, v: Tensor, segment: Segment) -> Tensor:
        """(B, S', H, d) of (B S', H, d) and twice (B S, H, d)."""
        q, k, v = (part.view(segment.count, -1, *part.shape[1:]).transpose(1, 2) for part in (q, k, v))  # (B, H, S, d)
        before, length = k.shape[2] - q.shape[2], k.shape[2]
        if self.window is None or length <= self.window + 1:
            return attend(self.kernels, q, k, v, None, filler=segment.filler)
        tiles = []
        for start in range(before, length, TILE):
            stop = min(start + TILE, length)
            low, high = max(0, start - self.window), min(length, stop + self.window)
            bias = band(start - low, stop - start, high - low, self.window, (q.dtype, q.device))
            seen, filler = slice(low, high), max(0, high - length + segment.filler)
            tile = q[:, :, start - before : stop - before]
            tiles.append(attend(self.kernels, tile, k[:, :, seen], v[:, :, seen], bias, filler=filler))
        return torch.cat(tiles, dim=1)

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        return x.view(len(x), parts, self.heads, self.head_size)


@lru_cache(maxsize=256)
def band(before: int, queries: int, keys: int, window: int, like: tuple[torch.dtype, torch.device]) -> Tensor:
    """(queries, keys): 0 where key j is at most `window` away from query before + i, else -inf."""
    dtype, device = like
    places = torch.arange(before, before + queries, device=device)
    distance = (places[:, None] - torch.arange(keys, device=device)[None, :]).abs()
    return torch.where(distance <= window, 0.0, -torch.inf).to(dtype)


@lru_cache(maxsize=256)
def unseen(keys: int, filler: int, like: tuple[torch.dtype, torch.device]) -> Tensor:
    """(1, keys): 0, and UNSEEN for the last `filler`."""
    bias = torch.zeros(1, keys)
    bias[:, keys - filler :] = UNSEEN
    return bias.to(dtype=like[0], device=like[1])


def attend(kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, filler: int = 0) -> Tensor:
    """softmax(q k^T + bias) v, the last `filler` keys left out. q (B, H, S', d), k and v (B, H, S, d), bias (S', S).
    Returns (B, S', H, d)."""
    if kernels.attention == "sdpa":
        if filler:
            hidden = unseen(k.shape[2], filler, (q.dtype, q.device))
            bias = hidden if bias is None else bias + hidden
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2)
    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype, device=q.device)
    product = _linear if kernels.attention == "linear" else _bmm
    heads = 1 if kernels.attention == "linear" else max(1, BLOCK // (q.shape[2] * k.shape[2]))
    for text in range(q.shape[0]):
        for head in range(0, q.shape[1], heads):
            some = slice(head, head + heads)
            scores = product(q[text, some], k[text, some])
            if bias is not None:
                scores += bias
            if filler:
                scores[..., -filler:] = UNSEEN
            torch.softmax(scores, dim=-1, out=scores)
            out[text, :, some] = product(scores, v[text, some].transpose(1, 2)).transpose(0, 1)
    return out


def attend_packed(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor:
    """All sequences in one kernel (FlashAttention, arXiv 2307.08691). q (T', H, d), k and v (T, H, d) -> (T', H, d).

    Fewer queries than keys are the last rows of their sequences, which is how the kernel lines them up.
    """
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - takes a second, which a CPU need not wait

    bounds = layout.bounds if len(q) == len(k) else layout.wanted_bounds
    longest = layout.longest  # an upper bound is enough for the queries
    sides = (-1, -1) if window is None else (window, window)
    # One split of the keys: a text's vector does not depend on its neighbours.
    mixed = varlen_attn(q, k, v, bounds, layout.bounds, longest, longest, scale=1.0, window_size=sides, num_splits=1)
    return mixed if isinstance(mixed, Tensor) else mixed[0]


def _bmm(x: Tensor, y: Tensor) -> Tensor:
    """(h, S', c) and (h, S, c) -> (h, S', S)."""
    return torch.bmm(x, y.transpose(1, 2))


def _linear(x: Tensor, y: Tensor) -> Tensor:
    """The same for one head, as a oneDNN linear."""
    return torch.ops.mkldnn._linear_pointwise(x[0], y[0].contiguous(), None, "none", [], "")[None]
