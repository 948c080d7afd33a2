"""What an error of a forward says: too little memory, a fault of this batch's, or a device that is broken."""

import torch

from app.errors import OutOfDeviceMemory, ServerFault
from app.models.device import is_out_of_memory

LOST = (
    "device-side assert triggered",
    "an illegal memory access was encountered",
    "an illegal instruction was encountered",
    "unspecified launch failure",
    "misaligned address",
    "invalid program counter",
    "hardware stack error",
    "operation not supported on global/shared address space",
    "the launch timed out and was terminated",
    "uncorrectable ecc error encountered",
    "uncorrectable nvlink error detected",
)
"""CUDA's words (cudaGetErrorString) for errors that every later call in this process gives, too. torch and Triton both
show them."""


class DeviceFailed(Exception):
    """The device failed, by no fault of a text's. A later forward may work."""


class DeviceLost(DeviceFailed):
    """This process's hold on the device is broken: no later forward can work."""


def device_fault(error: Exception) -> DeviceFailed | None:
    """What `error` says of the device; None: nothing, or a lack of memory."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return None
    told = str(error).lower()
    if "cuda" in told and any(words in told for words in LOST):
        return DeviceLost(str(error))
    return DeviceFailed(str(error)) if isinstance(error, torch.AcceleratorError) else None


def failure(error: Exception) -> Exception:
    """What the caller of a text that failed alone is told."""
    if is_out_of_memory(error):
        return OutOfDeviceMemory("There is not enough memory for this input at the moment. Please try again.")
    fault = ServerFault("The model failed on this input.")
    fault.__cause__ = error
    return fault
