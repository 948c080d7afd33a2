"""Kernels, tried on the device itself before they are used: they depend on its generation, on torch's build, and some
on a compiler. What does not run or is not right is left out, and the log says so.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.models.attention import Attention, Projected, rotations
from app.models.kernels import Activation, Dense, Kernels, Quantized, finish, quantize_weight
from app.models.layout import Layout
from app.models.pointwise import triton_kernels

log = logging.getLogger(__name__)

WIDTH, INNER, HEADS = 768, 3072, 12  # of both models, but for the second one's inner size
HEAD_SIZE = WIDTH // HEADS
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
CPU = torch.device("cpu")


class Compared(NamedTuple):
    name: str
    ours: Tensor
    plain: Tensor


@lru_cache(maxsize=16)
@torch.inference_mode()
def product_is_right(kernels: Kernels) -> bool:
    """Whether matrix products on these kernels run on this CPU and give what plain ones give. What they lack is a
    matter of its generation, and no cause for concern: bfloat16 takes AVX-512, int8 in full takes VNNI."""
    what = f"oneDNN's {kernels.precision} product" + (" with sums of pairs in int16" if kernels.int16_pairs else "")
    return _is_right(what, CPU, kernels, _multiplied(kernels), level=logging.INFO)


@torch.inference_mode()
def attention_is_right(kernels: Kernels, device: torch.device, head_size: int = HEAD_SIZE) -> bool:
    """Whether attention on these kernels runs here and gives what plain attention gives, windows and all."""
    what = f"{kernels.attention} attention" + (f" with heads of {head_size}" if head_size != HEAD_SIZE else "")
    return _is_right(what, device, kernels, _attended(kernels, device, head_size))


@torch.inference_mode()
def pointwise_is_right(kernels: Kernels, device: torch.device) -> bool:
    """Whether Triton's kernels run here, and give what plain operations between the products give."""
    return _is_right("Triton", device, kernels, _pointwise(kernels, device))


def _is_right(
    what: str, device: torch.device, kernels: Kernels, compared: Iterator[Compared], level: int = logging.WARNING
) -> bool:
    if device.type == "cuda" and not torch.cuda.is_available():
        return False
    tolerance = TOLERANCE[kernels.compute]
    try:
        for name, ours, plain in compared:
            if not torch.allclose(ours.float(), plain.float(), atol=tolerance, rtol=tolerance):
                log.log(level, "%s is not right on %s (%s): another is used", what, device, name)
                return False
    except Exception as error:  # noqa: BLE001 - no package, compiler or folder to write to, an unknown device: all sorts
        log.log(level, "%s does not run on %s, another is used: %s: %s", what, device, type(error).__name__, error)
        return False
    return True


def _multiplied(kernels: Kernels) -> Iterator[Compared]:
    generator, rows = torch.Generator().manual_seed(0), 40
    x, weight = torch.randn(rows, WIDTH, generator=generator), torch.randn(WIDTH, WIDTH, generator=generator)
    times, plus = torch.randn(2, rows, WIDTH, generator=generator).to(kernels.compute)
    fused: tuple[tuple[Activation, Tensor | None, Tensor | None], ...] = (
        ("none", None, None),
        ("none", times, None),
        ("none", None, plus),
        ("silu", None, None),
        ("gelu", None, None),
    )
    weight *= WIDTH**-0.5
    ones = torch.ones_like(weight)
    # Rows of nothing but their greatest value show whether int8's sums are cut off.
    for name, given, factor in (
        ("random", x, weight),
        ("greatest rows", ones[:rows], weight),
        ("ones", ones[:rows], ones),
    ):
        dense = Dense.of(factor, kernels)
        operand = dense.operand(given)
        seen = operand.dequantized() if isinstance(operand, Quantized) else operand.float()
        rounded = _rounded(factor, kernels)
        for activation, by, add in fused:
            plain = finish(F.linear(seen, rounded), activation, by, add)
            yield Compared(f"{name}, activation {activation}", dense(operand, activation, by, add), plain)


def _rounded(weight: Tensor, kernels: Kernels) -> Tensor:
    if kernels.precision == "int8":
        values, scales = quantize_weight(weight, int16_pairs=kernels.int16_pairs)
        return values * scales[:, None]
    return weight.to(torch.bfloat16).float() if kernels.precision == "bfloat16" else weight


def _attended(kernels: Kernels, device: torch.device, head_size: int) -> Iterator[Compared]:
    layout = Layout.of([9, 40, 40, 200], device, prefix=130)
    rows = len(layout.positions)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, rows, HEADS, head_size, generator=generator).to(device, kernels.compute)
    q *= head_size**-0.5
    for window in (None, 64):
        for asking in (q, q[layout.wanted_rows]):
            found = []
            for candidate in (kernels, replace(kernels, attention="sdpa")):
                attention = Attention(HEADS * head_size, HEADS, 10_000.0, window)
                attention.kernels = candidate
                found.append(attention(Projected(asking, k, v), layout))
            yield Compared(f"window {window}, {len(asking)} of {rows} rows", *found)


def _pointwise(kernels: Kernels, device: torch.device) -> Iterator[Compared]:
    ours, generator = triton_kernels(), torch.Generator().manual_seed(0)
    rows, size = 40, HEAD_SIZE

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, kernels.compute)

    a, g = some(rows, INNER), some(rows, INNER)
    yield Compared("silu", ours.gate(a, g.clone(), "silu"), F.silu(a.float()) * g)
    yield Compared("gelu", ours.gate(a, g.clone(), "gelu"), F.gelu(a.float()) * g)

    x, plus = some(rows, WIDTH).float(), some(rows, WIDTH)
    for post, bias in ((True, True), (False, False)):  # as in the two models
        norm = nn.LayerNorm(WIDTH, bias=bias).to(device)
        for parameter in norm.parameters():
            parameter.copy_(some(WIDTH))
        stream, normed = ours.add_norm(x, plus, norm, post=post)
        yield Compared("residual stream", stream, norm(x + plus) if post else x + plus)
        yield Compared("norm", normed, norm(x + plus))

    qkv, turns = some(rows, 3, HEADS, size), rotations(size, 10_000.0, rows, 0, device)
    turned = torch.complex(*qkv[:, :2].float().chunk(2, dim=-1)) * turns
    rotated = ours.rotate(qkv[:, :2], turns)
    yield Compared("rotation", rotated, torch.cat((turned.real, turned.imag), dim=-1))
