"""Variants of the forward on a GPU: batches of several sizes, interleaved; medians of what a batch takes until the
device is done.

Ablations show what a part is worth: bfloat16 without CUDA graphs, without Triton's kernels between the products,
without attention over packed rows.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.bench.bound import INNER, WIDTH, best_rate, fraction, machine, second_stage_flops
from app.bench.compute import FIRST_STAGE, FROZEN, MIXED, REFERENCE, Run, differences, first, medians, second
from app.bench.models import Checkpoint, load_checkpoint, random_texts
from app.bench.reference import Reference
from app.domain import DATASET_EMBEDDINGS
from app.models.contextual import ContextualModel, Semantics
from app.models.device import settle_cuda
from app.models.loading import LoadOptions
from app.models.tuning import fastest

ABLATIONS = ("bfloat16-no-graphs", "bfloat16-no-triton", "bfloat16-no-varlen")
GPU_VARIANTS = (REFERENCE, "float32", "bfloat16", *ABLATIONS, FROZEN)
WARM_UP = 3
"""A graph is recorded when a shape is met again, and replayed from then on."""
GEMM_ROWS, GEMM_CHAIN, GEMM_ROUNDS = 16_384, 20, 7
"""Products in a chain are launched while others are computed."""


@dataclass(frozen=True, slots=True)
class GpuRow:
    """One line of the outcome. `ratio`: the reference's time for the same batch, in bfloat16, over this one's;
    differences of unit vectors to it in float32; `bound_fraction`: of what the device's best matrix products allow."""

    model: str
    variant: str
    n: int | str
    batch: int
    ms_per_text: float
    texts_per_second: float
    ratio: float | None
    max_abs_diff: float | None
    one_minus_cos: float | None
    bound_fraction: float | None


