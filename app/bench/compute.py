"""Variants of the forward side by side in one process: interleaved, CPU time, medians, ratios to the reference."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from app.bench.bound import WIDTH, best_rate, fraction, gemm_rates, machine, second_stage_flops
from app.bench.models import Checkpoint, load_checkpoint, random_texts
from app.bench.reference import Reference
from app.domain import DATASET_EMBEDDINGS, TokenizedText
from app.models.contextual import ContextualModel, Semantics
from app.models.kernels import Precision
from app.models.loading import LoadOptions

REFERENCE = "reference"
FROZEN = "frozen"
VARIANTS = (REFERENCE, *get_args(Precision), FROZEN)
BATCHES = (1, 4)
"""Batch sizes the reference may take; its better one counts."""
TEXTS = 4
MIXED = (9, 480, 31, 120, 64, 17, 250, 12)
FIRST_STAGE = (16, 128)
"""Documents, and tokens of each."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the outcome. `ratio`: the reference's CPU time over this one's; differences of unit vectors to it;
    `bound_fraction`: of what the machine's best matrix products of this precision allow. None: not measured."""

    model: str
    variant: str
    n: int | str
    cpu_ms_per_text: float
    ratio: float | None
    max_abs_diff: float | None
    one_minus_cos: float | None
    bound_fraction: float | None


Run = Callable[[], Tensor]


class Comparison:
    """A checkpoint in several variants, all in `hub` semantics: that is what the reference computes."""

    def __init__(self, checkpoint: Checkpoint, variants: Sequence[str], *, rounds: int) -> None:
        """Raises ConfigError where the reference is asked for and transformers is missing."""
        self._family = checkpoint.family
        self._rounds = rounds
        self._rates = gemm_rates()
        self.machine = machine(self._rates)
        self._dataset = torch.randn(checkpoint.corpus_size, WIDTH, generator=torch.Generator().manual_seed(1))
        self._reference = Reference(checkpoint) if REFERENCE in variants else None
        hub = Semantics(context_token_type=checkpoint.family == "v1")
        self._models: dict[str, ContextualModel] = {}
        for variant in variants:
            if variant != REFERENCE:
                self._models[variant] = load_checkpoint(checkpoint, _options(variant), hub)
        self.machine["kernels"] = {
            v: {"linear": m.kernels.linear, "attention": m.kernels.attention, "compute": str(m.kernels.compute)}
            for v, m in self._models.items()
        }
        arrays = {DATASET_EMBEDDINGS: self._dataset.numpy()}
        self._contexts = {variant: model.load_context(arrays) for variant, model in self._models.items()}

    def second_stage(self, n: int) -> list[Row]:
        """Texts of n tokens under one context."""
        texts = random_texts(self._family, [n] * TEXTS, seed=n)
        flops = second_stage_flops(self._family, n)
        return self._measured(self._family, n, texts, self._reference_second, flops)

    def mixed(self) -> list[Row]:
        """A stream of mixed lengths, against one padded batch of the reference."""
        texts = random_texts(self._family, list(MIXED))
        flops = sum(second_stage_flops(self._family, n) for n in MIXED) / len(MIXED)
        whole = self._reference

        def one_batch(texts: Sequence[TokenizedText]) -> list[Run]:
            return [lambda: whole.second_stage(texts, self._dataset)] if whole else []

        return self._measured(self._family, "mixed", texts, one_batch, flops)

    def first_stage(self) -> list[Row]:
        """Documents of equal length."""
        documents, tokens = FIRST_STAGE
        texts = random_texts(self._family, [tokens] * documents)
        runs = self._in_batches(texts, lambda some: self._need_reference().first_stage(some))
        ours = {v: first(model, texts) for v, model in self._models.items()}
        return self._rows(
            f"{self._family} first stage", tokens, count=len(texts), reference=runs, ours=ours, flops=None
        )

    def _reference_second(self, texts: Sequence[TokenizedText]) -> list[Run]:
        return self._in_batches(texts, lambda some: self._need_reference().second_stage(some, self._dataset))

    def _need_reference(self) -> Reference:
        if self._reference is None:
            raise RuntimeError("no reference in this comparison")
        return self._reference

    def _in_batches(
        self, texts: Sequence[TokenizedText], run: Callable[[Sequence[TokenizedText]], Tensor]
    ) -> list[Run]:
        """The reference over all texts, once for each batch size it may take."""
        if self._reference is None:
            return []

        def batched(size: int) -> Tensor:
            return torch.cat([run(texts[i : i + size]) for i in range(0, len(texts), size)])

        return [partial(batched, size) for size in BATCHES]

    def _measured(
        self,
        model: str,
        n: int | str,
        texts: Sequence[TokenizedText],
        reference: Callable[[Sequence[TokenizedText]], list[Run]],
        flops: float,
    ) -> list[Row]:
        ours = {v: second(m, texts, self._contexts[v]) for v, m in self._models.items()}
        return self._rows(model, n, count=len(texts), reference=reference(texts), ours=ours, flops=flops)

    @torch.inference_mode()
    def _rows(
        self,
        model: str,
        n: int | str,
        *,
        count: int,
        reference: list[Run],
        ours: Mapping[str, Run],
        flops: float | None,
    ) -> list[Row]:
        runs: dict[str, Run] = {f"{REFERENCE} {i}": run for i, run in enumerate(reference)} | dict(ours)
        vectors = {name: F.normalize(run().double(), dim=1) for name, run in runs.items()}  # warms up too
        seconds = medians(runs, self._rounds, _cpu_seconds)
        best = min((name for name in runs if name.startswith(REFERENCE)), key=seconds.__getitem__, default=None)
        rows = []
        for name in ([best] if best else []) + list(ours):
            variant = REFERENCE if name == best else name
            max_abs_diff, one_minus_cos = differences(vectors[name], vectors[best] if best else None)
            rate = best_rate(self._rates, variant)
            rows.append(
                Row(
                    model=model,
                    variant=variant,
                    n=n,
                    cpu_ms_per_text=1000 * seconds[name] / count,
                    ratio=seconds[best] / seconds[name] if best else None,
                    max_abs_diff=max_abs_diff,
                    one_minus_cos=one_minus_cos,
                    bound_fraction=fraction(flops, rate, seconds[name] / count) if variant != FROZEN else None,
                )
            )
        return rows


def _options(variant: str) -> LoadOptions:
    if variant == FROZEN:
        return LoadOptions(dtype="float32", device="cpu", context_attention="frozen")
    return LoadOptions(dtype=cast("Precision", variant), device="cpu")


def second(model: ContextualModel, texts: Sequence[TokenizedText], context: dict[str, Tensor]) -> Run:
    return partial(model.second_stage, texts, [context] * len(texts))


def first(model: ContextualModel, texts: Sequence[TokenizedText]) -> Run:
    return partial(model.first_stage, texts, [{}] * len(texts))


def differences(vectors: Tensor, exact: Tensor | None) -> tuple[float, float] | tuple[None, None]:
    """The largest one, and 1 - cos, of unit vectors (B, D) to the exact ones, if there are."""
    if exact is None:
        return None, None
    # Rounding may make a cosine greater than 1.
    return float((vectors - exact).abs().max()), max(0.0, float(1 - (vectors * exact).sum(dim=1).min()))


def medians(runs: Mapping[str, Run], rounds: int, seconds: Callable[[Run], float]) -> dict[str, float]:
    """Of what `seconds` gives for each, the runs taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    return {name: median(times) for name, times in taken.items()}


def _cpu_seconds(run: Run) -> float:
    """Of all threads of this process."""
    started = time.process_time()
    run()
    return time.process_time() - started
