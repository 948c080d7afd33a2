"""Kernels for GPUs, tried on the device itself before they are used: they depend on its generation, on torch's build,
and some on a compiler. What does not run or is not right is left out, with a warning.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.models.attention import Attention, Projected, rotations
from app.models.kernels import Kernels
from app.models.layout import Layout
from app.models.pointwise import triton_kernels

log = logging.getLogger(__name__)

WIDTH, INNER, HEADS = 768, 3072, 12  # of both models, but for the second one's inner size
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Compared(NamedTuple):
    name: str
    ours: Tensor
    plain: Tensor


@torch.inference_mode()
def attention_is_right(kernels: Kernels, device: torch.device) -> bool:
    """Whether attention on these kernels runs here and gives what plain attention gives, windows and all."""
    return _is_right(f"{kernels.attention} attention", device, kernels, _attended(kernels, device))


@torch.inference_mode()
def pointwise_is_right(kernels: Kernels, device: torch.device) -> bool:
    """Whether Triton's kernels run here, and give what plain operations between the products give."""
    return _is_right("Triton", device, kernels, _pointwise(kernels, device))


def _is_right(what: str, device: torch.device, kernels: Kernels, compared: Iterator[Compared]) -> bool:
    if device.type == "cuda" and not torch.cuda.is_available():
        return False
    tolerance = TOLERANCE[kernels.compute]
    try:
        for name, ours, plain in compared:
            if not torch.allclose(ours.float(), plain.float(), atol=tolerance, rtol=tolerance):
                log.warning("%s is not right on %s (%s): the plain one is used", what, device, name)
                return False
    except Exception as error:  # noqa: BLE001 - no package, compiler or folder to write to, an unknown device: all sorts
        log.warning("%s does not run on %s, the plain one is used: %s: %s", what, device, type(error).__name__, error)
        return False
    return True


def _attended(kernels: Kernels, device: torch.device) -> Iterator[Compared]:
    layout = Layout.of([9, 40, 40, 200], device, prefix=130)
    rows = len(layout.positions)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, rows, HEADS, WIDTH // HEADS, generator=generator).to(device, kernels.compute)
    q *= 0.125
    for window in (None, 64):
        for asking in (q, q[layout.wanted_rows]):
            found = []
            for candidate in (kernels, replace(kernels, attention="sdpa")):
                attention = Attention(WIDTH, HEADS, 10_000.0, window)
                attention.kernels = candidate
                found.append(attention(Projected(asking, k, v), layout))
            yield Compared(f"window {window}, {len(asking)} of {rows} rows", *found)


def _pointwise(kernels: Kernels, device: torch.device) -> Iterator[Compared]:
    ours, generator = triton_kernels(), torch.Generator().manual_seed(0)
    rows, size = 40, WIDTH // HEADS

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
