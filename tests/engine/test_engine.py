"""One device thread: isolation, halving, refusal, cancellation, draining."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from app.domain import FloatArray, Stage, TokenizedText
from app.engine import metrics, replica
from app.engine.batching import Job, submission_jobs
from app.engine.engine import Engine, EngineOptions
from app.engine.replica import Exact, Replica
from app.errors import NonFiniteEmbedding, QueueFull, ServerFault, ShuttingDown, TooManyTokens
from tests.engine.stub import StubModel, context, text

POISON, NAN = 666, 999
Fatal = Callable[[Exception], None]


def poisoned(texts: Sequence[TokenizedText]) -> None:
    if any(POISON in t.input_ids for t in texts):
        raise RuntimeError("poison")


class Gate:
    """Holds the device thread inside a batch."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, _texts: Sequence[TokenizedText]) -> None:
        self.entered.set()
        assert self.open.wait(30)


def engine_of(
    *models: StubModel, exact: Exact | None = None, on_fatal: Fatal = lambda _: None, **options: Any
) -> Engine:
    """Started; one model a device."""
    given = {"batch_tokens": 1000, "queue_tokens": 10_000, "cache_bytes": 1 << 20} | options
    made = Engine([{"stub": m} for m in models], EngineOptions(**given), exact=exact, on_fatal=on_fatal)
    made.start()
    return made


@pytest.fixture
def model() -> StubModel:
    return StubModel(poisoned)


@pytest.fixture
def engine(model: StubModel) -> Iterator[Engine]:
    made = engine_of(model)
    yield made
    made.stop(5)


def test_on_a_gpu_one_forward_is_launched_while_another_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    launching, both_wait = threading.Lock(), threading.Barrier(2)

    def alone(_texts: Sequence[TokenizedText]) -> None:
        assert launching.acquire(blocking=False)
        time.sleep(0.02)
        launching.release()

    def slow(result: Tensor) -> Callable[[], FloatArray]:
        def wait() -> FloatArray:
            both_wait.wait(20)
            return cast("FloatArray", result.numpy())

        return wait

    monkeypatch.setattr(replica, "fetch", slow)
    model = StubModel(alone)
    model.spec = dataclasses.replace(model.spec, device="cuda:0")
    engine = engine_of(model, workers=2, batch_tokens=11)
    texts = [text(i) for i in range(8)]
    rows = engine.submit("stub", Stage.SECOND, texts, context(1.0)).result(30)
    assert rows[:, 0].tolist() == list(range(8))
    assert len(model.threads) == 2
    engine.stop(5)


def test_rows_in_order_under_their_own_context(engine: Engine, model: StubModel) -> None:
    def one(i: int) -> None:
        rows = engine.submit("stub", Stage.SECOND, [text(i), text(i, i)], context(float(i))).result(10)
        np.testing.assert_array_equal(rows, [[i, 1, i, 2], [2 * i, 2, i, 2]])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(1, 200)))
    assert len(model.threads) == 1


def test_batches_mix_contexts_but_not_stages() -> None:
    gate = Gate()
    model = StubModel(gate)
    engine = engine_of(model)
    first = engine.submit("stub", Stage.SECOND, [text(1)], context(1.0))
    assert gate.entered.wait(10)
    futures = [engine.submit("stub", Stage.SECOND, [text(i)], context(float(i))) for i in range(2, 6)]
    futures.append(engine.submit("stub", Stage.FIRST, [text(9)], context(1.0)))
    gate.open.set()
    for future in (first, *futures):
        future.result(10)
    assert sorted(model.batches[1:]) == [(Stage.FIRST, 1), (Stage.SECOND, 4)]
    engine.stop(5)


def test_a_poisoned_text_fails_alone_and_the_thread_lives_on() -> None:
    gate = Gate()

    def before(texts: Sequence[TokenizedText]) -> None:
        gate(texts)
        poisoned(texts)

    engine = engine_of(StubModel(before))
    engine.submit("stub", Stage.SECOND, [text(1)], context(1.0))
    assert gate.entered.wait(10)
    good = [engine.submit("stub", Stage.SECOND, [text(i)], context(1.0)) for i in range(1, 8)]
    bad = engine.submit("stub", Stage.SECOND, [text(1), text(POISON)], context(1.0))
    gate.open.set()
    with pytest.raises(ServerFault):
        bad.result(10)
    for i, future in enumerate(good, start=1):
        assert future.result(10)[0, 0] == i
    assert engine.submit("stub", Stage.SECOND, [text(3)], context(1.0)).result(10)[0, 0] == 3
    assert engine.problem is None
    engine.stop(5)


