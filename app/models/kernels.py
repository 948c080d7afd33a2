"""The linear layers of the backbones, and which kernels compute them. Only this file and attention.py know oneDNN's
private ops.

`mkldnn::_linear_pointwise` runs on a weight reordered once into oneDNN's blocked layout, with an activation, a product
or a sum in the same pass; `onednn::qlinear_pointwise` does so in int8. torch.compile's CPU backend emits the same calls
(torch/_inductor/mkldnn_lowerings.py). They are private, and what they can do depends on the CPU: `trials` tries them
before they are used. T rows, K inputs, N outputs of a layer.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Precision = Literal["float32", "bfloat16", "int8"]
LinearKernel = Literal["torch", "onednn"]
AttentionKernel = Literal["sdpa", "bmm", "linear", "varlen"]
PointwiseKernel = Literal["torch", "triton"]
Activation = Literal["none", "silu", "gelu"]
ZERO_POINT = 128
PAIR = 127.4
"""Two neighbouring weights of one sign add up to so much at most; rounded to 128, and 255 * 128 is an int16."""
ONEDNN_ACTIVATIONS = {"none": ("none", ""), "silu": ("swish", ""), "gelu": ("gelu", "none")}


@dataclass(frozen=True, slots=True)
class Kernels:
    """How a backbone is computed. `torch` and `sdpa` run on every device, `varlen` on CUDA in
    bfloat16, `triton` on CUDA, the others on CPUs."""

    precision: Precision = "float32"
    linear: LinearKernel = "torch"
    attention: AttentionKernel = "sdpa"
    compute: torch.dtype = torch.float32
    """What matrix products take. A bfloat16 model computes in float32 on a CPU without bfloat16 instructions: the
    rounded weights stay, and so do its vectors, to within the rounding that is left out."""
    row_multiple: int = 1
    """Each sequence is filled up to a multiple of so many rows. oneDNN compiles a kernel for every shape it meets: of
    few shapes all stay compiled, of every length there is they take tens of milliseconds a forward, and a gigabyte."""
    pointwise: PointwiseKernel = "torch"
    """What comes between products: gates, rotations, sums and norms."""
    int16_pairs: bool = False
    """int8 weights are made small enough for CPUs without VNNI, which add up the products of two neighbouring inputs in
    int16 and cut off what does not fit (oneDNN, "Nuances of int8 computations")."""

    def __str__(self) -> str:
        computed = "int8" if self.precision == "int8" else str(self.compute).removeprefix("torch.")
        sums = " with sums of pairs in int16" if self.int16_pairs else ""
        return f"{self.linear} products in {computed}{sums}, {self.attention} attention, {self.pointwise} in between"

    @property
    def behind_attention(self) -> "Kernels":
        """For the product behind attention: float32 where int8's weights are made small. What attention gives is much
        alike in all rows, so that this product's rounding is too, and no mean over rows takes it away again."""
        return replace(self, precision="float32", linear="torch", int16_pairs=False) if self.int16_pairs else self

    def __post_init__(self) -> None:
        if self.attention == "varlen" and self.row_multiple > 1:
            raise ValueError("attention over packed rows takes no filler")


class Quantized(NamedTuple):
    """Rows (T, K) as uint8 around ZERO_POINT, and a float32 scale a row, (T, 1)."""

    values: Tensor
    scales: Tensor

    def dequantized(self) -> Tensor:
        """(T, K) float32."""
        return (self.values.float() - ZERO_POINT) * self.scales


Operand = Tensor | Quantized


class Linear(Protocol):
    """A prepared weight. `operand` brings rows into the form it takes, once for all layers that share them."""

    def operand(self, x: Tensor) -> Operand: ...

    def __call__(self, x: Operand, activation: Activation, times: Tensor | None, plus: Tensor | None) -> Tensor: ...


class Dense(nn.Module):
    """activation(x W^T) [* times] [+ plus]; no bias. `weight` (N, K) as in the checkpoint until `prepare`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(outputs, inputs))
        self.linear: Linear | None = None
        self.pointwise: PointwiseKernel = "torch"

    @classmethod
    def of(cls, weight: Tensor, kernels: Kernels) -> "Dense":
        """A prepared layer of `weight`, or of some rows of one that is loaded."""
        with torch.device("meta"):
            dense = cls(weight.shape[1], weight.shape[0])
        dense.weight = nn.Parameter(weight, requires_grad=False)
        dense.prepare(kernels)
        return dense

    def prepare(self, kernels: Kernels) -> None:
        """Packs the weight and lets go of the loaded one."""
        self.linear, self.weight = prepare_linear(self.take(), kernels), None
        self.pointwise = kernels.pointwise

    def take(self) -> Tensor:
        """The loaded weight, for whoever packs it in another shape; this layer no longer has it then."""
        if self.weight is None:
            raise RuntimeError("this layer's weight is packed already")
        weight, self.weight = self.weight.detach(), None
        return weight

    def operand(self, x: Tensor) -> Operand:
        if self.linear is None:
            raise RuntimeError("prepare() comes before the first forward")
        return self.linear.operand(x)

    def forward(
        self, x: Operand, activation: Activation = "none", times: Tensor | None = None, plus: Tensor | None = None
    ) -> Tensor:
        """x: what `operand` gave for rows (T, K); times, plus: (T, N). Returns (T, N), in plus's dtype if there is."""
        if self.linear is None:
            raise RuntimeError("prepare() comes before the first forward")
        return self.linear(x, activation, times, plus)


