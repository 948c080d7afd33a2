"""Documents -> the minicorpus, in memory that does not grow with the corpus. Pure.

`random` is reservoir sampling with content-keyed priorities (bottom-k): each document's priority is a hash of the seed
and its text, and the k smallest stay. Every distinct document is equally likely to be chosen, equal documents count
once, and neither the order of the corpus nor how it was sent changes the choice. `diverse` takes a bounded number of
candidates in that way, and picks among them once their vectors are known (`farthest_first`).
"""

import hashlib
import heapq
import sys
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from typing import TypeVar

import numpy as np

from app.domain import DocumentCounts, FloatArray, Selection
from app.json_text import without_lone_surrogates
from app.vectors import normalized

T = TypeVar("T")

REMEMBERED = 250_000
"""Distinct documents up to which duplicates are counted exactly; beyond, the count is a lower bound."""
NUMBER_BYTES = 36
"""Of a priority, beside the table of a set that holds it."""
KEPT_BYTES = 256
"""Of a chosen document, beside its text: its place in the heap, and in the table of those held."""


class Minicorpus:
    """Takes documents one by one and holds the chosen ones."""

    def __init__(
        self, selection: Selection, size: int, candidates: int = 0, *, max_characters: int | None = None
    ) -> None:
        """`size`: documents of a context; `candidates`: how many `diverse` picks them from, at least;
        `max_characters`: no more of a document is kept, though all of it tells it apart from others."""
        self.selection = selection
        self._text_bytes = 0
        self._max_characters = max_characters
        self._size = max(size, candidates) if selection.method == "diverse" else size
        self._key = selection.seed.to_bytes(8, "little", signed=True)
        self._kept: list[tuple[int, int, str]] = []  # a heap: -priority or, for first, -arrival; priority; text
        self._held: set[int] = set()
        self._seen: set[int] = set()
        self._received = 0
        self._duplicates = 0

    def add(self, document: str) -> None:
        """Blank documents are counted as received and never chosen."""
        self._received += 1
        if not document.strip():
            return
        document = without_lone_surrogates(document)
        priority = self._priority(document)
        if priority in self._held or priority in self._seen:
            self._duplicates += 1
            return
        if len(self._seen) < REMEMBERED:
            self._seen.add(priority)
        rank = self._received if self.selection.method == "first" else priority
        kept = (-rank, priority, document[: self._max_characters])
        if len(self._kept) < self._size:
            heapq.heappush(self._kept, kept)
        elif rank < -self._kept[0][0]:
            _, dropped, text = heapq.heapreplace(self._kept, kept)
            self._held.discard(dropped)
            self._text_bytes -= sys.getsizeof(text)
        else:
            return
        self._held.add(priority)
        self._text_bytes += sys.getsizeof(kept[2])

    def add_all(self, documents: Iterable[str]) -> None:
        for document in documents:
            self.add(document)

    @property
    def memory(self) -> int:
        """Bytes, about: the texts it holds, and what it remembers of all others."""
        remembered = sys.getsizeof(self._seen) + NUMBER_BYTES * len(self._seen)
        return self._text_bytes + KEPT_BYTES * len(self._kept) + remembered

    def documents(self) -> list[str]:
        """The chosen documents, or candidates, in the order of their priority, or of arrival (`first`)."""
        return [text for _, _, text in sorted(self._kept, key=lambda kept: -kept[0])]

    def counts(self) -> DocumentCounts:
        return DocumentCounts(received=self._received, chosen=len(self._kept), duplicates=self._duplicates)

    def _priority(self, document: str) -> int:
        return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8, key=self._key).digest(), "big")


def select(
    documents: Iterable[str], selection: Selection, size: int, *, max_characters: int | None = None
) -> Minicorpus:
    minicorpus = Minicorpus(selection, size, max_characters=max_characters)
    minicorpus.add_all(documents)
    return minicorpus


def farthest_first(vectors: FloatArray, size: int) -> tuple[list[int], float]:
    """Greedy k-center on vectors (n, hidden_size) by cosine distance (Gonzalez, 1985): of unit vectors within twice the
    best radius, which is four times in cosine distance.

    Begins with the first row, then always takes the one farthest from all that are taken. Returns the taken rows, at
    most `size`, and the radius: the largest distance of a row to the nearest taken one.
    """
    unit = normalized(vectors)
    chosen, nearest = [0], 1.0 - unit @ unit[0]
    while len(chosen) < min(size, len(unit)):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, 1.0 - unit @ unit[chosen[-1]])
        nearest[chosen] = -1.0  # an equal vector is no second choice before all others
    nearest[chosen] = 0.0
    return chosen, max(0.0, float(nearest.max()))


def repeated(items: Sequence[T], size: int) -> list[T]:
    """Round-robin up to `size` items."""
    return list(islice(cycle(items), size)) if items else []
