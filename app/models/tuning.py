"""Which kernels are fastest on this machine: measured once a process, in well under a second, never guessed from names.

One product and one attention of the models' own shapes; the least CPU time of a few runs. Candidates interleave, so
that whatever else the machine does meets all of them.
"""

import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import TypeVar

import torch

from app.models.attention import Attention, Projected, attend
from app.models.kernels import AttentionKernel, Dense, Kernels, LinearKernel, Precision, has_onednn
from app.models.layout import Layout

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
ROWS, WIDTH, INNER, HEADS = 528, 768, 3072, 12  # a context with a short text, in either model
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
    """The kernels for `precision` on `device`; elsewhere than on CPUs, attention over packed rows where it is right."""
    if device.type != "cpu":
        plain = Kernels(precision, compute=torch.bfloat16 if precision == "bfloat16" else torch.float32)
        packed_rows = replace(plain, attention="varlen")
        return packed_rows if plain.compute is torch.bfloat16 and agrees(packed_rows, device) else plain
    found = _fastest_attention(_fastest_linear(precision))
    # oneDNN compiles a kernel for every shape, MKL does not.
    compiles = found.linear == "onednn" or found.attention != "sdpa" or found.compute is not torch.float32
    return replace(found, row_multiple=FILLED_ROWS) if compiles else found


def _fastest_linear(precision: Precision) -> Kernels:
    computes = (torch.bfloat16, torch.float32) if precision == "bfloat16" else (torch.float32,)
    linears: tuple[LinearKernel, ...] = ("torch", "onednn") if has_onednn(precision) else ("torch",)
    candidates = [Kernels(precision, linear, compute=c) for c, linear in product(computes, linears)]
    x, weight = torch.rand(ROWS, WIDTH), torch.rand(INNER, WIDTH)
    runs: dict[Kernels, Callable[[], object]] = {}
    for kernels in candidates:
        dense = Dense.of(weight, kernels)
        rows = dense.operand(x)
        runs[kernels] = lambda dense=dense, rows=rows: dense(rows)  # type: ignore[misc]
    seconds = least_seconds(runs)

    def adjusted(k: Kernels) -> float:
        return seconds[k] * (SLOWER if k.compute is torch.bfloat16 else 1.0) * (PLAIN if k.linear == "torch" else 1.0)

    return min(candidates, key=adjusted)


def _fastest_attention(linear: Kernels) -> Kernels:
    attentions: tuple[AttentionKernel, ...] = ("sdpa", "bmm", "linear") if has_onednn("float32") else ("sdpa", "bmm")
    candidates = [Kernels(linear.precision, linear.linear, attention, linear.compute) for attention in attentions]
    qkv = torch.rand(3, 1, ROWS, HEADS, WIDTH // HEADS).to(linear.compute)
    q, k, v = qkv.transpose(2, 3)  # (B, H, S, d), in the memory order of a projection
    runs: dict[Kernels, Callable[[], object]] = {c: lambda c=c: attend(c, q, k, v, None) for c in candidates}  # type: ignore[misc]
    seconds = least_seconds(runs)
    return min(candidates, key=lambda c: seconds[c])


@torch.inference_mode()
def agrees(kernels: Kernels, device: torch.device) -> bool:
    """Whether attention on these kernels runs here and gives what plain attention gives, windows and all.

    Asked of a kernel that depends on the device's generation and torch's build.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        return False
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
                try:
                    found.append(attention(Projected(asking, k, v), layout).float())
                except (RuntimeError, NotImplementedError, ValueError) as error:
                    log.warning("%s attention does not run on %s: %s", candidate.attention, device, error)
                    return False
            ours, plain = found
            if not torch.allclose(ours, plain, atol=2e-2, rtol=2e-2):
                log.warning("%s attention is not right on %s; the plain one is used", kernels.attention, device)
                return False
    return True


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
