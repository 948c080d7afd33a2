"""What happens to a batch, a worker and the process when memory, numbers or threads fail."""

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from app.domain import Arrays, Caller, Stage, TokenizedText
from app.engine import metrics, workers
from app.engine.batching import submission_jobs
from app.engine.faults import device_fault
from app.engine.replica import GROW_AFTER
from app.engine.workers import RESTARTS, Problem, Worker
from app.errors import EngineUnavailable, NonFiniteEmbedding, ServerFault
from app.models.base import DeviceContext
from tests.engine.stub import SPEC, StubModel, context, text
from tests.engine.test_engine import Gate, engine_of, poisoned
from tests.waiting import until

DEADLY = 777
SLOW = 60
"""Seconds: each lack of memory collects the heap."""


@pytest.fixture(autouse=True, scope="module")
def _small_heap() -> None:
    """What tests before these have loaded is not walked through at every lack of memory; a server freezes its own, and
    lets go of all when it stops."""
    gc.collect()
    gc.freeze()


class Memory:
    """Room for so many texts at once."""

    def __init__(self, texts: int, error: Callable[[str], Exception] = torch.OutOfMemoryError) -> None:
        self.texts = texts
        self.error = error
        self.largest = 0

    def __call__(self, texts: Sequence[TokenizedText]) -> None:
        if len(texts) > self.texts:
            raise self.error("CUDA out of memory")
        self.largest = max(self.largest, len(texts))


def deadly(texts: Sequence[TokenizedText]) -> None:
    if any(DEADLY in t.input_ids for t in texts):
        raise SystemExit("the thread ends")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_out_of_memory_halves_the_batch_and_all_are_answered(error: Callable[[str], Exception]) -> None:
    memory = Memory(8, error)
    model = StubModel(memory)
    engine = engine_of(model)
    splits = metrics.OOM_SPLITS._value.get()
    rows = engine.submit("stub", Stage.SECOND, [text(i) for i in range(64)], context(1.0)).result(SLOW)
    assert rows[:, 0].tolist() == list(range(64))
    assert metrics.OOM_SPLITS._value.get() > splits
    assert engine.problem is None
    engine.stop(5)