def test_a_request_with_several_poisoned_texts_fails_once(engine: Engine) -> None:
    restarts = metrics.RESTARTS.labels("cpu")._value.get()
    with pytest.raises(ServerFault):
        engine.submit("stub", Stage.SECOND, [text(POISON), text(POISON, 1)], context(1.0)).result(10)
    assert engine.submit("stub", Stage.SECOND, [text(3)], context(1.0)).result(10)[0, 0] == 3
    assert metrics.RESTARTS.labels("cpu")._value.get() == restarts


def test_who_leaves_as_the_answer_comes_costs_others_nothing() -> None:
    """Behind the look at who is still there."""
    gone, staying = (
        submission_jobs(("stub", Stage.SECOND), [text(i)], context(1.0), hidden_size=4, context_rows=10) for i in (1, 2)
    )

    def leave(_answered: Sequence[Job]) -> None:
        gone[0].submission.future.cancel()

    device = Replica({"stub": StubModel()}, batch_tokens=1000, cache_bytes=0)
    with torch.inference_mode():
        device.run([*gone, *staying], leave)
    assert staying[0].submission.future.result(0)[0, 0] == 2


def test_health_is_the_last_batch(engine: Engine) -> None:
    with pytest.raises(ServerFault) as failed:
        engine.submit("stub", Stage.SECOND, [text(POISON)], context(1.0)).result(10)
    assert str(failed.value.__cause__) == "poison", "which is what the log shows"
    assert engine.problem is not None
    engine.submit("stub", Stage.SECOND, [text(1)], context(1.0)).result(10)
    assert engine.problem is None


def test_nan_never_leaves(engine: Engine) -> None:
    with pytest.raises(NonFiniteEmbedding):
        engine.submit("stub", Stage.SECOND, [text(1)], context(float("nan"))).result(10)
    engine.submit("stub", Stage.SECOND, [text(1)], context(1.0)).result(10)


def test_room_is_taken_for_the_whole_request_or_not_at_all() -> None:
    gate = Gate()
    engine = engine_of(StubModel(gate), queue_tokens=100)
    engine.submit("stub", Stage.SECOND, [text(1)], context(1.0))  # 11 tokens as computed
    assert gate.entered.wait(10)
    queued = engine.submit("stub", Stage.SECOND, [text(1)] * 8, context(1.0))  # 88
    before = engine.queued_tokens
    with pytest.raises(QueueFull) as refused:
        engine.submit("stub", Stage.SECOND, [text(1)] * 2, context(1.0))
    assert refused.value.retry_after > 0
    assert engine.queued_tokens == before == 99
    gate.open.set()
    assert queued.result(10).shape == (8, 4)
    assert engine.submit("stub", Stage.SECOND, [text(1)] * 9, context(1.0)).result(10).shape == (9, 4)
    engine.stop(5)


def test_many_texts_that_have_waited_for_too_long_have_every_other_batch() -> None:
    gate = Gate()
    model = StubModel(gate)
    engine = engine_of(model, batch_tokens=1, interactive_texts=1, queue_seconds=1e-9)
    first = engine.submit("stub", Stage.SECOND, [text(1)], context(1.0))
    assert gate.entered.wait(10)
    many = engine.submit("stub", Stage.FIRST, [text(2), text(2)], context(1.0))
    few = [engine.submit("stub", Stage.SECOND, [text(3)], context(1.0)) for _ in range(4)]
    gate.open.set()
    for future in (first, many, *few):
        future.result(10)
    assert [stage for stage, _ in model.batches[:4]] == [Stage.SECOND, Stage.SECOND, Stage.FIRST, Stage.SECOND]
    engine.stop(5)


def test_what_could_never_fit_is_refused_for_good() -> None:
    engine = engine_of(StubModel(), queue_tokens=100)
    with pytest.raises(TooManyTokens, match=r"110 tokens as computed, .* takes 100"):
        engine.submit("stub", Stage.SECOND, [text(1)] * 10, context(1.0))
    engine.stop(5)


def test_cancelled_work_is_not_run_and_leaves_the_queue_at_once() -> None:
    gate = Gate()
    model = StubModel(gate)
    engine = engine_of(model)
    engine.submit("stub", Stage.SECOND, [text(1)], context(1.0))
    assert gate.entered.wait(10)
    gone = engine.submit("stub", Stage.SECOND, [text(2)] * 5, context(1.0))
    assert engine.queued_tokens == 66
    before = metrics.CANCELLED.labels("queued")._value.get()
    assert gone.cancel()
    assert engine.queued_tokens == 11
    assert metrics.CANCELLED.labels("queued")._value.get() == before + 5
    gate.open.set()
    engine.submit("stub", Stage.SECOND, [text(3)], context(1.0)).result(10)
    assert [rows for _, rows in model.batches] == [1, 1]
    with pytest.raises(CancelledError):
        gone.result()
    engine.stop(5)


