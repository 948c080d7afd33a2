"""What happens to vectors behind the model."""

import numpy as np
import numpy.typing as npt

from app.domain import FloatArray


def finished(vectors: FloatArray, dimensions: int, *, normalize: bool) -> FloatArray:
    """Cut first, normalised after: a slice of a unit vector is not one."""
    cut = np.ascontiguousarray(vectors[:, :dimensions])
    return normalized(cut) if normalize else cut


def normalized(vectors: FloatArray) -> FloatArray:
    """Rows (n, D) of unit L2 length, float32; the norm in float64. A zero row stays zero."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit: FloatArray = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    return unit


def cosines_of(a: FloatArray, b: FloatArray) -> npt.NDArray[np.float64]:
    """Cosine of each row of a with the one of b, both (n, D) of unit rows."""
    cosines: npt.NDArray[np.float64] = (a.astype(np.float64) * b).sum(axis=1)
    return cosines


def overlap(a: FloatArray, b: FloatArray, top: int) -> float | None:
    """Mean share of its `top` nearest other rows that a row has in both of a, b (n, D), unit rows; 0 to 1. None where
    there are no more than `top` others: all of them are the nearest, either way."""
    if len(a) - 1 <= top:
        return None
    both = zip(_nearest(a, top), _nearest(b, top), strict=True)
    return float(np.mean([len(mine & yours) / top for mine, yours in both]))


def _nearest(vectors: FloatArray, top: int) -> list[set[int]]:
    found = []
    for i, row in enumerate(vectors):
        scores = vectors @ row
        scores[i] = -np.inf
        found.append(set(np.argpartition(-scores, top - 1)[:top].tolist()))
    return found
