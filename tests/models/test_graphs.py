"""Recorded forwards: of whatever lengths, what a shape's recording gives is what launching gives.

CUDA graphs need a GPU. Here a recording is a trace of tensor operations with everything else baked in, which is what
they are, too; the attention kernel stands as its documentation in tensor operations.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import varlen

from app.bench.models import Family, load_checkpoint, random_texts
from app.domain import DATASET_EMBEDDINGS, TokenizedText
from app.models.base import DeviceContext
from app.models.contextual import ContextualModel
from app.models.graphs import Room, batch_of, rows_of
from app.models.kernels import Kernels
from app.models.loading import LoadOptions
from app.models.recording import Replay
from tests.models.conftest import FEW, dataset, with_few_rows


def masked(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *_: int, scale: float, window_size: Any, **__: Any
) -> Tensor:
    """varlen_attn without a look at the bounds' values: sequences, places and windows as one mask."""
    rows_q, rows_k = torch.arange(len(q)), torch.arange(len(k))
    own = torch.bucketize(rows_q, cu_q[1:].long(), right=True)
    seen = torch.bucketize(rows_k, cu_k[1:].long(), right=True)
    place_q = rows_q - cu_q[own + 1] + cu_k[own + 1] - cu_k[own]  # the last query at the last key
    place_k = rows_k - cu_k[seen]
    hidden = own[:, None] != seen[None]
    if window_size[0] >= 0:
        hidden = hidden | ((place_q[:, None] - place_k[None]).abs() > window_size[0])
    scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(hidden, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).contiguous()


class Recorder:
    """Traces, and counts."""

    def __init__(self, spoil: float = 0.0) -> None:
        self.recorded = self.replayed = self.refused = 0
        self.has_memory = True
        self._spoil = spoil

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        if not self.has_memory:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        trace, result = make_fx(run)(), run()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            result.copy_(trace() + self._spoil)

        return replay, result


class Subject:
    """A model of two layers that launches, the same one with a recorder, and two contexts."""

    def __init__(self, family: Family, recorder: Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]) -> None:
        self.family = family
        self.launching, self.recording = self.loaded(Kernels()), self.loaded(Kernels(attention="varlen"))
        arrays = [{DATASET_EMBEDDINGS: dataset(seed, FEW)} for seed in (1, 2)]
        self.contexts: list[DeviceContext] = [self.launching.load_context(a) for a in arrays]
        with torch.inference_mode():
            self.recording.record_forwards(recorder)

    def loaded(self, kernels: Kernels) -> ContextualModel:
        options = LoadOptions(dtype="float32", device="cpu", kernels=kernels)
        return load_checkpoint(with_few_rows(self.family), options)

    def check(self, texts: list[TokenizedText], contexts: list[int]) -> None:
        own = [self.contexts[i] for i in contexts]
        with torch.inference_mode():
            expected = self.launching.second_stage(texts, own).numpy()
            got = self.recording.second_stage(texts, own).numpy()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", masked)
    monkeypatch.setattr("app.models.graphs.LONGEST", 64)  # a recording for each 32 tokens is made at the start


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_a_recording_fits_all_lengths_of_its_shape(family: Family) -> None:
    recorder = Recorder()
    subject = Subject(family, recorder)
    assert recorder.recorded == 2
    for n in (1, 9, 32, 33, 64):
        subject.check(random_texts(family, [n], seed=n), [n % 2])
    assert recorder.recorded == 2, "those of the start were enough"
    assert recorder.replayed == 2 * 3 + 5, "a new one is tried twice before it answers"

    pair = [(40, 9), (9, 40), (1, 63), (20, 17)]  # two texts of 33 to 64 tokens together
    for i, lengths in enumerate(pair):
        subject.check(random_texts(family, list(lengths), seed=i), [i % 2, 1])
    assert recorder.recorded == 3, "met again, a shape is recorded"
    assert recorder.replayed == 3 * 3 + 5 + len(pair) - 2


