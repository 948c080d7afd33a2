"""tiktoken's cl100k_base, where this machine has it."""

import os
import tempfile
from pathlib import Path

import pytest

FILE = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
_FOLDER = os.environ.get("TIKTOKEN_CACHE_DIR") or Path(tempfile.gettempdir()) / "data-gym-cache"

needs_vocabulary = pytest.mark.skipif(
    not (Path(_FOLDER) / FILE).exists(), reason="tiktoken has no cl100k_base here; `make test` fetches it"
)
