"""What a checkpoint's `config.json` says: which backbone, and what the code around the weights computes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import CheckpointError
from app.models.contextual import Semantics
from app.models.files import CheckpointFiles, fetch_file
from app.models.modern_bert import ModernBert, ModernBertConfig
from app.models.nomic_bert import NomicBert, NomicBertConfig
from app.models.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Backbone:
    """A registry row: how to build a backbone from its `config.json`, and what the two semantics mean with it."""

    build: Callable[[Mapping[str, Any]], Transformer]
    semantics: Mapping[str, Semantics]
    family: str


BACKBONES = {  # by `model_type`
    "nomic_bert": Backbone(
        lambda raw: NomicBert(NomicBertConfig.from_dict(raw)),
        {"training": Semantics(unrotated_context=True), "hub": Semantics(context_token_type=True)},
        "cde-v1",
    ),
    "modernbert": Backbone(
        lambda raw: ModernBert(ModernBertConfig.from_dict(raw)),
        {"training": Semantics(output_residual=True, mask_instruction=True), "hub": Semantics()},
        "cde-v2",
    ),
}
# The published checkpoints carry neither their backbone's configuration nor a tokenizer; the defaults of the config
# classes are these two backbones'. nomic-bert-2048 has no tokenizer either: it uses BERT's.
KNOWN_EMBEDDERS: dict[str, Mapping[str, Any]] = {
    "nomic-ai/nomic-bert-2048": {"model_type": "nomic_bert"},
    "answerdotai/ModernBERT-base": {"model_type": "modernbert"},
}
TOKENIZER_OF = {"nomic-ai/nomic-bert-2048": "bert-base-uncased"}
ARCHITECTURES = {"DatasetTransformer": "nomic_bert", "ContextualDocumentEmbeddingTransformer": "modernbert"}


def backbone_of(config: Mapping[str, Any], files: CheckpointFiles) -> tuple[Backbone, Mapping[str, Any]]:
    """The registry row and the backbone's own configuration. Raises CheckpointError for what is not built here."""
    embedder = config.get("embedder")
    expected = {
        "transductive_tokens_per_document": 1,
        "limit_layers": None,
        "limit_layers_first_stage": None,
        "embedding_output_dim": None,
        "autoregressive_backbone": False,
        "dataset_backbone": None,
        "transductive_sequence_dropout_prob": 0.0,
        "disable_transductive_rotary_embedding": True,
        "biencoder_pooling_strategy": "mean",
        "pooling_strategy": "mean",
        "pool_ignore_contextual_tokens": True,
        "pool_ignore_instruction_tokens": True,
    }
    wrong = {k: config[k] for k, v in expected.items() if k in config and config[k] not in (v, embedder)}
    sizes = {"transductive_corpus_size": config.get("transductive_corpus_size")}
    sizes["max_seq_length"] = config.get("max_seq_length", 512)
    wrong |= {k: v for k, v in sizes.items() if not isinstance(v, int) or v < 1}
    if wrong:
        raise CheckpointError(f"{files.source}: config.json with {wrong} is not supported")
    path = files.find("backbone_config.json")
    raw = read_json(path) if path else KNOWN_EMBEDDERS.get(str(embedder))
    if raw is None:
        raise CheckpointError(
            f"{files.source}: nothing is known of its backbone {embedder!r}; "
            f"put that repository's config.json beside the weights as backbone_config.json"
        )
    architecture = (config.get("architectures") or [None])[0]
    model_type = raw.get("model_type")
    if ARCHITECTURES.get(str(architecture)) != model_type or model_type not in BACKBONES:
        raise CheckpointError(f"{files.source}: {architecture} over {model_type} is not served; known: {ARCHITECTURES}")
    return BACKBONES[str(model_type)], raw


def tokenizer_path(config: Mapping[str, Any], files: CheckpointFiles) -> Path:
    """A checkpoint's own, or its embedder's. Raises CheckpointError."""
    own = files.find("tokenizer.json")
    if own is not None:
        return own
    embedder = config.get("embedder")
    if not isinstance(embedder, str):
        raise CheckpointError(f"{files.source} has no tokenizer.json, and its config.json names no embedder to ask")
    problems = []
    for repo in dict.fromkeys((TOKENIZER_OF.get(embedder, embedder), embedder)):
        try:
            return fetch_file(repo, "tokenizer.json")
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError(f"{files.source} has no tokenizer.json, and its backbone gives none: {problems[0]}")


def read_json(path: Path) -> Mapping[str, Any]:
    """Raises CheckpointError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return raw