def test_what_a_failed_forward_held_is_free_before_the_next() -> None:
    """Of memory, and of an error whose traceback has the frames."""
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def forward(texts: Sequence[TokenizedText]) -> None:
        alive.append(sum(one() is not None for one in held))
        hidden = torch.empty(len(texts))
        held.append(weakref.ref(hidden))
        if len(texts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = engine_of(StubModel(forward))
    rows = engine.submit("stub", Stage.SECOND, [text(i) for i in range(8)], context(1.0)).result(60)
    assert rows[:, 0].tolist() == list(range(8))
    assert len(alive) == 15
    assert set(alive) == {0}
    engine.stop(5)


def test_later_batches_are_smaller_until_it_has_gone_well_for_a_while() -> None:
    memory = Memory(8)
    model = StubModel(memory)
    engine = engine_of(model)

    def embed(texts: int) -> None:
        engine.submit("stub", Stage.SECOND, [text(i) for i in range(texts)], context(1.0)).result(SLOW)

    embed(64)
    model.batches.clear()
    embed(64)
    assert max(rows for _, rows in model.batches) == 8, "no batch is too large any more"
    memory.texts = 1000
    for _ in range(20 * GROW_AFTER):
        embed(1)
    model.batches.clear()
    embed(64)
    assert max(rows for _, rows in model.batches) == 64
    engine.stop(5)


def test_a_text_that_never_fits_fails_alone_and_may_be_tried_again() -> None:
    gate = Gate()

    def before(texts: Sequence[TokenizedText]) -> None:
        gate(texts)
        if any(len(t.input_ids) > 5 for t in texts):
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = engine_of(StubModel(before))
    engine.submit("stub", Stage.SECOND, [text(1)], context(1.0))
    assert gate.entered.wait(10)
    good = [engine.submit("stub", Stage.SECOND, [text(i)], context(1.0)) for i in range(1, 8)]
    large = engine.submit("stub", Stage.SECOND, [text(*range(9))], context(1.0))
    gate.open.set()
    with pytest.raises(EngineUnavailable, match="not enough memory"):
        large.result(SLOW)
    assert [future.result(SLOW)[0, 0] for future in good] == list(range(1, 8))
    engine.stop(5)


def test_contexts_on_the_device_make_room() -> None:
    """They are loaded again for the second try, which has the memory they took."""
    tries: list[int] = []

    def before(texts: Sequence[TokenizedText]) -> None:
        tries.append(len(texts))
        if len(tries) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model = StubModel(before)
    loads: list[int] = []
    original = model.load_context

    def counted(arrays: object) -> DeviceContext:
        loads.append(1)
        return original(arrays)  # type: ignore[arg-type]

    model.load_context = counted  # type: ignore[method-assign]
    engine = engine_of(model)
    for _ in range(3):
        engine.submit("stub", Stage.SECOND, [text(1)], context(4.0)).result(10)
    assert (tries, len(loads)) == ([1, 1, 1, 1], 2)
    engine.stop(5)


class Rounded(StubModel):
    """In low precision its vectors are not finite."""

    def __init__(self, device: str = "cpu", before: Callable[[Sequence[TokenizedText]], None] = lambda _: None) -> None:
        super().__init__(before)
        self.spec = replace(SPEC, dtype="bfloat16", device=device)

    def second_stage(self, texts: Sequence[TokenizedText], contexts: Sequence[DeviceContext]) -> Tensor:
        rows = super().second_stage(texts, contexts)
        rows[[t.input_ids[0] == 9 for t in texts]] = float("inf")
        return rows


def test_a_vector_that_is_not_finite_is_computed_again_in_float32() -> None:
    loaded: list[str] = []

    def exact(model_id: str, device: str) -> StubModel:
        loaded.append(f"{model_id} on {device}")
        return StubModel()

    engine = engine_of(Rounded(), exact=exact)
    rows = engine.submit("stub", Stage.SECOND, [text(1), text(9), text(2)], context(5.0)).result(10)
    np.testing.assert_array_equal(rows, [[1, 1, 5, 2], [9, 1, 5, 2], [2, 1, 5, 2]])
    with pytest.raises(NonFiniteEmbedding):  # a model is not loaded again and again
        engine.submit("stub", Stage.SECOND, [text(9)], context(5.0)).result(10)
    assert loaded == ["stub on cpu"]
    assert engine.problem is None
    engine.stop(5)


def test_neighbours_are_answered_while_the_float32_model_is_loaded() -> None:
    loading = threading.Event()

    def exact(_model_id: str, _device: str) -> StubModel:
        assert loading.wait(20)
        return StubModel()

    gate = Gate()
    engine = engine_of(Rounded(before=gate), exact=exact)
    first = engine.submit("stub", Stage.SECOND, [text(1)], context(5.0))
    assert gate.entered.wait(10)
    doubtful, *others = (engine.submit("stub", Stage.SECOND, [text(i)], context(5.0)) for i in (9, 10, 11))
    gate.open.set()
    assert [f.result(10)[0, 0] for f in (first, *others)] == [1, 10, 11]
    assert not doubtful.done()
    assert engine.queued_tokens == 11, "it is still held by its worker, which the watchdog sees"
    loading.set()
    assert doubtful.result(10)[0, 0] == 9
    engine.stop(5)


def test_a_text_that_was_spoilt_by_another_is_computed_alone() -> None:
    class Spoiling(Rounded):
        def second_stage(self, texts: Sequence[TokenizedText], contexts: Sequence[DeviceContext]) -> Tensor:
            rows = super().second_stage(texts, contexts)
            return rows if rows.isfinite().all() else torch.full_like(rows, torch.nan)

    def exact(_model_id: str, _device: str) -> StubModel:
        raise RuntimeError("there is no room for it")

    engine = engine_of(Spoiling(), exact=exact)
    with engine._changed:  # so that all are in one batch
        futures = [engine.submit("stub", Stage.SECOND, [text(i)], context(5.0)) for i in (9, 1, 2, 3)]
    with pytest.raises(NonFiniteEmbedding):
        futures[0].result(10)
    assert [f.result(10)[0, 0] for f in futures[1:]] == [1, 2, 3]
    engine.stop(5)


def test_a_context_that_is_not_kept_is_loaded_once_a_batch() -> None:
    loads = []

    class Counting(StubModel):
        def load_context(self, arrays: Arrays) -> DeviceContext:
            loads.append(1)
            return super().load_context(arrays)

    engine = engine_of(Counting(), cache_bytes=1)
    rows = engine.submit("stub", Stage.SECOND, [text(i) for i in range(20)], context(5.0)).result(10)
    np.testing.assert_array_equal(rows[:, 0], range(20))
    assert len(loads) == 1
    engine.stop(5)


def test_a_float32_model_computes_such_a_vector_once_more_itself() -> None:
    once: list[int] = []

    class Flaky(StubModel):
        def second_stage(self, texts: Sequence[TokenizedText], contexts: Sequence[DeviceContext]) -> Tensor:
            rows = super().second_stage(texts, contexts)
            if not once:
                once.append(1)
                rows[0] = float("nan")
            return rows

    engine = engine_of(Flaky())
    assert engine.submit("stub", Stage.SECOND, [text(3)], context(5.0)).result(10)[0, 0] == 3
    engine.stop(5)


def test_a_worker_that_dies_is_started_again_and_its_callers_are_told() -> None:
    model = StubModel(deadly)
    fatal: list[Exception] = []
    engine = engine_of(model, on_fatal=fatal.append)
    for _ in range(RESTARTS):
        with pytest.raises(EngineUnavailable, match="send the request again"):
            engine.submit("stub", Stage.SECOND, [text(DEADLY)], context(1.0)).result(10)
        assert engine.submit("stub", Stage.SECOND, [text(3)], context(1.0)).result(10)[0, 0] == 3
        until(lambda: engine.problem is None)
    assert fatal == []
    assert len(model.threads) >= 2
    held = engine.submit("stub", Stage.SECOND, [text(DEADLY)], context(1.0))
    with pytest.raises(EngineUnavailable):
        held.result(10)
    until(lambda: len(fatal) == 1)
    assert engine.problem is Problem.DOWN
    assert engine.queued_tokens == 0
    with pytest.raises(EngineUnavailable):
        engine.submit("stub", Stage.SECOND, [text(3)], context(1.0))
    engine.stop(5)


def test_deaths_of_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "RESTART_SECONDS", 0.0)
    fatal: list[Exception] = []
    engine = engine_of(StubModel(deadly), on_fatal=fatal.append)
    for _ in range(RESTARTS + 2):
        with pytest.raises(EngineUnavailable):
            engine.submit("stub", Stage.SECOND, [text(DEADLY)], context(1.0)).result(10)
    assert engine.submit("stub", Stage.SECOND, [text(3)], context(1.0)).result(10)[0, 0] == 3
    assert fatal == []
    engine.stop(5)


