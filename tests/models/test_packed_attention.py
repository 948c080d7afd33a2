"""Attention over packed rows in one kernel, against the kernel's documentation in plain torch: the kernel itself is
CUDA's."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from app.bench.models import Family, load_checkpoint, random_texts
from app.domain import DATASET_EMBEDDINGS
from app.models.kernels import Kernels
from app.models.loading import LoadOptions
from app.models.trials import attention_is_right
from app.models.tuning import fastest, fitted
from tests.models.conftest import FEW, dataset, with_few_rows

CPU = torch.device("cpu")
PACKED = Kernels(attention="varlen")


def documented(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int, scale: float, window_size: Any, **_: Any
) -> Tensor:
    """varlen_attn: sequences by their bounds; the last query stands at the last key; windows on either side."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert len(longest) == 2
    out = torch.empty_like(q)
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        assert b - a <= longest[0]
        assert d - c <= longest[1]
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
        place = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        distance = place - torch.arange(d - c)[None]
        left, right = window_size
        far = (distance > left) | (-distance > right) if left >= 0 else torch.zeros_like(distance, dtype=torch.bool)
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.masked_fill(far, -torch.inf).softmax(-1), v[c:d])
    return out


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_it_gives_what_plain_attention_gives(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", documented)
    texts = random_texts(family, [9, 120, 9, 23, 300])
    vectors = []
    for kernels in (Kernels(), PACKED):
        options = LoadOptions(dtype="float32", device="cpu", kernels=kernels)
        loaded = load_checkpoint(with_few_rows(family), options)
        context = loaded.load_context({DATASET_EMBEDDINGS: dataset(rows=FEW)})
        with torch.inference_mode():
            second = loaded.second_stage(texts, [context] * len(texts))
            vectors.append(torch.cat((loaded.first_stage(texts, [{}] * len(texts)), second)).numpy())
    scale = np.abs(vectors[0]).max()
    np.testing.assert_allclose(vectors[1], vectors[0], rtol=0, atol=1e-5 * scale)


def test_a_right_kernel_agrees_and_a_wrong_one_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", documented)
    assert attention_is_right(PACKED, CPU)

    def lined_up_at_the_front(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        if options["window_size"] != (-1, -1):
            options["window_size"] = (64, 0)
        return documented(q, k, v, *rest, **options)

    monkeypatch.setattr(varlen, "varlen_attn", lined_up_at_the_front)
    assert not attention_is_right(PACKED, CPU)
    assert "not right" in caplog.text


def test_heads_of_other_sizes_are_tried_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = replace(PACKED, attention="sdpa")
    assert fitted(PACKED, CPU, 64) == PACKED, "those of the published models were"
    assert fitted(PACKED, CPU, 32) == plain, "the real one has no CPU version"
    assert "with heads of 32 does not run" in caplog.text
    monkeypatch.setattr(varlen, "varlen_attn", documented)
    assert [fitted(PACKED, CPU, size) for size in (32, 96, 256)] == [PACKED] * 3
    assert [fitted(PACKED, CPU, size) for size in (12, 264)] == [plain] * 2, "FlashAttention has no such heads"
    assert fitted(plain, CPU, 12) == plain


def test_a_kernel_that_does_not_run_is_not_chosen(caplog: pytest.LogCaptureFixture) -> None:
    """The real one, which has no CPU version."""
    assert not attention_is_right(PACKED, CPU)
    assert "does not run" in caplog.text
    assert fastest("bfloat16", CPU).attention != "varlen"
