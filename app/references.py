"""The vectors a checkpoint is known to give for the self-check's texts: files, shipped with the package or made here.

`<data_dir>/selfcheck/<key>.safetensors`: named float32 arrays; the metadata says who made them, and their SHA-256.
"""

import hashlib
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from app.domain import Arrays, ModelSpec

log = logging.getLogger(__name__)

SHIPPED = Path(str(files("app"))) / "data" / "selfcheck"


@dataclass(frozen=True, slots=True)
class Reference:
    """Vectors to be held against, and the precision they were computed in."""

    arrays: Arrays
    dtype: str
    made_by: str
    path: Path

    @property
    def is_shipped(self) -> bool:
        return self.path.parent == SHIPPED


class References:
    """Those of the package, then those of a folder. Safe for several processes: files are replaced whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, key: str, shapes: Mapping[str, tuple[int, ...]]) -> Reference | None:
        """What is known under `key`; a damaged file counts as none."""
        for path in (SHIPPED / f"{key}.safetensors", self._path(key)):
            if path.is_file():
                try:
                    return _read(path, shapes)
                except (SafetensorError, OSError, KeyError, ValueError) as error:
                    log.warning("%s is damaged and will be made anew: %s", path, error)
        return None

    def keep(self, key: str, arrays: Arrays, spec: ModelSpec) -> Path | None:
        """Writes `arrays` down for good, or says why not: a disk that takes nothing is no reason not to serve."""
        path = self._path(key)
        try:
            write(path, arrays, spec)
        except OSError as error:
            log.warning("the self-check's vectors of %s are not kept, so the next start has none: %s", spec.id, error)
            return None
        return path

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"


def write(path: Path, arrays: Arrays, spec: ModelSpec) -> None:
    """In one step: nobody ever sees half a file. Raises OSError."""
    metadata = {
        "sha256": _digest(arrays),
        "dtype": spec.dtype,
        "made_by": f"cde-server {version('cde-server')}, {spec.id} in {spec.dtype} on {spec.device}",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Reference:
    """Raises SafetensorError, OSError, KeyError, ValueError."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if metadata["sha256"] != _digest(arrays):
        raise ValueError("its checksum is of other vectors")
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}, not {shape}")
    return Reference(arrays, metadata["dtype"], metadata["made_by"], path)


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name], dtype="<f4").tobytes())
    return digest.hexdigest()
