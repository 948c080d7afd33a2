"""What happens to vectors behind the model."""

import numpy as np

from app.domain import FloatArray


def normalized(vectors: FloatArray) -> FloatArray:
    """Rows (n, D) of unit L2 length, float32; the norm in float64. A zero row stays zero."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit: FloatArray = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    return unit
