"""Every way to compute gives the reference's answers: kernels, precisions, batches, threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Literal, cast

import numpy as np
import pytest
import torch

from app.bench.models import Family, load_checkpoint, random_texts
from app.domain import DATASET_EMBEDDINGS, FloatArray
from app.goldens import Goldens
from app.models.contextual import ContextualModel, Semantics
from app.models.kernels import AttentionKernel, Kernels, Precision
from app.models.loading import LoadOptions
from app.models.tuning import fastest, onednn
from app.vectors import normalized
from tests.compare import assert_same
from tests.models.conftest import FEW, GOLDEN_NAMES, GOLDENS, dataset, random_weights, reference_of, with_few_rows

CPU = torch.device("cpu")
FLOATS = [Kernels(), Kernels(attention="bmm")]
if onednn("float32", torch.float32):
    FLOATS += [Kernels(linear="onednn", attention=attention) for attention in ("sdpa", "bmm", "linear")]
    FLOATS += [Kernels(attention="linear")]
FILLED = [replace(kernels, row_multiple=32) for kernels in FLOATS]
LENGTHS = [9, 120, 9, 23]


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        pytest.param(name, kernels, id=f"{name}-{kernels.linear}-{kernels.attention}-{kernels.row_multiple}")
        for name in GOLDEN_NAMES
        for kernels in (FLOATS if name.endswith("c512") else FLOATS + FILLED)
    ],
)
def test_goldens_on_every_kernel(name: str, kernels: Kernels) -> None:
    """Filled up in the one variant, else in the other; the chosen kernels do all of it in `verify --goldens`."""
    goldens, variant = Goldens.read(GOLDENS / name), "train" if kernels.row_multiple == 1 else "hub"
    compared = 0
    for array, got in goldens.run(variant, LoadOptions(dtype="float32", device="cpu", kernels=kernels)):
        if array.endswith("/unit"):
            np.testing.assert_allclose(got, goldens.expected[array], atol=1e-5, err_msg=array)
            compared += 1
    assert compared > 5


def model(
    family: Family, precision: Precision, semantics: Semantics | None = None, *, few_rows: bool = False
) -> ContextualModel:
    options = LoadOptions(dtype=precision, device="cpu", kernels=fastest(precision, CPU))
    weights = with_few_rows(family) if few_rows else random_weights(family)
    return load_checkpoint(weights, options, semantics)


def both_stages(loaded: ContextualModel) -> tuple[FloatArray, FloatArray]:
    """Unit vectors of the same texts through the first stage, and through the second under one context."""
    family: Family = "v1" if loaded.spec.family == "cde-v1" else "v2"
    texts = random_texts(family, LENGTHS)
    context = loaded.load_context({DATASET_EMBEDDINGS: dataset(rows=loaded.spec.corpus_size)})
    with torch.inference_mode():
        first = loaded.first_stage(texts, [{}] * len(texts)).numpy()
        second = loaded.second_stage(texts, [context] * len(texts)).numpy()
    return normalized(first), normalized(second)


@lru_cache
def exact(family: Family, *, few_rows: bool = False) -> tuple[FloatArray, FloatArray]:
    return both_stages(model(family, "float32", few_rows=few_rows))


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_fp32_is_transformers_own_padded_forward(family: Family) -> None:
    """With layer 0 cached, the last layer pruned, tiles and no padding, against a forward with none of it."""
    hub = Semantics(context_token_type=family == "v1")
    first, second = both_stages(model(family, "float32", hub))
    reference, texts = reference_of(family), random_texts(family, LENGTHS)
    np.testing.assert_allclose(first, normalized(reference.first_stage(texts).numpy()), atol=1e-5)
    expected = normalized(reference.second_stage(texts, torch.from_numpy(dataset())).numpy())
    np.testing.assert_allclose(second, expected, atol=1e-5)


@pytest.mark.parametrize(("precision", "limit"), [("bfloat16", 1e-5), ("int8", 5e-4)])
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_lower_precisions_stay_close(family: Family, precision: Precision, limit: float) -> None:
    rounded = both_stages(model(family, precision))
    for a, b in zip(exact(family), rounded, strict=True):
        away = 1 - (a.astype(np.float64) * b).sum(axis=1)
        assert away.max() <= limit
        assert np.abs(a - b).max() > 1e-7, "it is another precision indeed"


@pytest.mark.parametrize("attention", ["sdpa", "bmm", "linear"])
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_products_in_bfloat16(family: Family, attention: AttentionKernel) -> None:
    """What CPUs with bfloat16 instructions choose; others compute the rounded weights in float32."""
    packed = onednn("bfloat16", torch.bfloat16)
    if attention == "linear" and not packed:
        pytest.skip("oneDNN has no bfloat16 on this CPU")
    kernels = packed or Kernels("bfloat16", compute=torch.bfloat16)
    options = LoadOptions(
        dtype="bfloat16", device="cpu", kernels=replace(kernels, attention=attention, row_multiple=32)
    )
    rounded = both_stages(load_checkpoint(with_few_rows(family), options))
    for a, b in zip(exact(family, few_rows=True), rounded, strict=True):
        assert (1 - (a.astype(np.float64) * b).sum(axis=1)).max() <= 1e-5


@pytest.mark.parametrize(("family", "precision"), [("v1", "float32"), ("v2", "float32"), ("v1", "int8")])
def test_company_changes_nothing(family: Family, precision: Precision) -> None:
    """A text alone, in a batch under one context, and among texts under other contexts."""
    loaded, texts = model(family, precision, few_rows=True), random_texts(family, LENGTHS)
    contexts = [loaded.load_context({DATASET_EMBEDDINGS: dataset(seed, FEW)}) for seed in range(3)]
    with torch.inference_mode():
        alone = [loaded.second_stage([text], [contexts[0]])[0].numpy() for text in texts]
        together = loaded.second_stage(texts, [contexts[0]] * len(texts)).numpy()
        mixed = loaded.second_stage(
            [text for text in texts for _ in contexts], [context for _ in texts for context in contexts]
        ).numpy()
    np.testing.assert_allclose(normalized(together), normalized(np.stack(alone)), atol=1e-5)
    np.testing.assert_allclose(normalized(mixed[::3]), normalized(np.stack(alone)), atol=1e-5)
    assert np.abs(normalized(mixed[1::3]) - normalized(mixed[::3])).max() > 1e-3


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_threads_share_a_model(precision: Precision) -> None:
    loaded, texts = model("v2", precision, few_rows=True), random_texts("v2", LENGTHS)
    context = loaded.load_context({DATASET_EMBEDDINGS: dataset(rows=FEW)})

    def run(_: int) -> FloatArray:
        torch.set_num_threads(1)
        with torch.inference_mode():
            return cast("FloatArray", loaded.second_stage(texts, [context] * len(texts)).numpy())

    with ThreadPoolExecutor(2) as pool:
        first, *others = pool.map(run, range(4))
    for other in others:
        assert_same(other, first)


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_a_context_takes_what_it_is_counted_for(family: Family) -> None:
    context = model(family, "float32").load_context({DATASET_EMBEDDINGS: dataset()})
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in context.values()}
    assert sum(storages.values()) == sum(t.nbytes for t in context.values())


@pytest.mark.parametrize("attention", ["sdpa", "bmm"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_filler_is_not_seen(family: Family, frozen: bool, attention: AttentionKernel) -> None:
    """Of any length: sequences that lack nothing, or one row, or all but one; windows and frozen contexts, too."""
    texts = random_texts(family, [24, 24, 23, 25, 25, 8, 120, 300])
    vectors = []
    for multiple in (1, 32):
        kernels = Kernels(attention=attention, row_multiple=multiple)
        context_attention: Literal["frozen", "exact"] = "frozen" if frozen else "exact"
        options = LoadOptions(dtype="float32", device="cpu", kernels=kernels, context_attention=context_attention)
        loaded = load_checkpoint(with_few_rows(family), options)
        context = loaded.load_context({DATASET_EMBEDDINGS: dataset(rows=FEW)})
        with torch.inference_mode():
            first = loaded.first_stage(texts, [{}] * len(texts)).numpy()
            second = loaded.second_stage(texts, [context] * len(texts)).numpy()
        vectors.append(np.concatenate((normalized(first), normalized(second))))
    np.testing.assert_allclose(vectors[1], vectors[0], rtol=0, atol=1e-6)


def test_the_tuner_picks_something_that_is_there() -> None:
    for precision in ("float32", "bfloat16", "int8"):
        kernels = fastest(precision, CPU)
        assert kernels.precision == precision
        assert kernels.linear == "torch" or onednn(precision, kernels.compute)
    assert fastest("bfloat16", torch.device("cuda")) == Kernels("bfloat16", compute=torch.bfloat16)


OTHER_LENGTHS = """
import torch
from app.bench.models import load_checkpoint, random_checkpoint, random_texts
from app.domain import DATASET_EMBEDDINGS
from app.models.loading import LoadOptions, load_model