def test_a_worker_that_cannot_be_started_again_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fatal: list[Exception] = []
    engine = engine_of(StubModel(deadly), on_fatal=fatal.append)
    start = threading.Thread.start

    def none_left(thread: threading.Thread) -> None:
        if thread.name.startswith("device"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", none_left)
    with pytest.raises(EngineUnavailable):
        engine.submit("stub", Stage.SECOND, [text(DEADLY)], context(1.0)).result(10)
    until(lambda: len(fatal) == 1)
    assert (engine.problem, engine.queued_tokens) == (Problem.DOWN, 0)
    with pytest.raises(EngineUnavailable):
        engine.submit("stub", Stage.SECOND, [text(3)], context(1.0))
    engine.stop(5)


def test_only_what_is_held_for_too_long_is_overdue() -> None:
    engine = engine_of(StubModel())
    worker = Worker(0, engine._crew.workers[0].replica)
    batch = submission_jobs(("stub", Stage.SECOND), [text(1)], context(1.0), hidden_size=4, context_rows=0)
    worker.took(batch, 100.0)
    assert worker.overdue(5.0, 105.0) == []
    worker.gave(batch)  # in the moment before the watchdog's verdict
    assert worker.overdue(5.0, 200.0) == []
    assert not worker.stuck
    worker.took(batch, 300.0)
    assert (worker.overdue(5.0, 306.0), worker.stuck) == (batch, True)
    assert worker.overdue(5.0, 400.0) == [], "its callers were told"
    engine.stop(5)


def test_what_waits_is_failed_when_the_last_worker_is_gone() -> None:
    gate = Gate()

    def before(texts: Sequence[TokenizedText]) -> None:
        gate(texts)
        raise SystemExit

    engine = engine_of(StubModel(before), batch_tokens=1)
    futures = [engine.submit("stub", Stage.SECOND, [text(1)], context(1.0)) for _ in range(RESTARTS + 6)]
    assert gate.entered.wait(10)
    gate.open.set()
    for future in futures:
        with pytest.raises(EngineUnavailable):
            future.result(10)
    until(lambda: engine.queued_tokens == 0)
    engine.stop(5)


def test_it_is_loaded_where_its_worker_computes() -> None:
    both_compute = threading.Barrier(2)
    devices: list[str] = []

    def exact(_: str, device: str) -> StubModel:
        devices.append(device)
        return StubModel()

    def before(_: Sequence[TokenizedText]) -> None:
        both_compute.wait(20)

    models = [Rounded(device, before) for device in ("cuda:0", "cuda:1")]
    engine = engine_of(*models, exact=exact, workers=2, batch_tokens=1)
    futures = [engine.submit("stub", Stage.SECOND, [text(9)], context(5.0)) for _ in range(2)]
    assert [future.result(20)[0, 0] for future in futures] == [9, 9]
    assert sorted(devices) == ["cuda:0", "cuda:1"]
    engine.stop(5)


def test_a_failed_device_is_a_dead_worker() -> None:
    def before(texts: Sequence[TokenizedText]) -> None:
        if any(DEADLY in t.input_ids for t in texts):
            raise torch.AcceleratorError("CUDA error: invalid argument")

    engine = engine_of(StubModel(before))
    restarts = metrics.RESTARTS.labels("cpu")._value.get()
    with pytest.raises(EngineUnavailable):
        engine.submit("stub", Stage.SECOND, [text(DEADLY), text(1)], context(1.0)).result(10)
    until(lambda: metrics.RESTARTS.labels("cpu")._value.get() == restarts + 1)
    assert engine.submit("stub", Stage.SECOND, [text(3)], context(1.0)).result(10)[0, 0] == 3
    engine.stop(5)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronous"),
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
    ids=str,
)
def test_a_lost_device_ends_the_process_at_once(error: Exception) -> None:
    def before(texts: Sequence[TokenizedText]) -> None:
        raise error

    fatal: list[Exception] = []
    engine = engine_of(StubModel(before), on_fatal=fatal.append)
    with pytest.raises(EngineUnavailable, match="send the request again"):
        engine.submit("stub", Stage.SECOND, [text(1), text(2)], context(1.0)).result(10)
    (told,) = fatal
    assert "cpu is lost to this process" in str(told)
    assert engine.problem is Problem.DOWN
    with pytest.raises(EngineUnavailable):
        engine.submit("stub", Stage.SECOND, [text(3)], context(1.0))
    engine.stop(5)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of resource: shared memory"),
        ValueError("CUDA error: misaligned address, says a text"),
        RuntimeError("misaligned address"),
    ],
    ids=str,
)
def test_other_errors_lose_no_device(error: Exception) -> None:
    assert device_fault(error) is None


