"""Texts whose vectors are known, so that a wrong one is seen in whatever answer it comes.

They are computed beforehand on the idle server. Any two of them, of two texts or of one under two contexts, are farther
apart than what rounding may explain, so a vector that is near enough to the right one is no other's.
"""

import base64
import random
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import orjson

from tests.load.server import LoadServer

Vectors = npt.NDArray[np.float32]
CHUNK, ASIDE, BLOCK = 64, 4, 256
NEAR = {True: 1e-4, False: 1e-2}
"""Euclidean distance of two computations of one unit vector, at most: in float32 or not."""


class Deck:
    """Texts with their vectors under one context."""

    def __init__(self, fields: Mapping[str, Any], near: float) -> None:
        """`fields`: of a request, which name model and context."""
        self._fields = fields
        self.texts: list[str] = []
        self.vectors: Vectors = np.empty((0, 0), np.float32)
        self._near = near
        self._free: deque[int] = deque()

    @property
    def free(self) -> int:
        return len(self._free)

    @contextmanager
    def hand(self, number: int) -> Iterator[list[int]]:
        """Texts that no other request has at the moment: equal ones in flight would be computed once."""
        taken = [self._free.popleft() for _ in range(number)]
        try:
            yield taken
        finally:
            self._free.extend(taken)

    def body(self, taken: Sequence[int]) -> dict[str, Any]:
        """Of the request for these texts."""
        return self.request([self.texts[i] for i in taken])

    def request(self, texts: Sequence[str]) -> dict[str, Any]:
        """Of one for any texts."""
        options = {"encoding_format": "base64", "input_type": "document", "truncate": "end"}
        return {"input": texts, **options, **self._fields}

    def problem(self, taken: Sequence[int], answer: Any) -> str:
        """What is wrong with an answer's JSON; empty where nothing is."""
        found = vectors_of(answer)
        if len(found) != len(taken):
            return "another number of vectors"
        if not np.isfinite(found).all():
            return "NaN or infinity"
        far = np.linalg.norm(found - self.vectors[list(taken)], axis=1).max()
        return "" if far < self._near else "wrong vectors"

    async def learn(self, client: httpx.AsyncClient, texts: Sequence[str]) -> None:
        """Takes texts in, with the vectors that the server gives now."""
        for start in range(0, len(texts), CHUNK):
            some = range(len(self.texts), len(self.texts) + len(texts[start : start + CHUNK]))
            self.texts += texts[start : start + CHUNK]
            answer = await client.post("/v1/embeddings", content=orjson.dumps(self.body(some)))
            found = vectors_of(orjson.loads(answer.raise_for_status().content))
            self.vectors = np.concatenate([self.vectors, found]) if len(self.vectors) else found
            self._free.extend(some)


class Known:
    """The decks of one server: its default context, two stored ones, and one sent along."""

    def __init__(self, server: LoadServer, *, words: tuple[int, int], seed: int = 0) -> None:
        """`words`: of a text, from and to, evenly."""
        self._words = words
        self._choose = random.Random(seed)
        self._near = NEAR[server.is_exact]
        model = server.model
        contexts: list[dict[str, Any]] = [
            {"model": model},
            {"model": f"{model}@load-a"},
            {"model": model, "context": "load-b"},
            {"model": model, "context": {"documents": documents(6, skip=40)}},
        ]
        self.decks = [Deck(fields, self._near) for fields in contexts]
        self.aside = Deck(contexts[0], self._near)
        """A few more, for who has to find one to hand at any time."""

    async def prepare(self, client: httpx.AsyncClient, texts: int) -> None:
        """Makes the contexts, and knows at least so many texts under each. Raises AssertionError where two of the
        vectors are hard to tell apart."""
        for name, skip in (("load-a", 0), ("load-b", 20)):
            created = await client.post("/v1/contexts", json={"name": name, "documents": documents(16, skip=skip)})
            created.raise_for_status()
        await self.aside.learn(client, [self.text() for _ in range(ASIDE)])
        await self.grow(client, texts)

    async def grow(self, client: httpx.AsyncClient, texts: int) -> None:
        more = [self.text() for _ in range(texts - len(self.decks[0].texts))]
        for deck in self.decks:
            await deck.learn(client, more)
        closest = _closest(np.concatenate([deck.vectors for deck in (*self.decks, self.aside)]))
        assert closest > 2 * self._near, f"two of the vectors are only {closest:.1e} apart"

    def has(self, texts: int) -> bool:
        """Whether a deck has so many to hand."""
        return any(deck.free >= texts for deck in self.decks)

    def choose(self, choose: random.Random, texts: int) -> Deck:
        """One that has so many texts to hand. Raises IndexError where none has."""
        return choose.choice([deck for deck in self.decks if deck.free >= texts])

    def text(self) -> str:
        """A new one."""
        low, high = self._words
        return " ".join(self._choose.choices(_words(), k=self._choose.randint(low, high)))


def documents(number: int, *, skip: int = 0) -> list[str]:
    """From the help pages that come with Python, one paragraph of each."""
    pages = [topics[name] for name in sorted(topics)]
    paragraphs = [max(page.split("\n\n"), key=len)[:600] for page in pages]
    return paragraphs[skip : skip + number]


def vectors_of(answer: Any) -> Vectors:
    """Of an answer's JSON, in base64: (n, D)."""
    data = answer["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    return np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data])


@cache
def _words() -> list[str]:
    """Short ones, about one token each."""
    return sorted(set(re.findall(r"\b[a-z]{3,7}\b", " ".join(topics.values()))))


def _closest(vectors: Vectors) -> float:
    """The smallest distance of any two; in double precision, or it would be lost in what is subtracted."""
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    largest = -1.0
    for start in range(0, len(exact), BLOCK):
        products = exact[start : start + BLOCK] @ exact[start:].T
        np.fill_diagonal(products, -1.0)  # of each with itself
        largest = max(largest, float(products.max()))
    return float(np.sqrt(max(0.0, 2 - 2 * largest)))
