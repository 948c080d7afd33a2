"""The golden self-check: what it makes, what it notices, what it forgives."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from app.domain import DATASET_EMBEDDINGS, FloatArray, InputType
from app.engine.engine import Engine, EngineOptions
from app.errors import SelfCheckError
from app.models.loading import BUILTIN, LoadedModel, LoadOptions, load_model
from app.models.minilm import FLOOR, PULL, TEMPERATURE, TOKEN_WEIGHTS
from app.references import SHIPPED, References, write
from app.registry import ServedModel
from app.selfcheck import (
    AT_START,
    DOCUMENTS,
    FIRST,
    ROUNDING,
    SECOND,
    Outcome,
    check,
    compute,
    key_of,
    synthetic_context,
    tokenized,
)
from tests.models.conftest import GOLDENS, builtin_folder, load_golden

TINY = ("v1-tiny-c16", "v2-tiny-c16")


@pytest.fixture
def references(tmp_path: Path) -> References:
    return References(tmp_path / "selfcheck")


@contextmanager
def served(loaded: LoadedModel) -> Iterator[tuple[Engine, ServedModel]]:
    model = ServedModel((loaded.model.spec.id,), loaded.model, loaded.tokenizer)
    engine = Engine(
        [{model.id: loaded.model}], EngineOptions(batch_tokens=1100, queue_tokens=100_000, cache_bytes=2**24)
    )
    engine.start()
    try:
        yield engine, model
    finally:
        engine.stop(10)


def checked(loaded: LoadedModel, references: References) -> Outcome:
    with served(loaded) as (engine, model):
        return check(engine, model, references)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "selfcheck").iterdir())


@pytest.mark.parametrize("name", TINY)
def test_the_first_start_makes_what_the_next_one_is_held_to(name: str, references: References, tmp_path: Path) -> None:
    loaded = load_golden(name)
    first = checked(loaded, references)
    (file,) = files(tmp_path)
    assert (first.reference, first.findings, first.kept) == (None, (), file)
    second = checked(load_golden(name), references)
    assert second.reference is not None
    assert second.reference.path == file
    assert "float32 on cpu" in second.reference.made_by
    assert [f.stage for f in second.findings] == [FIRST, SECOND]
    assert all(f.distance < 1e-5 for f in second.findings)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", TINY)
def test_other_precisions_are_held_to_float32(name: str, dtype: Any, references: References) -> None:
    checked(load_golden(name), references)
    loaded = load_model(str(GOLDENS / name), LoadOptions(dtype=dtype, device="cpu"))
    for finding in checked(loaded, references).findings:
        assert ROUNDING["float32"] < finding.distance < finding.limit == ROUNDING["float32"] + ROUNDING[dtype]


@pytest.mark.parametrize("name", TINY)
def test_a_rough_reference_is_replaced_by_an_exact_one(name: str, references: References, tmp_path: Path) -> None:
    rough = load_model(str(GOLDENS / name), LoadOptions(dtype="bfloat16", device="cpu"))
    checked(rough, references)
    exact = checked(load_golden(name), references)
    assert exact.reference is not None
    assert (exact.reference.dtype, exact.kept) == ("bfloat16", files(tmp_path)[0])
    again = checked(load_golden(name), references)
    assert again.reference is not None
    assert (again.reference.dtype, again.kept) == ("float32", None)
    assert max(f.distance for f in again.findings) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", TINY)
def test_another_computation_is_noticed_in_every_precision(
    name: str, dtype: Any, references: References, tmp_path: Path
) -> None:
    """Here: the Hub's, where the weights' own is known. First stages of the two are the same."""
    loaded = load_model(str(GOLDENS / name), LoadOptions(dtype=dtype, device="cpu"))
    other = load_golden(name, "hub")
    with served(other) as (engine, model):
        path = tmp_path / "selfcheck" / f"{key_of(loaded.model.spec)}.safetensors"
        write(path, compute(engine, model), other.model.spec)
    with pytest.raises(SelfCheckError) as refused:
        checked(loaded, references)
    message = str(refused.value)
    assert "\n" not in message
    assert f"({dtype} on cpu)" in message
    assert SECOND in message
    assert str(path) in message
    assert "remove it" in message


@pytest.mark.parametrize("name", TINY)
def test_weights_that_give_no_numbers(name: str, references: References, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(GOLDENS / name, folder)
    weights = load_file(folder / "model.safetensors")
    weights["second_stage_model.output_projection.0.bias"][3] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(SelfCheckError, match="NonFiniteEmbedding") as refused:
        checked(load_model(str(folder), LoadOptions(device="cpu", dtype="float32")), references)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "selfcheck").exists()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _flip, _empty])
def test_a_damaged_file_is_told_and_made_anew(
    damage: Any, references: References, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_golden(TINY[0])
    checked(loaded, references)
    (file,) = files(tmp_path)
    damage(file)
    with caplog.at_level(logging.WARNING):
        assert checked(loaded, references).reference is None
    assert f"{file} is damaged" in caplog.text
    assert files(tmp_path) == [file]
    assert checked(loaded, references).reference is not None


def test_a_folder_that_takes_nothing_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        outcome = checked(load_golden(TINY[0]), References(tmp_path / "file"))
    assert outcome.kept is None
    assert "are not kept" in caplog.text


@pytest.mark.parametrize("name", TINY)
def test_what_decides_the_vectors_decides_the_key(name: str) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"semantics": "hub"},
        {"output_residual": not name.startswith("v2")},
        {"mask_instruction": not name.startswith("v2")},
        {"context_attention": "frozen"},
        {"first_stage": False},
    ]
    specs = [load_golden(name, **each).model.spec for each in options]
    specs += [replace(specs[0], revision="x"), replace(specs[0], max_length=9), replace(specs[0], corpus_size=9)]
    assert len({key_of(spec) for spec in specs}) == len(specs)
    assert key_of(replace(specs[0], id="x", dtype="int8", device="cuda", source="y")) == key_of(specs[0])


@pytest.mark.parametrize("name", TINY)
def test_without_a_first_stage_the_second_is_checked(name: str, references: References) -> None:
    with served(load_golden(name)) as (engine, model):
        whole = compute(engine, model)
    with served(load_golden(name, first_stage=False)) as (engine, model):
        half = compute(engine, model)
    assert set(half) == {SECOND}
    np.testing.assert_allclose(half[SECOND], whole[SECOND], atol=1e-5)


def test_the_embedded_default_is_checked_on_its_first_start(references: References, tmp_path: Path) -> None:
    outcome = checked(load_model(BUILTIN, LoadOptions(device="cpu", dtype="bfloat16")), references)
    assert outcome.reference is not None
    assert outcome.reference.is_shipped
    assert not (tmp_path / "selfcheck").exists()


def test_the_shipped_vectors_are_those_of_transformers(builtin: LoadedModel) -> None:
    """The formulas of models/minilm.py written out in float64 over transformers' BERT."""
    model = ServedModel((BUILTIN,), builtin.model, builtin.tokenizer)
    shipped = References(SHIPPED).find(key_of(model.spec), {FIRST: (2, 384), SECOND: (2, 384)})
    assert shipped is not None
    assert shipped.is_shipped
    stock: Any = BertModel
    bert = stock.from_pretrained(builtin_folder(), add_pooling_layer=False).eval().double()

    def weighted(ids: tuple[int, ...], weights: Any) -> Any:
        with torch.inference_mode():
            hidden = bert(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        total = (hidden * weights[list(ids)][:, None]).sum(axis=0)
        return total / np.linalg.norm(total)

    documents = tokenized(model, [(text, InputType.DOCUMENT) for text in DOCUMENTS])
    n = len(documents)
    frequency = np.array([sum(t in d.input_ids for d in documents) for t in range(30522)])
    weights = FLOOR + (1 - FLOOR) * np.log((n + 1) / (frequency + 0.5)) / np.log((n + 1) / 0.5)
    first = [weighted(d.input_ids, weights) for d in documents]

    context = {name: array.astype(np.float64) for name, array in synthetic_context(builtin.model).items()}
    rows = context[DATASET_EMBEDDINGS]
    second = []
    for text in tokenized(model, AT_START):
        z = weighted(text.input_ids, context[TOKEN_WEIGHTS])
        if text.input_type is InputType.DOCUMENT:
            pulls = np.exp(rows @ z / TEMPERATURE)
            z = z + PULL * (pulls / pulls.sum()) @ rows
        second.append(z / np.linalg.norm(z))

    def differs(name: str, expected: list[FloatArray]) -> float:
        return float(np.abs(shipped.arrays[name] - np.array(expected)).max())

    assert differs(FIRST, first) < 1e-6
    assert differs(SECOND, second) < 1e-6
