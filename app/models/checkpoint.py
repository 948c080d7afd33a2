"""A safetensors file into a module: every parameter, in the right shape, and nothing unknown left over."""

import hashlib
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from app.errors import CheckpointError

# Never used by the forward: dead parameters of older classes, non-persistent buffers, training heads.
TOLERATED = re.compile(
    r"(^|\.)(input_ln\.(weight|bias)|inv_freq|norm_factor|position_ids|sequence_dropout_null_embedding)$"
    r"|(^|\.)(cls|pooler)\."
)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def revision_of(path: Path) -> str:
    """The SHA-256 of weights. In the Hub's cache a file is named by the one it should have: CheckpointError where it
    has another, as after a download or a disk that failed."""
    found, named = sha256(path), path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", named) and found != named:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is {found[:12]}…, and {named[:12]}… on the Hub. Remove {path.resolve()}; "
            f"the next start fetches it again"
        )
    return found


# A mapping lives as long as any tensor read through it, so every layer and every embedding table gets its own.
MAPPED_TOGETHER = re.compile(r".*(layers\.\d+\.|_embeddings\.)|")


def load_weights(module: nn.Module, path: Path, *, device: torch.device, skip: Sequence[str] = ()) -> None:
    """Fills `module`, built on the meta device, from `path`, in the file's own dtype. On the CPU the weights stay
    mapped from the file, and once nothing holds a layer's any more, that layer's pages are let go. Keys that begin
    with one of `skip` are not read.

    Raises CheckpointError naming missing, misshapen and unknown keys.
    """
    wanted = dict(module.state_dict())
    problems: list[str] = []
    raw_keys: dict[str, str] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for raw in file.keys():  # noqa: SIM118 - not a dict
                key = raw.replace("_orig_mod.", "")  # torch.compile's infix
                if key in wanted:
                    raw_keys[key] = raw
                    shape = tuple(file.get_slice(raw).get_shape())
                    if shape != tuple(wanted[key].shape):
                        problems.append(f"{key} has shape {shape}, not {tuple(wanted[key].shape)}")
                elif not key.startswith(tuple(skip)) and not TOLERATED.search(key):
                    problems.append(f"{key} is unknown")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    problems += [f"{key} is missing" for key in wanted.keys() - raw_keys.keys()]
    if problems:
        shown = "; ".join(sorted(problems)[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(f"{path} does not fit this model: {shown}")
    loaded: dict[str, torch.Tensor] = {}
    for _, together in groupby(sorted(raw_keys), key=_mapped_together):
        with safe_open(path, framework="pt") as file:
            loaded |= {key: file.get_tensor(raw_keys[key]).to(device) for key in together}
    module.load_state_dict(loaded, assign=True)


def _mapped_together(key: str) -> str:
    match = MAPPED_TOGETHER.match(key)
    return match[0] if match else ""


def unset_embedding(rows: int, size: int) -> nn.Embedding:
    """(rows, size), for weights that are loaded. On the meta device torch's own initialising imports torch._dynamo:
    several seconds of each start, for values that nobody sees."""
    made: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(rows, size), freeze=False)  # type: ignore[no-untyped-call]
    return made
