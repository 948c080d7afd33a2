"""A context's arrays <-> the bytes they are stored, exported and imported as. Safetensors, or .npy for one array."""

import hashlib
import io
import math
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import orjson
from safetensors import SafetensorError
from safetensors.numpy import save

from app.domain import DATASET_EMBEDDINGS, Arrays, ModelSpec, Selection, TokenizedText

MAX_HEADER_BYTES = 2**16
"""Of a safetensors file; a context holds a handful of arrays, and a header may name millions of empty ones."""
NPY_MAGIC = b"\x93NUMPY"
WEIGHTS = "weights_sha256"
"""In the metadata of an exported file: the weights that made it."""


def to_safetensors(arrays: Arrays, weights: str | None = None) -> bytes:
    """`weights`: the SHA-256 of those that made the arrays, for whoever imports them."""
    metadata = None if weights is None else {WEIGHTS: weights}
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)


def read_arrays(data: bytes, *, npy: bool) -> tuple[Arrays, str | None]:
    """A file to be imported: its arrays, and the SHA-256 of the weights that made them, where it says so. `npy`: it is
    said to be one; one that is called something else is known by its first bytes. Raises ValueError."""
    if npy or data.startswith(NPY_MAGIC):
        return from_npy(data), None
    return from_safetensors(data), _weights_named(data)


def _weights_named(data: bytes) -> str | None:
    """Of a safetensors file that can be read."""
    header = orjson.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    named: str | None = (header.get("__metadata__") or {}).get(WEIGHTS)
    return named


def from_safetensors(data: bytes) -> Arrays:
    """Float arrays of 16 bits and more, as float32. Raises ValueError."""
    from safetensors.torch import load  # noqa: PLC0415 - torch takes seconds, and commands import this module for less

    if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
        raise ValueError(f"not a safetensors file of a context: its header is over {MAX_HEADER_BYTES} bytes")
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            raise ValueError(f"tensor {name!r} is {tensor.dtype}; floats are expected")
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def to_npy(arrays: Arrays) -> bytes:
    """Raises ValueError where the context holds more than its dataset embeddings."""
    if set(arrays) != {DATASET_EMBEDDINGS}:
        raise ValueError(f"this context holds {sorted(arrays)}: .npy takes one array, safetensors takes all")
    buffer = io.BytesIO()
    np.save(buffer, arrays[DATASET_EMBEDDINGS], allow_pickle=False)
    return buffer.getvalue()


def from_npy(data: bytes) -> Arrays:
    """One array, taken as the dataset embeddings. Raises ValueError."""
    shape, dtype = _npy_header(data)
    if dtype.kind != "f":
        raise ValueError("the .npy file does not hold one array of floats")
    if math.prod(shape) * dtype.itemsize > len(data):
        raise ValueError("not a .npy file: it is shorter than its header says")
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise ValueError(f"not a .npy file: {error}") from error
    return {DATASET_EMBEDDINGS: array.astype(np.float32)}


def _npy_header(data: bytes) -> tuple[tuple[int, ...], "np.dtype[Any]"]:
    """Shape and type. Raises ValueError."""
    try:
        version = np.lib.format.read_magic(io.BytesIO(data))
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(io.BytesIO(data[8:]))
    except Exception as error:  # a header is a Python literal: what its parser raises has no end
        raise ValueError("not a .npy file: its header cannot be read") from error
    if any(type(size) is not int or not 0 <= size <= sys.maxsize for size in shape):
        raise ValueError("not a .npy file: its header names a shape that no array has")
    return shape, dtype


def id_of_documents(spec: ModelSpec, prompt: str, documents: Iterable[TokenizedText]) -> str:
    """The id of the context these documents make: weights, tokenizer, prompt, max length and token ids, in order."""
    digest = _digest(spec, "documents", spec.tokenizer_revision, prompt, str(spec.max_length))
    for document in documents:
        digest.update(np.asarray((len(document.input_ids), *document.input_ids), dtype="<i4").tobytes())
    return _id(digest)


def id_of_candidates(spec: ModelSpec, prompt: str, documents: Iterable[TokenizedText], selection: Selection) -> str:
    """The id under which a choice among these documents is begun; behind the first stage the chosen ones decide."""
    inner = id_of_documents(spec, prompt, documents)
    return _id(_digest(spec, "candidates", inner, selection.method, str(selection.seed)))


def id_of_arrays(spec: ModelSpec, arrays: Arrays) -> str:
    """The id of an imported context: weights and the arrays themselves."""
    digest = _digest(spec, "arrays")
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name], dtype="<f4").tobytes())
    return _id(digest)


def _digest(spec: ModelSpec, *parts: str) -> "hashlib._Hash":
    return hashlib.sha256("\0".join((spec.revision, spec.config_revision, *parts, "")).encode())


def _id(digest: "hashlib._Hash") -> str:
    return "ctx_" + digest.hexdigest()[:32]
