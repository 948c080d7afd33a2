"""Vectors that are the same but for rounding."""

from typing import Any

import numpy as np


def assert_same(found: Any, expected: Any) -> None:
    """Arrays, or lists of numbers, equal to 1e-6: sums fall differently in another batch, and in buffers elsewhere."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
