"""What must hold for every model, whatever its weights: batching never changes an answer, the context always does."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain import DATASET_EMBEDDINGS, FloatArray, InputType, TokenizedText
from app.models.base import DeviceContext, InvalidContext
from app.models.loading import LoadedModel
from app.models.minilm import TOKEN_WEIGHTS, MiniLMContext
from tests.compare import assert_same
from tests.models.conftest import (
    GOLDEN_NAMES,
    SEMANTICS,
    arrays_of,
    context_of,
    embed,
    golden_texts,
    load_golden,
    tokenized,
)

CLOSE = 1e-5
SHORT, LONG = "rye", " ".join(["The coast guard catalogued two conflicting weather reports: twice."] * 12)
TEXTS = ("A beekeeper in the valley questioned forty letters from 1912.", SHORT, LONG, "search_query: which map?", "")
DOCUMENTS = [
    f"{who} {did} {what}."
    for who in ("The harbour pilot", "A small bakery", "An amateur astronomer", "The violin maker")
    for did in ("repaired", "measured", "explained")
    for what in ("an invoice for roof tiles", "several comet sightings", "the tidal tables for October")
]


class Subject:
    """A model with two contexts and texts of every input type."""

    def __init__(self, loaded: LoadedModel, first: list[str], second: list[str]) -> None:
        self.loaded = loaded
        self.arrays = [arrays_of(loaded, first), arrays_of(loaded, second)]
        self.contexts = [loaded.model.load_context(arrays) for arrays in self.arrays]
        kinds = (InputType.DOCUMENT, InputType.QUERY, InputType.DOCUMENT, InputType.QUERY, InputType.NONE)
        self.texts = [tokenized(loaded, [t], kind)[0] for t, kind in zip(TEXTS, kinds, strict=True)]
        self.known: dict[tuple[int, int], FloatArray] = {}

    def alone(self, text: TokenizedText, context: DeviceContext) -> FloatArray:
        vector: FloatArray = embed(self.loaded, [text], [context])[0]
        return vector

    def expected(self, text: int, context: int) -> FloatArray:
        """One of its texts alone under one of its contexts."""
        if (text, context) not in self.known:
            self.known[text, context] = self.alone(self.texts[text], self.contexts[context])
        return self.known[text, context]

    def with_rows(self, rows: FloatArray, context: int = 0) -> DeviceContext:
        """A context with other dataset embeddings."""
        return self.loaded.model.load_context({**self.arrays[context], DATASET_EMBEDDINGS: rows})

    def rows(self, context: int = 0) -> FloatArray:
        rows: FloatArray = self.arrays[context][DATASET_EMBEDDINGS]
        return rows


GOLDEN_SUBJECTS = [f"{name} {semantics}" for name in GOLDEN_NAMES for semantics in SEMANTICS]
SUBJECTS: dict[str, Subject] = {}


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    name: str = request.param
    if name not in SUBJECTS:
        if name == "builtin":
            SUBJECTS[name] = Subject(request.getfixturevalue("builtin"), DOCUMENTS[:20], DOCUMENTS[16:31])
        else:
            golden, semantics = name.split()
            texts, loaded = golden_texts(golden), load_golden(golden, semantics)
            size = loaded.model.spec.corpus_size
            SUBJECTS[name] = Subject(loaded, texts[:size], texts[-size:])
    return SUBJECTS[name]


every_model = pytest.mark.parametrize("subject", [*GOLDEN_SUBJECTS, "builtin"], indirect=True)
every_golden = pytest.mark.parametrize("subject", GOLDEN_SUBJECTS, indirect=True)


def check_batch(subject: Subject, order: Sequence[int], contexts: Sequence[int]) -> None:
    """Texts in this order under these contexts, in one batch, get the vectors that they get alone."""
    chosen = [subject.contexts[i] for i in contexts]
    together = embed(subject.loaded, [subject.texts[i] for i in order], chosen)
    alone = [subject.expected(text, context) for text, context in zip(order, contexts, strict=True)]
    np.testing.assert_allclose(together, np.stack(alone), atol=CLOSE, rtol=0)


# --- batching ------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(
    ("order", "contexts"),
    [
        pytest.param([0, 1, 2, 3, 4], [0] * 5, id="one context"),
        pytest.param([0, 2, 0], [0] * 3, id="a b a"),
        pytest.param([0, 0, 2, 0, 4], [0, 1, 1, 0, 1], id="mixed contexts"),
        pytest.param([4, 3, 2, 1, 0], [1, 0, 1, 0, 1], id="mixed contexts, other order"),
    ],
)
def test_batching_changes_nothing(subject: Subject, order: list[int], contexts: list[int]) -> None:
    check_batch(subject, order, contexts)


@pytest.mark.parametrize("subject", [n for n in GOLDEN_SUBJECTS if "c16" in n], indirect=True)
def test_no_batch_changes_anything(subject: Subject) -> None:
    @given(st.lists(st.tuples(st.integers(0, len(TEXTS) - 1), st.integers(0, 1)), min_size=1, max_size=9))
    @settings(max_examples=15, derandomize=True, database=None)
    def check(batch: list[tuple[int, int]]) -> None:
        check_batch(subject, [text for text, _ in batch], [context for _, context in batch])

    check()


@every_model
def test_batching_the_first_stage_changes_nothing(subject: Subject) -> None:
    """Documents alone, and among others; each with the corpus it belongs to."""
    model = subject.loaded.model
    documents = tokenized(subject.loaded, [DOCUMENTS[0], LONG, SHORT, "", DOCUMENTS[0]], InputType.DOCUMENT)
    corpora = [
        model.load_context(model.corpus_arrays(tokenized(subject.loaded, corpus, InputType.DOCUMENT)))
        for corpus in (DOCUMENTS[:20], DOCUMENTS[16:31])
    ]
    own = [corpora[i] for i in (0, 0, 1, 1, 0)]
    with torch.inference_mode():
        together = model.first_stage(documents, own).numpy()
        alone = [model.first_stage([d], [c])[0].numpy() for d, c in zip(documents, own, strict=True)]
    assert together.dtype == np.float32
    assert together.shape == (5, model.spec.hidden_size)
    np.testing.assert_allclose(together, np.stack(alone), atol=CLOSE * np.abs(together).max(), rtol=0)
    assert np.abs(together[0] - together[2]).max() > 1e-2


@every_model
def test_same_input_same_bits(subject: Subject) -> None:
    text, context = subject.texts[2], subject.contexts[0]
    np.testing.assert_array_equal(subject.alone(text, context), subject.alone(text, context))


@every_model
def test_vectors_are_finite_float32_of_the_right_width(subject: Subject) -> None:
    with torch.inference_mode():
        raw = subject.loaded.model.second_stage(subject.texts, [subject.contexts[0]] * len(subject.texts))
    assert raw.dtype == torch.float32
    assert raw.shape == (len(TEXTS), subject.loaded.model.spec.hidden_size)
    assert torch.isfinite(raw).all()
    assert (raw.norm(dim=1) > 0.1).all()


# --- the context ---------------------------------------------------------------------------------------------------


@every_model
def test_another_context_other_vectors(subject: Subject) -> None:
    for text in range(4):
        one, other = (subject.expected(text, context) for context in (0, 1))
        assert np.abs(one - other).max() > 1e-4


@every_golden
def test_every_row_counts(subject: Subject) -> None:
    """Also the last one before the soft prompt, and the first, far from the text."""
    text, known = subject.texts[0], subject.expected(0, 0)
    for row in (0, len(subject.rows()) // 2, len(subject.rows()) - 1):
        rows = subject.rows().copy()
        rows[row] = -4.0 * rows[row][::-1]
        assert np.abs(subject.alone(text, subject.with_rows(rows)) - known).max() > 1e-6, row


@every_model
def test_order_of_the_rows(subject: Subject) -> None:
    """It matters where rows have positions: not in v1 as trained, not for the attention of the embedded default."""
    spec = subject.loaded.model.spec
    backwards = subject.with_rows(subject.rows()[::-1].copy())
    indifferent = (spec.semantics == "training" and spec.family == "cde-v1") or not spec.is_cde
    for text in range(3):
        moved = np.abs(subject.alone(subject.texts[text], backwards) - subject.expected(text, 0)).max()
        assert moved < CLOSE if indifferent else moved > 1e-4


@every_golden
def test_scale_of_the_rows(subject: Subject) -> None:
    """The embedding norm takes it away, except where the token type is added before: v1 as on the Hub."""
    spec = subject.loaded.model.spec
    scaled = subject.with_rows(5.0 * subject.rows())
    moved = np.abs(subject.alone(subject.texts[0], scaled) - subject.expected(0, 0)).max()
    if spec.semantics == "hub" and spec.family == "cde-v1":
        assert moved > 1e-3
    else:
        assert moved < 1e-4


@every_golden
def test_rows_beyond_the_corpus_size_and_too_few(subject: Subject) -> None:
    more = subject.with_rows(np.concatenate((subject.rows(), subject.rows(1))))
    assert_same(subject.alone(subject.texts[0], more), subject.expected(0, 0))
    with pytest.raises(InvalidContext, match="dataset_embeddings"):
        subject.with_rows(subject.rows()[:-1])


@every_golden
def test_the_semantics_differ_in_the_second_stage_alone(subject: Subject, request: pytest.FixtureRequest) -> None:
    golden = next(name for name, known in SUBJECTS.items() if known is subject).split()[0]
    other = load_golden(golden, "hub" if subject.loaded.model.spec.semantics == "training" else "training")
    documents = tokenized(other, DOCUMENTS[:4], InputType.DOCUMENT)
    with torch.inference_mode():
        ours, theirs = (m.model.first_stage(documents, [{}] * 4).numpy() for m in (subject.loaded, other))
    assert_same(ours, theirs)
    moved = embed(other, [subject.texts[0]], [other.model.load_context(subject.arrays[0])])[0]
    assert moved @ subject.expected(0, 0) < 0.99


@every_golden
def test_the_prompt_counts(subject: Subject) -> None:
    a, b, c = (tokenized(subject.loaded, ["an old map of the marsh"], kind)[0] for kind in InputType)
    vectors = [subject.alone(text, subject.contexts[0]) for text in (a, b, c)]
    assert min(np.abs(vectors[i] - vectors[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-4


# --- the embedded default's recipe ---------------------------------------------------------------------------------


class Recipe:
    """The two stages in float64, from the formulas; only the encoder's hidden states are the model's."""

    def __init__(self, loaded: LoadedModel, documents: list[str]) -> None:
        assert isinstance(loaded.model, MiniLMContext)
        self.loaded, self.encoder = loaded, loaded.model._encoder
        self.known: dict[tuple[int, ...], np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
        pieces = [self.ids(document) for document in documents]
        self.n = len(documents)
        self.frequency = {t: sum(t in known for known in pieces) for t in {t for known in pieces for t in known}}
        self.rows = [self.z(ids) for ids in pieces]

    def ids(self, text: str) -> tuple[int, ...]:
        return tokenized(self.loaded, [text], InputType.NONE)[0].input_ids

    def weight(self, token: int) -> float:
        idf = np.log((self.n + 1) / (self.frequency.get(token, 0) + 0.5))
        return float(0.3 + 0.7 * idf / np.log((self.n + 1) / 0.5))

    def z(self, ids: tuple[int, ...]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        if ids in self.known:
            return self.known[ids]
        with torch.inference_mode():
            hidden = self.encoder(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0].double().numpy()
        total = sum(self.weight(t) * h for t, h in zip(ids, hidden, strict=True))
        self.known[ids] = np.asarray(total / np.linalg.norm(total))
        return self.known[ids]

    def document(self, ids: tuple[int, ...]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        z = self.z(ids)
        others = [row for row in self.rows if row @ z <= 0.999]
        if not others:
            return z
        attention = np.exp([row @ z / 0.08 for row in others])
        attention /= attention.sum()
        pulled = z + 0.25 * sum(a * row for a, row in zip(attention, others, strict=True))
        return np.asarray(pulled / np.linalg.norm(pulled))


@pytest.mark.parametrize("size", [1, 5, 36])
def test_recipe_of_the_embedded_default(builtin: LoadedModel, size: int) -> None:
    documents = DOCUMENTS[:size]
    recipe, context = Recipe(builtin, documents), context_of(builtin, documents)
    weights = context[TOKEN_WEIGHTS].numpy()
    for token in {*recipe.frequency, 0, 29999}:
        assert weights[token] == pytest.approx(recipe.weight(token), abs=1e-6)
    assert weights[29999] == pytest.approx(1.0)  # in no context document
    assert weights.min() == weights[recipe.ids("")[0]]  # [CLS] is in all of them
    np.testing.assert_allclose(context[DATASET_EMBEDDINGS].numpy(), recipe.rows, atol=CLOSE)

    texts = [DOCUMENTS[0], "The violin maker sold a cracked copper boiler", SHORT, LONG]
    for kind in InputType:
        found = embed(builtin, tokenized(builtin, texts, kind), [context] * len(texts))
        for text, vector in zip(texts, found, strict=True):
            ids = recipe.ids(text)
            expected = recipe.document(ids) if kind is InputType.DOCUMENT else recipe.z(ids)
            np.testing.assert_allclose(vector, expected, atol=CLOSE, err_msg=f"{kind} {text}")


def test_a_document_is_not_pulled_towards_itself(builtin: LoadedModel) -> None:
    """A context of this document alone, even five times over, leaves it where it is; a neighbour pulls."""
    text = tokenized(builtin, [DOCUMENTS[0]], InputType.DOCUMENT)
    query = tokenized(builtin, [DOCUMENTS[0]], InputType.QUERY)
    itself = context_of(builtin, [DOCUMENTS[0]] * 5)
    np.testing.assert_allclose(embed(builtin, text, [itself]), embed(builtin, query, [itself]), atol=CLOSE)
    others = context_of(builtin, DOCUMENTS[:3])
    assert np.abs(embed(builtin, text, [others]) - embed(builtin, query, [others])).max() > 1e-2


@pytest.mark.parametrize(("similarity", "pulls"), [(1.0, False), (0.9992, False), (0.9988, True), (0.5, True)])
def test_what_counts_as_itself(builtin: LoadedModel, similarity: float, pulls: bool) -> None:
    """Rows more similar than 0.999 are left out."""
    text = tokenized(builtin, [DOCUMENTS[0]], InputType.DOCUMENT)
    context = context_of(builtin, DOCUMENTS[:2])
    weights = context[TOKEN_WEIGHTS].numpy()
    z, other = context[DATASET_EMBEDDINGS].numpy().astype(np.float64)
    away = other - (other @ z) * z
    row = similarity * z + np.sqrt(1 - similarity**2) * away / np.linalg.norm(away)
    near = builtin.model.load_context({TOKEN_WEIGHTS: weights, DATASET_EMBEDDINGS: row[None].astype(np.float32)})
    assert bool(np.abs(embed(builtin, text, [near])[0] - z).max() > 1e-4) == pulls


def test_attention_is_for_documents_alone(builtin: LoadedModel) -> None:
    """Queries, and texts of no type, feel the corpus in their token weights and nowhere else."""
    context = context_of(builtin, DOCUMENTS[:9])
    no_rows = builtin.model.load_context(
        {TOKEN_WEIGHTS: context[TOKEN_WEIGHTS].numpy(), DATASET_EMBEDDINGS: np.zeros((0, 384), np.float32)}
    )
    for kind in InputType:
        text = tokenized(builtin, ["several comet sightings"], kind)
        moved = np.abs(embed(builtin, text, [context]) - embed(builtin, text, [no_rows])).max()
        assert moved > 1e-2 if kind is InputType.DOCUMENT else moved == 0.0


def test_contexts_the_embedded_default_refuses(builtin: LoadedModel) -> None:
    rows = np.zeros((2, 384), np.float32)
    for arrays in ({DATASET_EMBEDDINGS: rows}, {DATASET_EMBEDDINGS: rows, TOKEN_WEIGHTS: np.ones(5, np.float32)}):
        with pytest.raises(InvalidContext, match=TOKEN_WEIGHTS):
            builtin.model.load_context(arrays)
