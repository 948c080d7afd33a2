"""tiktoken's cl100k_base, where this machine has it."""

import pytest

from app.settings_sources import find_vocabulary

needs_vocabulary = pytest.mark.skipif(
    not find_vocabulary(), reason="tiktoken has no cl100k_base here; `make test` fetches it"
)
