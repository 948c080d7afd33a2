"""What the machine could do at best: rates of its matrix products, and the operations one text cannot do without."""

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from app.bench.models import Family
from app.models.kernels import Dense, Kernels
from app.models.tuning import onednn

CONTEXT_ROWS, WIDTH = 520, 768
ROWS, INNER, ROUNDS = 1056, 3072, 7


@torch.inference_mode()
def gemm_rates() -> dict[str, float]:
    """GFLOP/s of CPU time for (1056, 768) x (768, 3072), the best of a few: plain float32, and what is packed."""
    x, weight = torch.rand(ROWS, WIDTH), torch.rand(INNER, WIDTH)
    runs: dict[str, Callable[[], object]] = {"float32 plain": lambda: torch.mm(x, weight.T)}
    for precision in ("float32", "bfloat16", "int8"):
        if kernels := onednn(precision, torch.bfloat16 if precision == "bfloat16" else torch.float32):
            runs[precision] = _packed(x, weight, kernels)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            started = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - started)
    return {name: 2 * ROWS * WIDTH * INNER / seconds / 1e9 for name, seconds in best.items()}


def best_rate(rates: Mapping[str, float], variant: str) -> float:
    """The fastest products a variant may use: those of its precision, or of a more exact one."""
    exact = ("float32 plain", "float32")
    allowed = {"bfloat16": (*exact, "bfloat16"), "int8": (*exact, "bfloat16", "int8")}.get(variant, exact)
    return max(rates[name] for name in allowed if name in rates)


def _packed(x: torch.Tensor, weight: torch.Tensor, kernels: Kernels) -> Callable[[], object]:
    dense = Dense.of(weight, kernels)
    rows = dense.operand(x)
    return lambda: dense(rows)


def second_stage_flops(family: Family, n: int) -> float:
    """Operations of one text of n tokens behind a known context: the first layer's projections of the context rows are
    not counted, nor what the last layer computes for them besides keys and values."""
    rows = CONTEXT_ROWS + n
    layers, inner = (12, 3072) if family == "v1" else (22, 1152)
    rest = 2 * WIDTH * (WIDTH + 3 * inner)  # a row's output projection and MLP
    projections = 2 * WIDTH * 3 * WIDTH
    total = 0.0
    for layer in range(layers):
        is_global = family == "v1" or layer % 3 == 0
        seen = rows if is_global else min(rows, 129)
        asking = n if layer == layers - 1 else rows
        total += asking * (rest + 4 * seen * WIDTH)
        if layer == 0:
            total += n * projections
        elif layer == layers - 1:
            total += (rows * 2 + n) * 2 * WIDTH * WIDTH
        else:
            total += rows * projections
    return total


def fraction(flops: float | None, rate: float, seconds: float) -> float | None:
    """Of the bound: `rate` in GFLOP/s, `seconds` of one text."""
    return None if flops is None else flops / 1e9 / rate / seconds


def machine(rates: dict[str, float]) -> dict[str, Any]:
    """What was measured on, for the report."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gemm_gflops": {name: round(rate, 1) for name, rate in rates.items()},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
