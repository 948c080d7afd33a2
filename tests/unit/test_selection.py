"""The choice of documents: bounded, seeded, uniform, and blind to order and repetition."""

import sys
import tracemalloc
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Selection
from app.selection import Minicorpus, repeated, select

documents = st.lists(st.text(min_size=1), max_size=60)


@given(documents, st.integers(0, 2**31), st.randoms())
def test_random_choice_does_not_depend_on_order_or_repetition(docs: list[str], seed: int, random: object) -> None:
    shuffled = docs + docs[: len(docs) // 2]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert select(docs, Selection(seed=seed), 7).documents() == select(shuffled, Selection(seed=seed), 7).documents()


@given(documents)
def test_first_keeps_the_first_distinct_documents_in_order(docs: list[str]) -> None:
    expected = [d for d in dict.fromkeys(docs) if d.strip()][:7]
    assert select(docs, Selection("first"), 7).documents() == expected


@given(documents)
def test_counts_add_up(docs: list[str]) -> None:
    counts = select(docs, Selection(), 1000).counts()
    blank = sum(not d.strip() for d in docs)
    assert counts.received == len(docs)
    assert counts.chosen + counts.duplicates + blank == len(docs)


def test_random_choice_is_uniform() -> None:
    """Chi-square over 4,000 seeds: 50 documents, 10 chosen each time; 49 degrees of freedom, p = 0.0001 at 94.7."""
    docs = [f"document {i}" for i in range(50)]
    hits = Counter(d for seed in range(4000) for d in select(docs, Selection(seed=seed), 10).documents())
    expected = 4000 * 10 / 50
    # Choosing without replacement shrinks the variance by (1 - 10/50).
    statistic = sum((hits[d] - expected) ** 2 / (expected * 0.8) for d in docs)
    assert statistic < 94.7


def test_every_position_of_the_chosen_is_uniform_too() -> None:
    docs = [f"document {i}" for i in range(8)]
    firsts = Counter(select(docs, Selection(seed=seed), 3).documents()[0] for seed in range(4000))
    assert sum((firsts[d] - 500) ** 2 / 500 for d in docs) < 29.9  # 7 degrees of freedom, p = 0.0001


def test_other_seed_other_choice() -> None:
    docs = [str(i) for i in range(100)]
    assert select(docs, Selection(seed=1), 10).documents() != select(docs, Selection(seed=2), 10).documents()


def test_memory_is_bounded_by_the_choice() -> None:
    corpus = Minicorpus(Selection(), 4)
    for i in range(10_000):
        corpus.add(f"text {i}")
    assert len(corpus.documents()) == 4
    assert corpus.counts().received == 10_000


@given(documents, st.sampled_from(["random", "first"]), st.integers(1, 5))
def test_what_is_kept_is_cut_and_told_apart_whole(docs: list[str], method: Any, limit: int) -> None:
    whole, cut = Minicorpus(Selection(method), 7), Minicorpus(Selection(method), 7, max_characters=limit)
    for document in docs:
        whole.add(document)
        cut.add(document)
    assert cut.documents() == [document[:limit] for document in whole.documents()]
    assert cut.counts() == whole.counts()
    texts = [sum(map(sys.getsizeof, corpus.documents())) for corpus in (whole, cut)]
    assert whole.memory - cut.memory == texts[0] - texts[1]


@pytest.mark.parametrize(("documents", "size"), [(5_000, 5_000), (60_000, 10)])
def test_memory_is_what_it_takes(documents: int, size: int) -> None:
    """By the interpreter's own count: a lower one would let many uploads take more than they are allowed."""
    texts = [f"text {i}" for i in range(documents)]
    tracemalloc.start()
    try:
        corpus = Minicorpus(Selection(), size)
        for text in texts:
            corpus.add(text)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / 1.1 < corpus.memory < 2 * taken


def test_repeated_is_round_robin() -> None:
    assert repeated(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
    assert repeated([], 5) == []
