"""Frozen contexts: context rows that never see the text, held against transformers under a mask that says just that."""

import numpy as np
import pytest
import torch
from torch import Tensor

from app.bench.models import Family, load_checkpoint, random_texts
from app.bench.reference import Reference
from app.domain import DATASET_EMBEDDINGS, FloatArray
from app.models.contextual import Semantics
from app.models.kernels import Kernels
from app.models.loading import LoadOptions
from app.models.tuning import onednn
from app.vectors import normalized
from tests.models.conftest import arrays_of, embed, golden_texts, load_golden, random_weights, reference_of, tokenized

LENGTHS = [9, 70, 9]
KERNELS = [Kernels(), *([Kernels(linear="onednn", attention="linear")] if onednn("float32", torch.float32) else [])]
CONTEXT, SOFT = 512, 8


def rows_of(size: int) -> FloatArray:
    rows: FloatArray = np.random.default_rng(size).standard_normal((CONTEXT, 768)).astype(np.float32)
    return rows


def expected(reference: Reference, family: Family, ids: Tensor, dataset: Tensor) -> Tensor:
    """One text's raw vector, the context rows seeing each other alone."""
    soft = reference._head("second_stage_model.prompt_projection", torch.ones(1, 768), torch.relu).view(SOFT, 768)
    rows = torch.cat((dataset, soft, reference._text_rows(ids[None])[0]))[None]
    length, before = rows.shape[1], CONTEXT + SOFT
    seen = torch.ones(length, length, dtype=torch.bool)
    seen[:before, before:] = False
    near = (torch.arange(length)[:, None] - torch.arange(length)[None, :]).abs() <= 64
    full, sliding = seen[None, None], (seen & near)[None, None]
    mask = full if family == "v1" else {"full_attention": full, "sliding_attention": sliding}
    hidden = reference._second(inputs_embeds=rows, attention_mask=mask).last_hidden_state[0, before:]
    return reference._head("second_stage_model.output_projection", hidden.mean(dim=0, keepdim=True), torch.relu)[0]


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: f"{k.linear}-{k.attention}")
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_frozen_is_what_it_says(family: Family, kernels: Kernels) -> None:
    checkpoint = random_weights(family)
    options = LoadOptions(dtype="float32", device="cpu", kernels=kernels, context_attention="frozen")
    model = load_checkpoint(checkpoint, options, Semantics(context_token_type=family == "v1"))
    texts, reference = random_texts(family, LENGTHS), reference_of(family)
    datasets = [rows_of(1), rows_of(2), rows_of(1)]
    with torch.inference_mode():
        contexts = [model.load_context({DATASET_EMBEDDINGS: dataset}) for dataset in datasets]
        got = model.second_stage(texts, contexts).numpy()
        wanted = torch.stack(
            [
                expected(reference, family, torch.tensor(text.input_ids), torch.from_numpy(dataset))
                for text, dataset in zip(texts, datasets, strict=True)
            ]
        ).numpy()
    np.testing.assert_allclose(normalized(got), normalized(wanted), atol=1e-5)


@pytest.mark.parametrize("golden", ["v1-tiny-c16", "v2-tiny-c16"])
@pytest.mark.parametrize("semantics", ["training", "hub"])
def test_frozen_is_a_space_of_its_own(golden: str, semantics: str) -> None:
    exact, frozen = load_golden(golden, semantics), load_golden(golden, semantics, context_attention="frozen")
    arrays = arrays_of(exact, golden_texts(golden)[:16])
    texts = tokenized(exact, ["an old map of the marsh", "rye"], exact.model.spec.default_input_type)
    vectors = [embed(m, texts, [m.model.load_context(arrays)] * 2) for m in (exact, frozen)]
    away = 1 - (vectors[0] * vectors[1]).sum(axis=1)
    assert away.min() > 1e-6
    assert frozen.model.spec.approximate
    assert not exact.model.spec.approximate
    prints = {m.model.spec.fingerprint("ctx", 64, normalized=True) for m in (exact, frozen)}
    assert len(prints) == 2
    assert frozen.model.spec.context_rows == 0
    alone = [embed(frozen, [text], [frozen.model.load_context(arrays)])[0] for text in texts]
    np.testing.assert_allclose(vectors[1], alone, atol=1e-5)