def test_any_small_batch() -> None:
    subject = Subject("v2", Recorder())

    @given(st.lists(st.tuples(st.integers(1, 70), st.integers(0, 1)), min_size=1, max_size=5), st.integers(0, 9))
    @settings(max_examples=3, derandomize=True, database=None)
    def check(batch: list[tuple[int, int]], seed: int) -> None:
        subject.check(random_texts("v2", [n for n, _ in batch], seed), [c for _, c in batch])

    check()


def test_what_is_recorded_wrongly_is_launched(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(spoil=0.1)
    subject = Subject("v1", recorder)
    assert "give other vectors" in caplog.text
    for n in (9, 9, 9):
        subject.check(random_texts("v1", [n]), [0])
    assert recorder.recorded == 1, "and not tried again"


def test_a_recording_of_lengths_is_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A kernel that looks at the bounds' values is right for what was recorded alone."""

    def looking(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int, **options: Any) -> Tensor:
        return masked(q, k, v, torch.tensor(cu_q.tolist()), torch.tensor(cu_k.tolist()), *longest, **options)

    monkeypatch.setattr(varlen, "varlen_attn", looking)
    subject = Subject("v1", Recorder())
    assert "give other vectors" in caplog.text
    subject.check(random_texts("v1", [9]), [0])


def test_what_cannot_be_recorded_is_launched(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    subject = Subject("v1", refuse)
    assert "cannot be recorded" in caplog.text
    subject.check(random_texts("v1", [9]), [0])


def test_without_memory_a_shape_is_launched_for_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that are recorded are replayed, and others may still be."""
    monkeypatch.setattr("app.models.graphs.AGAIN", 2)
    recorder = Recorder()
    subject = Subject("v1", recorder)
    recorder.has_memory = False
    pair = random_texts("v1", [9, 9])
    for refused in (0, 1, 1, 1, 2):
        subject.check(pair, [0, 1])
        assert recorder.refused == refused
    assert "no memory to record" in caplog.text
    before = recorder.replayed
    subject.check(random_texts("v1", [9]), [0])
    assert recorder.replayed == before + 1

    recorder.has_memory = True
    for recorded in (2, 2, 3):
        subject.check(pair, [0, 1])
        assert recorder.recorded == recorded


def test_a_context_that_is_in_its_place_is_not_copied_again() -> None:
    subject = Subject("v1", Recorder())
    first, second = subject.contexts
    room = Room(first)
    places = room.of(2)
    room.fill([first, second])
    for tensor, one, other in zip(places, first.values(), second.values(), strict=True):
        assert torch.equal(tensor, torch.cat((one, other)))
    for tensor in places:
        tensor.zero_()
    room.fill([first])
    assert not places.x.any(), "it was there"
    room.fill([second, second])
    assert torch.equal(room.of(1).x, second["x"])
    assert not places.x[len(second["x"]) :].any()
    room.fill([first])
    assert torch.equal(room.of(1).k, first["k"]), "another was there in between"


@given(st.lists(st.integers(1, 90), min_size=1, max_size=4))
@settings(max_examples=50, derandomize=True, database=None)
def test_a_batch_is_a_layout_of_all_its_rows(lengths: list[int]) -> None:
    texts = random_texts("v1", lengths)
    rows, context_rows = rows_of(texts), 7
    batch = batch_of(texts, [1] * len(texts), context_rows, rows)
    total = context_rows * len(texts) + rows
    assert sorted(batch.order.tolist()) == list(range(total)), "each row once"
    texts_in_order = batch.order[batch.wanted_rows] - context_rows * len(texts)
    assert texts_in_order.tolist() == list(range(rows))
    assert batch.bounds.diff().tolist() == [context_rows + n for n in lengths] + [rows - sum(lengths)]
    assert batch.wanted_bounds.diff().tolist() == [*lengths, rows - sum(lengths)]
    assert (batch.positions[batch.bounds[:-2].long()] == 0).all()
    counted = (batch.shares > 0).sum(dim=1).tolist()
    assert counted == [n - 1 for n in lengths]
    np.testing.assert_allclose(batch.shares.sum(dim=1), [float(n > 1) for n in lengths], rtol=1e-5)
