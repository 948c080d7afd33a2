"""The models the tests here share: the golden checkpoints in both semantics, and the embedded default."""

import importlib.util
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from app.bench.models import Checkpoint, Family, random_checkpoint
from app.bench.reference import Reference
from app.domain import DATASET_EMBEDDINGS, Arrays, FloatArray, InputType, TokenizedText
from app.models.base import DeviceContext
from app.models.loading import BUILTIN, BUILTIN_PACKAGE, LoadedModel, LoadOptions, load_model

GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDEN_NAMES = ("v1-tiny-c16", "v1-tiny-c512", "v2-tiny-c16", "v2-tiny-c512")
SEMANTICS = ("training", "hub")


def load_golden(name: str, semantics: str = "training", **options: Any) -> LoadedModel:
    wanted = cast("Literal['training', 'hub']", semantics)
    return load_model(str(GOLDENS / name), LoadOptions(semantics=wanted, device="cpu", dtype="float32", **options))


FEW = 72
"""Context rows, where how many there are changes nothing; more than a window of v2 looks to either side."""


@lru_cache
def random_weights(family: Family) -> Checkpoint:
    """True width, few layers; ModernBERT's are global, sliding, sliding, global."""
    return random_checkpoint(family, layers=2 if family == "v1" else 4)


def with_few_rows(family: Family) -> Checkpoint:
    return replace(random_weights(family), corpus_size=FEW)


def dataset(seed: int = 0, rows: int = 512) -> FloatArray:
    return cast("FloatArray", np.random.default_rng(seed).standard_normal((rows, 768)).astype(np.float32))


@lru_cache
def reference_of(family: Family) -> Reference:
    """transformers' own model of `random_weights`."""
    return Reference(random_weights(family))


def golden_texts(name: str, case: str = "corpus") -> list[str]:
    cases = json.loads((GOLDENS / name / "cases.json").read_text(encoding="utf-8"))["cases"]
    return cast("list[str]", next(c["texts"] for c in cases if c["name"] == case))


def builtin_folder() -> Path:
    """Where the embedded default's files are installed."""
    spec = importlib.util.find_spec(BUILTIN_PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def tokenized(loaded: LoadedModel, texts: Sequence[str], input_type: InputType) -> list[TokenizedText]:
    return loaded.tokenizer.texts(texts, input_type, truncate=True)


def arrays_of(loaded: LoadedModel, documents: Sequence[str]) -> Arrays:
    """A context's arrays, made from documents by the model's own first stage."""
    model, texts = loaded.model, tokenized(loaded, documents, InputType.DOCUMENT)
    arrays = dict(model.corpus_arrays(texts))
    corpus = model.load_context(arrays)
    with torch.inference_mode():
        batches = [texts[i : i + 32] for i in range(0, len(texts), 32)]
        slices = [model.first_stage(batch, [corpus] * len(batch)) for batch in batches]
    rows = torch.cat(slices).numpy() if slices else np.zeros((0, model.spec.hidden_size), np.float32)
    return {**arrays, DATASET_EMBEDDINGS: rows}


def context_of(loaded: LoadedModel, documents: Sequence[str]) -> DeviceContext:
    """The same, loaded."""
    return loaded.model.load_context(arrays_of(loaded, documents))


def embed(loaded: LoadedModel, texts: Sequence[TokenizedText], contexts: Sequence[DeviceContext]) -> FloatArray:
    """Unit vectors of texts, each under its own context, in one batch."""
    with torch.inference_mode():
        raw = loaded.model.second_stage(texts, contexts).numpy()
    return cast("FloatArray", raw / np.linalg.norm(raw, axis=1, keepdims=True))


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models spend their time waking threads up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that asks the real Hub fails at once."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def builtin() -> LoadedModel:
    return load_model(BUILTIN, LoadOptions(device="cpu", dtype="float32"))


@pytest.fixture(params=["v1-tiny-c16", "v2-tiny-c16"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A copy of a golden checkpoint to break."""
    folder = tmp_path / request.param
    folder.mkdir()
    for name in ("config.json", "backbone_config.json", "model.safetensors", "tokenizer.json"):
        shutil.copyfile(GOLDENS / request.param / name, folder / name)
    yield folder
