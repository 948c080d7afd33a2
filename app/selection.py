"""Documents -> the minicorpus, in memory that does not grow with the corpus. Pure.

`random` is reservoir sampling with content-keyed priorities (bottom-k): each document's priority is a hash of the seed
and its text, and the k smallest stay. Every distinct document is equally likely to be chosen, equal documents count
once, and neither the order of the corpus nor how it was sent changes the choice.
"""

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from typing import TypeVar

from app.domain import DocumentCounts, Selection

T = TypeVar("T")

REMEMBERED = 250_000
"""Distinct documents up to which duplicates are counted exactly; beyond, the count is a lower bound."""


class Minicorpus:
    """Takes documents one by one and holds the chosen ones."""

    def __init__(self, selection: Selection, size: int) -> None:
        self._selection = selection
        self._size = size
        self._key = selection.seed.to_bytes(8, "little", signed=True)
        self._kept: list[tuple[int, str]] = []  # random: a heap of (-priority, text); first: (-arrival, text)
        self._held: set[int] = set()
        self._seen: set[int] = set()
        self._received = 0
        self._duplicates = 0

    def add(self, document: str) -> None:
        """Blank documents are counted as received and never chosen."""
        self._received += 1
        if not document.strip():
            return
        priority = self._priority(document)
        if priority in self._held or priority in self._seen:
            self._duplicates += 1
            return
        if len(self._seen) < REMEMBERED:
            self._seen.add(priority)
        rank = priority if self._selection.method == "random" else self._received
        if len(self._kept) < self._size:
            heapq.heappush(self._kept, (-rank, document))
            self._held.add(priority)
        elif rank < -self._kept[0][0]:
            _, dropped = heapq.heapreplace(self._kept, (-rank, document))
            self._held.discard(self._priority(dropped))
            self._held.add(priority)

    def documents(self) -> list[str]:
        """The chosen documents, in the order of their priority (`random`) or arrival (`first`)."""
        return [text for _, text in sorted(self._kept, key=lambda kept: -kept[0])]

    def counts(self, *, truncated: int, repeated: int) -> DocumentCounts:
        return DocumentCounts(
            received=self._received,
            chosen=len(self._kept),
            duplicates=self._duplicates,
            truncated=truncated,
            repeated=repeated,
        )

    def _priority(self, document: str) -> int:
        raw = document.encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=self._key).digest(), "big")


def select(documents: Iterable[str], selection: Selection, size: int) -> Minicorpus:
    minicorpus = Minicorpus(selection, size)
    for document in documents:
        minicorpus.add(document)
    return minicorpus


def repeated(items: Sequence[T], size: int) -> list[T]:
    """Round-robin up to `size` items."""
    return list(islice(cycle(items), size)) if items else []
