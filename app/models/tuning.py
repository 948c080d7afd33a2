"""Which kernels are fastest on this machine: measured once a process, in well under a second, never guessed from names.

One product and one attention of the models' own shapes; the least CPU time of a few runs. Candidates interleave, so
that whatever else the machine does meets all of them.
"""

import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import lru_cache, partial
from typing import TypeVar

import torch

from app.models.attention import attend
from app.models.kernels import AttentionKernel, Dense, Kernels, Precision
from app.models.trials import HEAD_SIZE, HEADS, INNER, WIDTH, attention_is_right, pointwise_is_right, product_is_right

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
ROWS = 528  # a context with a short text
REPEATS = 3
HOPELESS = 1.5
"""So much slower in its first run: no further ones."""
PLAIN = 0.95
"""Plain products need no filler and no kernel for every shape, so that others must be faster by this much."""
FILLED_ROWS = 32
"""With AMX, 16 are as fast and take twice the memory for kernels."""
SLOWER = 0.9
"""bfloat16 weights take twice the room when computed in float32, so that must be faster by this much."""


@lru_cache(maxsize=8)
def fastest(precision: Precision, device: torch.device) -> Kernels:
    """The kernels for `precision` on `device`; elsewhere than on CPUs, those made for GPUs where they are right."""
    if device.type != "cpu":
        plain = Kernels(precision, compute=torch.bfloat16 if precision == "bfloat16" else torch.float32)
        found = _of_gpu(plain, device)
    else:
        found = _fastest_attention(_fastest_linear(precision))
        # oneDNN compiles a kernel for every shape, MKL does not.
        compiles = found.linear == "onednn" or found.attention != "sdpa" or found.compute is not torch.float32
        found = replace(found, row_multiple=FILLED_ROWS) if compiles else found
    log.info("kernels for %s on %s: %s", precision, device, found)
    return found


def fitted(kernels: Kernels, device: torch.device, head_size: int) -> Kernels:
    """`kernels`, tried with heads of the published models' size, for others. FlashAttention takes multiples of 8 up to
    256 (torch, transformers/cuda/flash_attn/flash_api.cpp)."""
    if kernels.attention != "varlen" or head_size == HEAD_SIZE:
        return kernels
    if head_size % 8 == 0 and head_size <= 256 and attention_is_right(kernels, device, head_size):
        return kernels
    log.warning("attention over packed rows takes no heads of %d: plain attention runs text by text", head_size)
    return replace(kernels, attention="sdpa")


def _of_gpu(plain: Kernels, device: torch.device) -> Kernels:
    packed, fused = replace(plain, attention="varlen"), replace(plain, pointwise="triton")
    return replace(
        plain,
        attention="varlen" if plain.compute is torch.bfloat16 and attention_is_right(packed, device) else "sdpa",
        pointwise="triton" if pointwise_is_right(fused, device) else "torch",
    )


def onednn(precision: Precision, compute: torch.dtype) -> Kernels | None:
    """oneDNN's products, if they run and are right on this CPU."""
    for int16_pairs in (False, True) if precision == "int8" else (False,):
        kernels = Kernels(precision, "onednn", compute=compute, int16_pairs=int16_pairs)
        if product_is_right(kernels):
            return kernels
    return None


def _fastest_linear(precision: Precision) -> Kernels:
    computes = (torch.bfloat16, torch.float32) if precision == "bfloat16" else (torch.float32,)
    candidates = [Kernels(precision, compute=compute) for compute in computes]
    candidates += [packed for compute in computes if (packed := onednn(precision, compute))]
    x, weight = torch.rand(ROWS, WIDTH), torch.rand(INNER, WIDTH)
    runs: dict[Kernels, Callable[[], object]] = {}
    for kernels in candidates:
        dense = Dense.of(weight, kernels)
        rows = dense.operand(x)
        runs[kernels] = partial(dense, rows)
    seconds = least_seconds(runs)

    def adjusted(k: Kernels) -> float:
        return seconds[k] * (SLOWER if k.compute is torch.bfloat16 else 1.0) * (PLAIN if k.linear == "torch" else 1.0)

    return min(candidates, key=adjusted)


def _fastest_attention(linear: Kernels) -> Kernels:
    attentions: list[AttentionKernel] = ["sdpa", "bmm"]
    if onednn("bfloat16" if linear.compute is torch.bfloat16 else "float32", linear.compute):
        attentions.append("linear")
    candidates = [replace(linear, attention=attention) for attention in attentions]
    qkv = torch.rand(3, 1, ROWS, HEADS, HEAD_SIZE).to(linear.compute)
    q, k, v = qkv.transpose(2, 3)  # (B, H, S, d), in the memory order of a projection
    seconds = least_seconds({c: partial(attend, c, q, k, v, None) for c in candidates})
    return min(candidates, key=lambda c: seconds[c])


@torch.inference_mode()
def least_seconds(runs: dict[K, Callable[[], object]]) -> dict[K, float]:
    """CPU seconds of this thread for the best of a few calls of each, after one to warm up."""
    for run in runs.values():
        run()
    least = {name: _seconds(run) for name, run in runs.items()}
    hopeful = [name for name in runs if least[name] < HOPELESS * min(least.values())]
    for _ in range(REPEATS):
        for name in hopeful:
            least[name] = min(least[name], _seconds(runs[name]))
    return least


def _seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start
