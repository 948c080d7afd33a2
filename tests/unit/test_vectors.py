"""Vectors behind the model."""

import numpy as np

from app.vectors import overlap


def test_overlap_by_hand() -> None:
    a = np.eye(12, dtype=np.float32)
    assert overlap(a, a, 10) == 1
    assert overlap(a[:11], a[:11], 10) is None  # of ten others all are among the ten nearest, whatever they are
    line = np.array([[1, 0], [0.9, 0.436], [0, 1]] * 8, dtype=np.float32)
    assert 0 < (overlap(line, line[::-1].copy(), 10) or 0) < 1
