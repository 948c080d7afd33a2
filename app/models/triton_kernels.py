"""What comes between the products, on a GPU: one pass over memory each, where eager operations take three to seven.

Plain forms of the same are in pointwise.py. All sums are in float32, whatever is read and written.
Triton compiles a kernel at its first use, and needs a C compiler for that (once: what it makes is kept in its cache).
Only imported where these kernels are to run: TRITON_INTERPRET=1 before that, and they run on a CPU, slowly.

T rows, D hidden_size, N inner size, H heads, d = D / H.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 1024
"""Elements a program takes where rows do not matter."""


@triton.jit
def _gate(activated, gate, count, gelu: tl.constexpr, block: tl.constexpr):
    offsets = tl.program_id(0) * block + tl.arange(0, block)
    inside = offsets < count
    a = tl.load(activated + offsets, mask=inside).to(tl.float32)
    g = tl.load(gate + offsets, mask=inside).to(tl.float32)
    if gelu:
        a = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    else:
        a = a * tl.sigmoid(a)
    tl.store(gate + offsets, (a * g).to(gate.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm(  # noqa: PLR0917
    x, plus, weight, bias, stream, rows, columns, eps, biased: tl.constexpr, post: tl.constexpr, block: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, block)
    inside = column < columns
    total = tl.load(x + start + column, mask=inside, other=0.0)
    total += tl.load(plus + start + column, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, total - tl.sum(total, axis=0) / columns, 0.0)
    spread = tl.sum(centred * centred, axis=0) / columns
    normed = centred * tl.rsqrt(spread + eps) * tl.load(weight + column, mask=inside)
    if biased:
        normed += tl.load(bias + column, mask=inside)
    tl.store(stream + start + column, normed if post else total, mask=inside)
    tl.store(rows + start + column, normed.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(  # noqa: PLR0917
    x, turns, x_stride, turns_stride, pairs, heads, half: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, block)
    inside = pair < pairs
    head, frequency = pair // half, pair % half
    first = x + row * x_stride + head * 2 * half + frequency
    turn = turns + row * turns_stride + ((head // heads) * half + frequency) * 2
    real, imaginary = tl.load(turn, mask=inside), tl.load(turn + 1, mask=inside)
    a = tl.load(first, mask=inside).to(tl.float32)
    b = tl.load(first + half, mask=inside).to(tl.float32)
    tl.store(first, (a * real - b * imaginary).to(x.dtype.element_ty), mask=inside)
    tl.store(first + half, (a * imaginary + b * real).to(x.dtype.element_ty), mask=inside)


def gate(activated: Tensor, gate: Tensor, activation: Literal["silu", "gelu"]) -> Tensor:
    """activation(activated) * gate, both (T, N), in the latter's memory. GELU is the exact one."""
    count = gate.numel()
    with _on(gate):
        _gate[(triton.cdiv(count, SIZE),)](activated, gate, count, activation == "gelu", SIZE)
    return gate


def add_norm(x: Tensor, plus: Tensor, norm: torch.nn.LayerNorm, *, post: bool) -> tuple[Tensor, Tensor]:
    """x (T, D) float32 and plus (T, D) -> the residual stream, (T, D) float32: their sum, or with `post` its norm; and
    the norm in plus's dtype, for the products that follow."""
    stream, rows = torch.empty_like(x), torch.empty_like(plus)
    columns, bias = x.shape[1], norm.bias
    size = triton.next_power_of_2(columns)
    with _on(x):
        given = (x, plus, norm.weight, norm.weight if bias is None else bias, stream, rows)
        _add_norm[(len(x),)](*given, columns, norm.eps, bias is not None, post, size)
    return stream, rows


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x (T, parts, H, d), each row's parts one behind the other, times turns (T, parts, 1, d/2), complex, in place.
    A pair is an element of each half of a head."""
    parts, heads, size = x.shape[1:]
    pairs = parts * heads * size // 2
    parted = torch.view_as_real(turns)
    with _on(x):
        strides = (x.stride(0), parted.stride(0))
        _rotate[(len(x),)](x, parted, *strides, pairs, heads, size // 2, triton.next_power_of_2(pairs))
    return x


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, wherever its arguments are."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
