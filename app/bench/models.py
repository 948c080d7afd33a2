"""The models a benchmark runs: a checkpoint's tensors, or random ones of true size where there is no checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from app.domain import InputType, ModelSpec, TokenizedText
from app.errors import CheckpointError
from app.models.configuration import BACKBONES, backbone_of, read_json
from app.models.contextual import ContextualModel, Semantics
from app.models.files import locate
from app.models.kernels import Kernels
from app.models.loading import PROMPTS, SOFT_TOKENS, LoadOptions
from app.models.recording import cuda_recorder
from app.models.stages import CdeWeights, FirstStage, SecondStage
from app.models.tuning import fastest

Family = Literal["v1", "v2"]
CORPUS_SIZE = 512
MODEL_TYPE: Mapping[Family, str] = {"v1": "nomic_bert", "v2": "modernbert"}
LAYERS_KEY: Mapping[Family, str] = {"v1": "n_layer", "v2": "num_hidden_layers"}
VOCABULARY: Mapping[Family, int] = {"v1": 30528, "v2": 50368}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors under their names, float32."""

    family: Family
    backbone_config: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    corpus_size: int = CORPUS_SIZE


def random_checkpoint(family: Family, *, layers: int | None = None, corpus_size: int = CORPUS_SIZE) -> Checkpoint:
    """`layers` None: as many as the published model has."""
    config = {} if layers is None else {LAYERS_KEY[family]: layers}
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in _empty(family, config).state_dict().items()}
    tensors = {name: _random(name, shape, generator) for name, shape in shapes.items()}
    return Checkpoint(family, config, tensors, corpus_size)


def read_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """A folder's or Hub id's tensors. Raises CheckpointError, also for a model of other than the published sizes."""
    files = locate(name, revision)
    row, config = backbone_of(read_json(files.need("config.json")), files)
    family: Family = "v1" if row.family == "cde-v1" else "v2"
    with torch.device("meta"):
        published, actual = row.build({}).state_dict(), row.build(config).state_dict()
    if {k: v.shape for k, v in published.items()} != {k: v.shape for k, v in actual.items()}:
        raise CheckpointError(f"{files.source}: only models of the published sizes are measured")
    tensors = load_file(files.need("model.safetensors"))
    return Checkpoint(family, {}, {k: t.float() for k, t in tensors.items() if "input_ln" not in k})


def load_checkpoint(
    checkpoint: Checkpoint, options: LoadOptions, semantics: Semantics | None = None
) -> ContextualModel:
    """The model that a server would load from `checkpoint`; `semantics` None: as the options say.

    It works on the checkpoint's own tensors where its kernels take them as they are.
    """
    row, device, dtype = BACKBONES[MODEL_TYPE[checkpoint.family]], options.resolved_device(), options.resolved_dtype()
    weights = _empty(checkpoint.family, checkpoint.backbone_config)
    weights.load_state_dict({name: tensor.to(device) for name, tensor in checkpoint.tensors.items()}, assign=True)
    kernels: Kernels = options.kernels or fastest(dtype, device)
    frozen = options.context_attention == "frozen"
    spec = ModelSpec(
        id=checkpoint.family,
        family=row.family,
        semantics=options.semantics,
        revision="random",
        tokenizer_revision="none",
        source="random",
        hidden_size=768,
        max_length=512,
        corpus_size=checkpoint.corpus_size,
        corpus_size_is_exact=True,
        context_rows=0 if frozen else checkpoint.corpus_size + SOFT_TOKENS,
        prompts=PROMPTS,
        default_input_type=InputType.DOCUMENT,
        vocab_size=VOCABULARY[checkpoint.family],
        dtype=dtype,
        device=str(device),
        has_first_stage=True,
        is_cde=True,
        approximate=frozen,
    )
    model = ContextualModel(spec, weights, semantics or row.semantics[options.semantics], 0, kernels, frozen=frozen)
    if options.cuda_graphs and device.type == "cuda":
        model.record_forwards(cuda_recorder(device))
    return model


def random_texts(family: Family, lengths: list[int], seed: int = 0) -> list[TokenizedText]:
    """Texts of `lengths` tokens; none of them holds id 0, where `load_checkpoint` sees a prompt's end."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, VOCABULARY[family], (n,), generator=generator).tolist() for n in lengths]
    return [TokenizedText(tuple(some), InputType.DOCUMENT) for some in ids]


def _empty(family: Family, config: Mapping[str, int]) -> CdeWeights:
    build = BACKBONES[MODEL_TYPE[family]].build
    with torch.device("meta"):
        return CdeWeights(FirstStage(build(config)), SecondStage(build(config), SOFT_TOKENS))


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Scaled so that activations neither vanish nor saturate with depth."""
    normal = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.01 * normal if name.endswith("bias") else 1 + 0.1 * normal
    return 0.05 * normal if "embeddings" in name else 0.7 / shape[1] ** 0.5 * normal