def test_a_stuck_forward_is_noticed_its_callers_answered_and_the_process_told() -> None:
    gate = Gate()
    fatal: list[Exception] = []
    engine = engine_of(StubModel(gate), stuck_seconds=0.2, on_fatal=fatal.append)
    stuck = engine.submit("stub", Stage.SECOND, [text(1)], context(1.0))
    assert gate.entered.wait(10)
    with pytest.raises(EngineUnavailable, match="not answered for too long"):
        stuck.result(10)
    assert engine.problem is Problem.STUCK
    assert engine.queued_tokens == 0
    until(lambda: len(fatal) == 1)
    gate.open.set()
    assert engine.submit("stub", Stage.SECOND, [text(3)], context(1.0)).result(10)[0, 0] == 3
    until(lambda: engine.problem is None)
    engine.stop(5)


def test_poison_in_one_of_many_large_requests_fails_that_one_alone() -> None:
    """And what is left of it in the queue is not computed."""
    gate = Gate()

    def before(texts: Sequence[TokenizedText]) -> None:
        gate(texts)
        poisoned(texts)

    model = StubModel(before)
    engine = engine_of(model, batch_tokens=44)
    engine.submit("stub", Stage.SECOND, [text(1)], context(1.0))
    assert gate.entered.wait(10)
    good = [
        engine.submit("stub", Stage.SECOND, [text(i)] * 20, context(1.0), caller=Caller(str(i))) for i in range(1, 5)
    ]
    bad = engine.submit("stub", Stage.SECOND, [text(666), *[text(1)] * 200], context(1.0), caller=Caller("bad"))
    gate.open.set()
    with pytest.raises(ServerFault):
        bad.result(10)
    assert [future.result(10)[0, 0] for future in good] == [1, 2, 3, 4]
    assert engine.queued_tokens == 0
    assert sum(rows for _, rows in model.batches) < 200
    engine.stop(5)


def test_deaths_among_several_workers_lose_nobody() -> None:
    model = StubModel(deadly)
    engine = engine_of(model, workers=3)
    futures = [engine.submit("stub", Stage.SECOND, [text(i)], context(float(i))) for i in range(1, 200)]
    dead = [engine.submit("stub", Stage.SECOND, [text(DEADLY)], context(0.5)) for _ in range(2)]
    outcomes = []
    for i, future in enumerate(futures, start=1):
        error = future.exception(10)
        outcomes.append(error is None)
        if error is None:
            np.testing.assert_array_equal(future.result(), [[i, 1, i, 2]])
        else:
            assert isinstance(error, EngineUnavailable)
    assert sum(outcomes) > 0
    for future in dead:
        assert isinstance(future.exception(10), EngineUnavailable)
    until(lambda: engine.queued_tokens == 0)
    engine.stop(5)
    assert threading.active_count() < 50