def run(model, arrays, lengths):
    for n in lengths:
        print("LENGTH", flush=True)
        with torch.inference_mode():
            model.second_stage(random_texts("v1", [n]), [model.load_context(arrays)])

rows = torch.rand(64, 768).numpy()
model = load_checkpoint(random_checkpoint("v1", layers=2, corpus_size=64), LoadOptions(dtype="int8", device="cpu"))
run(model, {DATASET_EMBEDDINGS: rows}, range(25, 57, 4))
model = load_model("builtin/minilm-context", LoadOptions(dtype="float32", device="cpu")).model
run(model, {DATASET_EMBEDDINGS: rows[:0, :384], "token_weights": torch.ones(30522).numpy()}, range(1, 257, 4))
"""


@pytest.mark.skipif(not onednn("int8", torch.float32), reason="this torch has no oneDNN")
def test_few_shapes_are_compiled() -> None:
    """However many lengths there are."""
    done = subprocess.run(
        [sys.executable, "-c", OTHER_LENGTHS],
        env=os.environ | {"ONEDNN_VERBOSE": "profile_create"},
        capture_output=True,
        text=True,
        check=True,
    )
    _, *lengths = [part.count("cache_miss") for part in done.stdout.split("LENGTH")]
    filled, default = lengths[:8], lengths[8:]
    assert filled[0] > 0
    assert sum(filled[1:]) == 0
    assert 0 < sum(default) <= 64