def test_a_running_request_that_is_cancelled_runs_no_further_batch() -> None:
    gate = Gate()
    model = StubModel(gate)
    engine = engine_of(model, batch_tokens=33)
    gone = engine.submit("stub", Stage.SECOND, [text(2)] * 90, context(1.0))
    assert gate.entered.wait(10)
    gone.cancel()
    gate.open.set()
    engine.submit("stub", Stage.SECOND, [text(3)], context(1.0)).result(10)
    assert [rows for _, rows in model.batches] == [3, 1]
    engine.stop(5)


def test_stop_answers_what_was_admitted_and_refuses_the_rest() -> None:
    gate = Gate()
    engine = engine_of(StubModel(gate))
    futures = [engine.submit("stub", Stage.SECOND, [text(i)] * 3, context(1.0)) for i in range(1, 6)]
    assert gate.entered.wait(10)
    stopper = threading.Thread(target=engine.stop, args=(20,))
    stopper.start()
    gate.open.set()
    stopper.join(20)
    assert [future.result(0)[0, 0] for future in futures] == [1, 2, 3, 4, 5]
    with pytest.raises(ShuttingDown):
        engine.submit("stub", Stage.SECOND, [text(1)], context(1.0))


def test_stop_fails_what_it_cannot_wait_for() -> None:
    gate = Gate()
    engine = engine_of(StubModel(gate))
    engine.submit("stub", Stage.SECOND, [text(1)], context(1.0))
    assert gate.entered.wait(10)
    waiting = engine.submit("stub", Stage.SECOND, [text(2)], context(1.0))
    engine.stop(0.01)
    with pytest.raises(ShuttingDown):
        waiting.result(0)
    assert engine.is_running, "the process must not wait for it"
    gate.open.set()
    engine.stop(10)
    assert not engine.is_running


def test_contexts_are_loaded_once_while_they_fit(engine: Engine, model: StubModel) -> None:
    loads: list[int] = []
    original = model.load_context
    model.load_context = lambda arrays: loads.append(1) or original(arrays)  # type: ignore[method-assign, func-returns-value]
    for _ in range(5):
        engine.submit("stub", Stage.SECOND, [text(1)], context(4.0)).result(10)
    assert len(loads) == 1


def test_contexts_that_make_room_for_others_are_counted() -> None:
    engine = engine_of(StubModel(), cache_bytes=70)  # of two contexts of 33 bytes
    before = metrics.CONTEXT_EVICTIONS._value.get()
    for mark in (1.0, 2.0, 1.0, 3.0):
        engine.submit("stub", Stage.SECOND, [text(1)], context(mark)).result(10)
    assert metrics.CONTEXT_EVICTIONS._value.get() == before + 1
    engine.stop(5)


def meeting_of(workers: int) -> Callable[[Sequence[TokenizedText]], None]:
    """Holds each worker in its first batch until so many are in theirs."""
    together, met = threading.Barrier(workers), threading.local()

    def meet(_: Sequence[TokenizedText]) -> None:
        if not hasattr(met, "once"):
            met.once = True
            together.wait(20)

    return meet


def test_workers_share_the_queue_and_answer_all() -> None:
    """Three are held in a batch at once; what is asked meanwhile is answered in order under its own context."""
    model = StubModel(meeting_of(3))
    engine = engine_of(model, workers=3)
    held = [engine.submit("stub", Stage.SECOND, [text(500)] * 90, context(1.0)) for _ in range(3)]
    asked = {i: engine.submit("stub", Stage.SECOND, [text(i), text(i, i)], context(float(i))) for i in range(1, 100)}
    for i, future in asked.items():
        np.testing.assert_array_equal(future.result(20), [[i, 1, i, 2], [2 * i, 2, i, 2]])
    for future in held:
        assert future.result(20).shape == (90, 4)
    assert len(model.threads) == 3
    assert engine.problem is None
    engine.stop(5)
    assert engine.queued_tokens == 0


def test_devices_are_expected_to_share_the_work() -> None:
    one, two = engine_of(StubModel()), engine_of(StubModel(), StubModel())
    assert two._admission.drain_rate == 2 * one._admission.drain_rate
    for engine in (one, two):
        engine.stop(5)


def test_each_device_has_its_models_and_contexts() -> None:
    """A worker a device: none computes with another one's weights or context."""
    meet = meeting_of(2)
    models = [StubModel(meet), StubModel(meet)]
    loads: list[list[int]] = [[], []]
    for mine, model in zip(loads, models, strict=True):
        original = model.load_context
        model.load_context = lambda arrays, mine=mine, original=original: mine.append(1) or original(arrays)  # type: ignore[method-assign,misc]
    engine = engine_of(*models, batch_tokens=1)
    futures = [engine.submit("stub", Stage.SECOND, [text(i)], context(1.0)) for i in range(40)]
    assert [future.result(20)[0, 0] for future in futures] == list(range(40))
    assert [len(model.threads) for model in models] == [1, 1]
    assert models[0].threads != models[1].threads
    assert [len(mine) for mine in loads] == [1, 1]
    engine.stop(5)
