"""tiktoken's cl100k_base, which most clients that send integers mean, back to text."""

import threading
import time
from collections.abc import Sequence

import tiktoken

AGAIN_SECONDS = 60.0
PATIENCE_SECONDS = 10.0


class VocabularyMissing(Exception):
    """tiktoken's vocabulary file is neither cached (TIKTOKEN_CACHE_DIR) nor to be fetched."""


class Cl100k:
    """Loads the vocabulary on first use and remembers for a minute that it could not.

    Special tokens decode to their names, `<|endoftext|>` for 100257; half a character to U+FFFD.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._encoding: tiktoken.Encoding | None = None
        self._failed_at = -AGAIN_SECONDS

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Raises VocabularyMissing, and ValueError for an id that is in no cl100k_base text."""
        encoding = self._loaded()
        texts = []
        for i, given in enumerate(ids):
            try:
                texts.append(encoding.decode(list(given), errors="replace"))
            except (KeyError, OverflowError) as error:
                raise ValueError(f"input[{i}] holds an id that cl100k_base does not have") from error
        return texts

    def _loaded(self) -> tiktoken.Encoding:
        # tiktoken's download has no time limit: it may hold one thread, and must not hold them all.
        if not self._lock.acquire(timeout=PATIENCE_SECONDS):
            raise VocabularyMissing
        try:
            if self._encoding is None:
                if time.monotonic() - self._failed_at < AGAIN_SECONDS:
                    raise VocabularyMissing
                try:
                    self._encoding = tiktoken.get_encoding("cl100k_base")
                except Exception as error:  # whatever the download raises: there is no vocabulary
                    self._failed_at = time.monotonic()
                    raise VocabularyMissing from error
            return self._encoding
        finally:
            self._lock.release()