def prepare_linear(weight: Tensor, kernels: Kernels) -> Linear:
    """weight (N, K) -> its kernel. The result shares no memory with `weight`, except for a plain float32 one."""
    if kernels.precision == "int8":
        weight = weight.float()
        return OnednnInt8Linear(weight, kernels.int16_pairs) if kernels.linear == "onednn" else TorchInt8Linear(weight)
    if kernels.precision == "bfloat16":
        weight = weight.to(torch.bfloat16)
    weight = weight.to(kernels.compute)
    return OnednnLinear(weight) if kernels.linear == "onednn" else TorchLinear(weight)


class TorchLinear:
    """F.linear, on any device."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def operand(self, x: Tensor) -> Tensor:
        return x.to(self._weight.dtype)

    def __call__(self, x: Operand, activation: Activation, times: Tensor | None, plus: Tensor | None) -> Tensor:
        return finish(F.linear(plain(x), self._weight), activation, times, plus)


class OnednnLinear:
    """oneDNN with the weight in its blocked layout, and what follows the product fused into it."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._dtype = weight.dtype

    def operand(self, x: Tensor) -> Tensor:
        return x.to(self._dtype)

    def __call__(self, x: Operand, activation: Activation, times: Tensor | None, plus: Tensor | None) -> Tensor:
        x, pointwise = plain(x), torch.ops.mkldnn._linear_pointwise
        if activation == "none" and times is not None and plus is None:
            return pointwise.binary(x, times, self._weight, None, "mul")
        if activation == "none" and times is None and plus is not None and plus.dtype == self._dtype:
            return pointwise.binary(x, plus, self._weight, None, "add")
        name, algorithm = ONEDNN_ACTIVATIONS[activation]
        return finish(pointwise(x, self._weight, None, name, [], algorithm), "none", times, plus)


class TorchInt8Linear:
    """The int8 weight where there is no int8 kernel: scaled back for every product."""

    def __init__(self, weight: Tensor) -> None:
        self._values, self._scales = quantize_weight(weight)

    def operand(self, x: Tensor) -> Tensor:
        return x

    def __call__(self, x: Operand, activation: Activation, times: Tensor | None, plus: Tensor | None) -> Tensor:
        return finish(F.linear(plain(x), self._values * self._scales[:, None]), activation, times, plus)


class OnednnInt8Linear:
    """int8 weights, one scale an output; rows quantised as they come; float32 out."""

    def __init__(self, weight: Tensor, int16_pairs: bool) -> None:
        values, self._scales = quantize_weight(weight, int16_pairs=int16_pairs)
        self._weight = torch.ops.onednn.qlinear_prepack(values, None)
        self._zero_points = torch.zeros(len(weight), dtype=torch.int64)

    def operand(self, x: Tensor) -> Quantized:
        return quantize_rows(x)

    def __call__(self, x: Operand, activation: Activation, times: Tensor | None, plus: Tensor | None) -> Tensor:
        if not isinstance(x, Quantized):
            raise TypeError("an int8 layer takes what its operand() gives")
        # The rows' scales come behind the product: oneDNN's own take one scale for all rows.
        rows: tuple[Any, ...] = (x.values, 1.0, ZERO_POINT)
        weight: tuple[Any, ...] = (self._weight, self._scales, self._zero_points, None)
        y = torch.ops.onednn.qlinear_pointwise(*rows, *weight, 1.0, 0, torch.float32, "none", [], "")
        if activation == "none" and times is None and plus is not None:
            return torch.addcmul(plus, y, x.scales)
        return finish(y.mul_(x.scales), activation, times, plus)


def quantize_weight(weight: Tensor, *, int16_pairs: bool = False) -> tuple[Tensor, Tensor]:
    """(N, K) float32 -> (N, K) int8, symmetric, and (N,) float32 scales, one an output."""
    scales = weight.abs().amax(dim=1) / 127
    if int16_pairs:
        pairs = F.pad(weight, (0, weight.shape[1] % 2)).reshape(len(weight), -1, 2)
        sums = torch.maximum(pairs.clamp_min(0).sum(dim=2), -pairs.clamp_max(0).sum(dim=2))
        scales = torch.maximum(scales, sums.amax(dim=1) / PAIR)
    scales.clamp_min_(torch.finfo(torch.float32).tiny)
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def quantize_rows(x: Tensor) -> Quantized:
    """A scale a row, so that a text's vector does not depend on which others are computed beside it.

    Unsigned, because oneDNN's int8 products on AVX-512 take no signed rows.
    """
    largest = torch.maximum(x.amax(dim=1, keepdim=True), -x.amin(dim=1, keepdim=True))
    # A little less than 127 steps: rounding up must not go beyond 255.
    steps = 126.9 / largest.clamp_min_(torch.finfo(torch.float32).tiny)
    # Truncation after adding one half rounds.
    values = (x * steps).add_(ZERO_POINT + 0.5).to(torch.uint8)
    return Quantized(values, steps.reciprocal_())


def plain(x: Operand) -> Tensor:
    if isinstance(x, Quantized):
        raise TypeError("a float layer takes no quantised rows")
    return x


def finish(y: Tensor, activation: Activation, times: Tensor | None, plus: Tensor | None) -> Tensor:
    """What a kernel has not fused, in place on its fresh result y."""
    if activation == "silu":
        y = F.silu(y, inplace=True)
    elif activation == "gelu":
        y = F.gelu(y)
    if times is not None:
        y = y.mul_(times)
    if plus is None:
        return y
    return y.add_(plus) if y.dtype == plus.dtype else plus + y
