"""What torch has to be told about a device, and tensors on their way to it and back."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from app.domain import FloatArray, TokenizedText


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
