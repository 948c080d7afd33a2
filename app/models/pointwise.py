"""What comes between the products of a block: rotation, gate, the sum with the residual stream, its norm.

On CPUs activation, gate and sum are fused into oneDNN's products where that can be (kernels.py). On GPUs each of these
is one pass over memory in Triton (triton_kernels.py), where plain operations take three to seven.

T rows, D hidden_size, N inner size, H heads, d = D / H.
"""

from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from app.models.kernels import Dense, PointwiseKernel


class Sum(NamedTuple):
    """The residual stream x (T, D) float32, and a product (T, D) that the next norm adds to it; None: x has it."""

    x: Tensor
    plus: Tensor | None = None


class Normed(NamedTuple):
    """The residual stream x (T, D) float32, and normed rows (T, D) for the next products."""

    x: Tensor
    rows: Tensor


class Norm(nn.LayerNorm):
    """The norm of a residual stream. `forward` is the plain one of given rows."""

    def pre(self, s: Sum) -> Normed:
        """The stream goes on as it is."""
        return self._normed(s, post=False)

    def post(self, s: Sum) -> Normed:
        """The stream goes on normed."""
        return self._normed(s, post=True)

    def _normed(self, s: Sum, *, post: bool) -> Normed:
        if s.plus is None:
            rows = self(s.x)
            return Normed(rows if post else s.x, rows)
        return Normed(*triton_kernels().add_norm(s.x, s.plus, self, post=post))


def onto(x: Tensor, dense: Dense, rows: Tensor) -> Sum:
    """x (T, D) float32 + dense(rows)."""
    operand = dense.operand(rows)
    return Sum(x, dense(operand)) if dense.pointwise == "triton" else Sum(dense(operand, plus=x))


def gated(activated: Dense, gate: Dense, rows: Tensor, activation: Literal["silu", "gelu"]) -> Tensor:
    """activation(activated(rows)) * gate(rows): (T, N) of rows (T, D)."""
    operand = gate.operand(rows)
    if gate.pointwise == "torch":
        return gate(operand, times=activated(operand, activation=activation))
    return triton_kernels().gate(activated(operand), gate(operand), activation)


def rotate(x: Tensor, turns: Tensor, pointwise: PointwiseKernel) -> Tensor:
    """x (T, parts, H, d), fresh from a product, times turns (T, parts, 1, d/2), complex. Neighbours are a pair; for
    Triton, an element of a head's first half and one of its second."""
    if pointwise == "triton":
        return triton_kernels().rotate(x, turns)
    pairs = x.float().view(*x.shape[:-1], -1, 2)
    torch.view_as_complex(pairs).mul_(turns)
    return pairs.flatten(-2).to(x.dtype)


def triton_kernels() -> ModuleType:
    """Imported where they are to run: Triton comes with torch's CUDA builds alone. Raises ImportError."""
    import app.models.triton_kernels as kernels  # noqa: PLC0415

    return kernels
