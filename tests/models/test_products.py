"""Products that a CPU lacks, or computes wrongly, are not chosen."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.nn import functional as F

from app.bench.models import load_checkpoint, random_texts
from app.models import kernels, tuning
from app.models.kernels import (
    ZERO_POINT,
    Dense,
    Kernels,
    OnednnInt8Linear,
    Quantized,
    finish,
    quantize_rows,
    quantize_weight,
)
from app.models.loading import LoadOptions
from app.models.trials import product_is_right
from app.models.tuning import fastest, onednn
from tests.models.conftest import GOLDENS, random_weights

CPU = torch.device("cpu")
INT16 = torch.iinfo(torch.int16)
floats = st.floats(-1e3, 1e3, width=32)


class WithoutVnni(OnednnInt8Linear):
    """vpmaddubsw of AVX2 and AVX-512 (Intel's intrinsics guide): neighbours' products are added up in int16, and what
    does not fit is cut off."""

    def __init__(self, weight: Tensor, int16_pairs: bool) -> None:
        super().__init__(weight, int16_pairs)
        self._values, _ = quantize_weight(weight, int16_pairs=int16_pairs)

    def __call__(self, x: Any, activation: Any, times: Tensor | None, plus: Tensor | None) -> Tensor:
        y = torch.zeros(len(x.values), len(self._values))
        for at in range(0, x.values.shape[1], 2):
            pair = x.values[:, at : at + 2].float() @ self._values[:, at : at + 2].float().T
            y += pair.clamp(INT16.min, INT16.max)
        y -= ZERO_POINT * self._values.float().sum(dim=1)
        return finish(y * self._scales * x.scales, activation, times, plus)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials and choices of this process are of real kernels, and remembered."""
    monkeypatch.setattr(tuning, "product_is_right", product_is_right.__wrapped__)


@pytest.mark.skipif(not onednn("int8", torch.float32), reason="this torch has no oneDNN")
def test_int8_without_vnni_takes_smaller_weights(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "OnednnInt8Linear", WithoutVnni)
    with caplog.at_level("INFO"):
        chosen = onednn("int8", torch.float32)
    assert chosen
    assert chosen.int16_pairs
    assert "int8 product is not right" in caplog.text


def test_products_that_do_not_run_are_not_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("bf16 path needs the cpu support")

    for name in ("OnednnLinear", "OnednnInt8Linear"):
        monkeypatch.setattr(kernels, name, fails)
    with caplog.at_level("INFO"):
        for precision in ("float32", "bfloat16", "int8"):
            chosen = fastest.__wrapped__(precision, CPU)
            assert (chosen.linear, chosen.precision, chosen.int16_pairs) == ("torch", precision, False)
            assert chosen.attention != "linear"
    assert "does not run on cpu, another is used: RuntimeError: bf16 path needs the cpu support" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@given(arrays(np.float32, (3, 8), elements=floats), arrays(np.float32, (5, 8), elements=floats))
def test_no_two_neighbours_overflow(rows: Any, weight: Any) -> None:
    w = torch.from_numpy(weight)
    values, scales = quantize_weight(w, int16_pairs=True)
    assert ((values * scales[:, None] - w).abs() <= 0.51 * scales[:, None]).all()
    assert (scales <= 2 * quantize_weight(w)[1]).all()
    quantized = quantize_rows(torch.from_numpy(rows))
    products = quantized.values.int()[:, None] * values.int()
    pairs = products.unflatten(-1, (-1, 2)).sum(dim=-1)
    assert INT16.min <= pairs.min() <= pairs.max() <= INT16.max
    assert np.abs(quantized.dequantized().numpy() - rows).max() <= 0.51 * np.abs(rows).max() / 126 + 1e-6


@settings(max_examples=30)
@given(arrays(np.float32, (3, 64), elements=floats), arrays(np.float32, (16, 64), elements=floats))
def test_int8_products_are_exact(rows: Any, weight: Any) -> None:
    """Of what was quantised, whatever it was."""
    chosen = onednn("int8", torch.float32) or Kernels("int8")
    x, w = torch.from_numpy(rows), torch.from_numpy(weight)
    dense, (values, scales) = Dense.of(w, chosen), quantize_weight(w, int16_pairs=chosen.int16_pairs)
    operand = dense.operand(x)
    seen = operand.dequantized() if isinstance(operand, Quantized) else operand
    expected = seen.double() @ (values.double() * scales.double()[:, None]).T
    largest = float(x.abs().max() * w.abs().max())
    np.testing.assert_allclose(dense(operand), expected, rtol=1e-5, atol=1e-4 * largest)


@pytest.mark.skipif(not onednn("int8", torch.float32), reason="this torch has no oneDNN")
def test_float32_behind_attention_makes_up_for_smaller_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = random_texts("v1", [128] * 4)

    def vectors(used: Kernels) -> Tensor:
        options = LoadOptions(dtype=used.precision, device="cpu", kernels=used)
        with torch.inference_mode():
            found = load_checkpoint(random_weights("v1"), options).first_stage(documents, [{}] * len(documents))
        return F.normalize(found.double(), dim=-1)

    def away(rounded: Tensor) -> float:
        return float(1 - (exact * rounded).sum(dim=-1).min())

    exact, pairs = vectors(Kernels()), Kernels("int8", "onednn", int16_pairs=True)
    finer = away(vectors(pairs))
    monkeypatch.setattr(Kernels, "behind_attention", property(lambda kernels: kernels))
    assert 0 < finer < 0.6 * away(vectors(pairs))


OF_GOLDENS = """
import sys
from pathlib import Path
from app.goldens import Goldens
from app.models.loading import LoadOptions

for name in sys.argv[1:]:
    goldens = Goldens.read(Path(name))
    for array, got in goldens.run("train", LoadOptions(dtype="int8", device="cpu")):
        if array.endswith("/unit"):
            print(1 - (goldens.expected[array].astype(float) * got).sum(axis=-1).min())
"""


@pytest.mark.skipif(not onednn("int8", torch.float32), reason="this torch has no oneDNN")
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_int8_on_older_cpus(isa: str) -> None:
    """oneDNN as on CPUs without VNNI, where sums that are cut off put these models 5e-2 and 1e-1 away."""
    done = subprocess.run(
        [sys.executable, "-c", OF_GOLDENS, *(str(GOLDENS / name) for name in ("v1-tiny-c16", "v2-tiny-c16"))],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    away = [float(line) for line in done.stdout.split()]
    assert len(away) > 10
    assert 0 < max(away) < 1e-2
