"""A CDE checkpoint of true size, for what a text really costs; its weights are random, its tokenizer is BERT's."""

import importlib.util
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from app.bench.models import random_checkpoint
from app.models.loading import BUILTIN_PACKAGE
from tests.live import GOLDENS

TINY = GOLDENS / "v1-tiny-c512"


def write_v1(folder: Path) -> str:
    """cde-small-v1's sizes in bfloat16, 560 MB; the folder, as a model's name."""
    folder.mkdir()
    tensors = random_checkpoint("v1").tensors
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, folder / "model.safetensors")
    shutil.copy(TINY / "config.json", folder)  # without its backbone_config.json: then sizes are the published ones
    found = importlib.util.find_spec(BUILTIN_PACKAGE)
    assert found is not None
    assert found.submodule_search_locations
    shutil.copy(Path(found.submodule_search_locations[0]) / "model" / "tokenizer.json", folder)
    return str(folder)
