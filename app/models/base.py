"""The one interface all models have: a first stage that reads a corpus, a second stage that embeds texts in its light.

Shapes, here and in the rest of `app/models`:
    B  texts in a batch            S  tokens of a text, special ones included (padded: of the longest)
    C  context slots (corpus_size) D  hidden_size           H  attention heads        V  vocabulary
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from app.domain import DATASET_EMBEDDINGS, Arrays, FloatArray, ModelSpec, TokenizedText

DeviceContext = dict[str, Tensor]
"""A context's arrays on the device, ready for the forward."""


class InvalidContext(ValueError):
    """Arrays that are no context of this model."""


class TwoStageModel(Protocol):
    """A loaded model. The engine calls its stages and `load_context` from several threads, in torch.inference_mode."""

    @property
    def spec(self) -> ModelSpec: ...

    def corpus_arrays(self, documents: Sequence[TokenizedText]) -> Arrays:
        """What the first stage has to know of the whole minicorpus before it embeds one document; no forward."""

    def context_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a context's arrays with `rows` dataset embeddings."""

    def load_context(self, arrays: Arrays) -> DeviceContext:
        """Arrays to the device. Raises InvalidContext."""

    def first_stage(self, documents: Sequence[TokenizedText], corpora: Sequence[DeviceContext]) -> Tensor:
        """Dataset embeddings of B documents, (B, D) float32, each with its `corpus_arrays`, loaded."""

    def second_stage(self, texts: Sequence[TokenizedText], contexts: Sequence[DeviceContext]) -> Tensor:
        """Embeddings of B texts, each under its own context, (B, D) float32, not normalised."""


def check_arrays(model: TwoStageModel, arrays: Arrays) -> None:
    """Raises InvalidContext unless `arrays` are finite and have the names and shapes of a whole context of `model`."""
    embeddings = arrays.get(DATASET_EMBEDDINGS)
    if embeddings is None:
        raise InvalidContext(f"there is no array named {DATASET_EMBEDDINGS!r}, only {sorted(arrays)}")
    if embeddings.ndim != 2:
        raise InvalidContext(f"{DATASET_EMBEDDINGS} has {embeddings.ndim} dimensions, not 2")
    rows, spec = len(embeddings), model.spec
    if rows > spec.corpus_size or (spec.corpus_size_is_exact and rows != spec.corpus_size):
        wanted = f"exactly {spec.corpus_size}" if spec.corpus_size_is_exact else f"at most {spec.corpus_size}"
        raise InvalidContext(f"{DATASET_EMBEDDINGS} has {rows} rows; {spec.id} takes {wanted}")
    shapes = model.context_shapes(rows)
    if set(arrays) != set(shapes):
        raise InvalidContext(f"the arrays are {sorted(arrays)}; {spec.id} takes {sorted(shapes)}")
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise InvalidContext(f"{name} has shape {list(arrays[name].shape)}; {spec.id} takes {list(shape)}")
        if not np.isfinite(arrays[name]).all():
            raise InvalidContext(f"{name} holds NaN or infinite values")


def settle_cuda() -> None:
    """float32 that is no TF32, whatever the environment says; bfloat16 products summed in float32; and no cuDNN
    attention, which plans for every new shape, some tenths of a second each."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def is_out_of_memory(error: BaseException) -> bool:
    """torch says it in a class of its own on GPUs, and in words on CPUs."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
    return isinstance(error, RuntimeError) and any(some in str(error).lower() for some in words)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """To a GPU without waiting for what it still computes: by way of pinned memory, which the copy keeps alive."""
    return pinned(tensor, device).to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """What can be copied to `device` without waiting; the copy keeps it alive."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def fetch(result: Tensor) -> Callable[[], FloatArray]:
    """Starts copying (B, D) float32 from where it was computed. What this returns waits for it, not for whatever was
    launched behind it."""
    if not result.is_cuda:
        return result.numpy
    host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    host.copy_(result, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(result.device))

    def wait() -> FloatArray:
        arrived.synchronize()
        return host.numpy().copy()  # pinned memory is for those to come

    return wait


def pad(texts: Sequence[TokenizedText], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, S) int64 and mask (B, S) bool, padded on the right; a padded id never enters a result."""
    lengths = torch.tensor([len(text.input_ids) for text in texts])
    longest = int(lengths.max())
    rows = [list(text.input_ids) + [0] * (longest - len(text.input_ids)) for text in texts]
    mask = torch.arange(longest)[None, :] < lengths[:, None]
    return to_device(torch.tensor(rows), device), to_device(mask, device)


def unset_embedding(rows: int, size: int) -> nn.Embedding:
    """(rows, size), for weights that are loaded. On the meta device torch's own initialising imports torch._dynamo:
    several seconds of each start, for values that nobody sees."""
    made: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(rows, size), freeze=False)  # type: ignore[no-untyped-call]
    return made