class GpuComparison:
    """A checkpoint in several variants on one device, all in `hub` semantics, as in compute.Comparison."""

    def __init__(self, checkpoint: Checkpoint, variants: Sequence[str], *, device: torch.device, rounds: int) -> None:
        """Raises ConfigError where the reference is asked for and transformers is missing."""
        settle_cuda()  # as where models are served
        self._family = checkpoint.family
        self._device = device
        self._rounds = rounds
        self._rates = device_rates(self._device)
        self._dataset = torch.randn(checkpoint.corpus_size, WIDTH, generator=torch.Generator().manual_seed(1))
        self._exact = Reference(checkpoint, self._device) if REFERENCE in variants else None
        self._reference = Reference(checkpoint, self._device, torch.bfloat16) if REFERENCE in variants else None
        hub = Semantics(context_token_type=checkpoint.family == "v1")
        self._models: dict[str, ContextualModel] = {}
        for variant in variants:
            if variant != REFERENCE:
                self._models[variant] = load_checkpoint(checkpoint, _options(variant, self._device), hub)
        arrays = {DATASET_EMBEDDINGS: self._dataset.numpy()}
        self._contexts = {variant: model.load_context(arrays) for variant, model in self._models.items()}
        self.machine: dict[str, Any] = machine(self._rates) | {
            "device": _name(self._device),
            "cuda": torch.version.cuda,
            "kernels": {
                v: f"attention {m.kernels.attention}, pointwise {m.kernels.pointwise}" for v, m in self._models.items()
            },
        }

    def second_stage(self, n: int, batch: int) -> list[GpuRow]:
        """`batch` texts of n tokens under one context."""
        return self._measured(n, [n] * batch, second_stage_flops(self._family, n))

    def mixed(self, batch: int) -> list[GpuRow]:
        """`batch` texts of mixed lengths; the reference pads them to the longest."""
        lengths = [MIXED[i % len(MIXED)] for i in range(batch)]
        return self._measured("mixed", lengths, sum(second_stage_flops(self._family, n) for n in lengths) / batch)

    def first_stage(self, batch: int) -> list[GpuRow]:
        """`batch` documents of equal length."""
        tokens = FIRST_STAGE[1]
        texts = random_texts(self._family, [tokens] * batch)
        ours = {name: first(model, texts) for name, model in self._models.items()}

        def reference(model: Reference) -> Tensor:
            return model.first_stage(texts)

        return self._rows(
            f"{self._family} first stage", tokens, count=batch, reference=reference, ours=ours, flops=None
        )

    def _measured(self, n: int | str, lengths: list[int], flops: float) -> list[GpuRow]:
        texts = random_texts(self._family, lengths, seed=len(lengths))
        ours = {name: second(model, texts, self._contexts[name]) for name, model in self._models.items()}

        def reference(model: Reference) -> Tensor:
            return model.second_stage(texts, self._dataset)

        return self._rows(self._family, n, count=len(texts), reference=reference, ours=ours, flops=flops)

    @torch.inference_mode()
    def _rows(
        self,
        model: str,
        n: int | str,
        *,
        count: int,
        reference: Callable[[Reference], Tensor],
        ours: Mapping[str, Run],
        flops: float | None,
    ) -> list[GpuRow]:
        plain = {} if self._reference is None else {REFERENCE: partial(reference, self._reference)}
        runs: dict[str, Run] = plain | dict(ours)
        exact = None if self._exact is None else F.normalize(reference(self._exact).double(), dim=1)
        vectors = {name: [F.normalize(run().double(), dim=1) for _ in range(WARM_UP)][-1] for name, run in runs.items()}
        seconds = medians(runs, self._rounds, partial(_seconds, device=self._device))
        rows = []
        for name, taken in seconds.items():
            rate = best_rate(self._rates, name.partition("-")[0])
            each = taken / count
            max_abs_diff, one_minus_cos = differences(vectors[name], exact)
            rows.append(
                GpuRow(
                    model=model,
                    variant=name,
                    n=n,
                    batch=count,
                    ms_per_text=1000 * each,
                    texts_per_second=1 / each,
                    ratio=seconds[REFERENCE] / taken if REFERENCE in seconds else None,
                    max_abs_diff=max_abs_diff,
                    one_minus_cos=one_minus_cos,
                    bound_fraction=fraction(flops, rate, each) if name not in (FROZEN, REFERENCE) else None,
                )
            )
        return rows


@torch.inference_mode()
def device_rates(device: torch.device) -> dict[str, float]:
    """GFLOP/s of (16384, 768) x (768, 3072) there, the median of a few chains of them: float32 (not TF32, unless torch
    is told so) and bfloat16."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.rand(GEMM_ROWS, WIDTH, device=device, dtype=dtype)
        weight = torch.rand(INNER, WIDTH, device=device, dtype=dtype)
        F.linear(x, weight)
        product = partial(F.linear, x, weight)
        if device.type == "cuda":
            each = median(_device_seconds(product, device) for _ in range(GEMM_ROUNDS)) / GEMM_CHAIN
        else:
            each = _seconds(product, device)
        rates[str(dtype).removeprefix("torch.")] = 2 * GEMM_ROWS * WIDTH * INNER / each / 1e9
    return rates


def _device_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of a chain of runs, by the device's own clock: nothing is waited for in between."""
    stream = torch.cuda.current_stream(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record(stream)
    for _ in range(GEMM_CHAIN):
        run()
    end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """From the first launch until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _options(variant: str, device: torch.device) -> LoadOptions:
    precision, _, without = variant.partition("-no-")
    options = LoadOptions(dtype="bfloat16", device=str(device))
    if variant == FROZEN:
        return replace(options, context_attention="frozen")
    if precision == "float32":
        return replace(options, dtype="float32")
    kernels = fastest("bfloat16", device)
    if without == "triton":
        kernels = replace(kernels, pointwise="torch")
    elif without == "varlen":
        kernels = replace(kernels, attention="sdpa")
    return replace(options, kernels=kernels, cuda_graphs=without != "graphs")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
