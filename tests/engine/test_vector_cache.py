"""What was computed is not computed again; what is being computed is waited for; nobody pays for another's leaving."""

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain import ANYBODY, BACKGROUND, FloatArray, Lane, Stage, TokenizedText
from app.engine.engine import Engine
from app.errors import ServerFault
from app.registry import ServedModel
from app.telemetry.metrics import VECTOR_CACHE
from app.tokenization import TextTokenizer
from app.vector_cache import OVERHEAD, VectorCache
from tests.engine.stub import StubModel, context, text
from tests.engine.test_engine import POISON, Gate, engine_of, poisoned


class Bench:
    """A stub model behind an engine and a cache."""

    def __init__(self, model: StubModel, *, max_bytes: int = 1 << 16) -> None:
        self.model = model
        self.engine: Engine = engine_of(model)
        self.cache = VectorCache(self.engine, max_bytes=max_bytes)
        self.served = ServedModel(("stub",), model, cast(TextTokenizer, None))

    @property
    def computed(self) -> int:
        return sum(rows for _, rows in self.model.batches)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(StubModel(poisoned))
    yield made
    made.engine.stop(5)


async def test_a_repeated_request_needs_no_forward_and_is_the_same_to_the_byte(bench: Bench) -> None:
    texts = [text(1), text(2, 3), text(1)]
    first = await bench.cache.embed(bench.served, texts, context(5.0))
    np.testing.assert_array_equal(first, [[1, 1, 5, 2], [5, 2, 5, 2], [1, 1, 5, 2]])
    assert bench.computed == 2, "equal texts of one request are computed once"
    batches = len(bench.model.batches)
    again = await bench.cache.embed(bench.served, texts, context(5.0))
    assert again.tobytes() == first.tobytes()
    assert len(bench.model.batches) == batches
    mixed = await bench.cache.embed(bench.served, [text(9), text(2, 3)], context(5.0))
    np.testing.assert_array_equal(mixed, [[9, 1, 5, 2], [5, 2, 5, 2]])
    assert bench.computed == 3


async def test_it_is_counted_where_vectors_came_from() -> None:
    def counts() -> list[float]:
        return [VECTOR_CACHE.labels(source)._value.get() for source in ("computed", "shared", "hit")]

    gate = Gate()
    bench = Bench(StubModel(gate))
    before = counts()
    asked = [asyncio.create_task(bench.cache.embed(bench.served, [text(7), text(i)], context(1.0))) for i in (1, 2)]
    await asyncio.to_thread(gate.entered.wait, 10)
    gate.open.set()
    await asyncio.gather(*asked)
    await bench.cache.embed(bench.served, [text(7), text(1), text(3)], context(1.0))
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [4, 1, 2]
    bench.engine.stop(5)


async def test_a_namespace_learns_nothing_from_what_another_has_computed(bench: Bench) -> None:
    """Nor from what it is computing."""
    for namespace in ("red", "blue", "red", "blue"):
        await bench.cache.embed(bench.served, [text(1)], context(5.0), namespace=namespace)
    assert bench.computed == 2
    gate = Gate()
    other = Bench(StubModel(gate))
    flying = [
        asyncio.create_task(other.cache.embed(other.served, [text(1)], context(5.0), namespace=namespace))
        for namespace in ("red", "blue", "red")
    ]
    await asyncio.to_thread(gate.entered.wait, 10)
    gate.open.set()
    await asyncio.gather(*flying)
    assert other.computed == 2
    other.engine.stop(5)


async def test_other_context_other_vector(bench: Bench) -> None:
    a = await bench.cache.embed(bench.served, [text(1)], context(5.0))
    b = await bench.cache.embed(bench.served, [text(1)], context(6.0))
    assert (a[0, 2], b[0, 2]) == (5, 6)


async def test_equal_texts_in_flight_are_computed_once() -> None:
    gate = Gate()
    bench = Bench(StubModel(gate))
    asked = [asyncio.create_task(bench.cache.embed(bench.served, [text(7), text(i)], context(1.0))) for i in range(20)]
    await asyncio.to_thread(gate.entered.wait, 10)
    gate.open.set()
    for i, task in enumerate(asked):
        np.testing.assert_array_equal(await task, [[7, 1, 1, 2], [i, 1, 1, 2]])
    assert bench.computed == 20, "19 different texts besides the one they share, which is also number 7"
    bench.engine.stop(5)


async def test_a_failure_reaches_all_who_wait_and_is_not_kept(bench: Bench) -> None:
    tasks = [bench.cache.embed(bench.served, [text(POISON)], context(1.0)) for _ in range(3)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(r) for r in results] == [ServerFault] * 3
    bench.model.before = lambda _: None
    assert (await bench.cache.embed(bench.served, [text(POISON)], context(1.0)))[0, 0] == POISON


async def test_work_is_dropped_only_when_the_last_who_waits_has_gone() -> None:
    gate = Gate()
    bench = Bench(StubModel(gate))
    running = asyncio.create_task(bench.cache.embed(bench.served, [text(1)], context(1.0)))
    await asyncio.to_thread(gate.entered.wait, 10)
    first, second = (asyncio.create_task(bench.cache.embed(bench.served, [text(2)], context(1.0))) for _ in range(2))
    alone = asyncio.create_task(bench.cache.embed(bench.served, [text(3)], context(1.0)))
    await asyncio.sleep(0)
    first.cancel()
    alone.cancel()
    await asyncio.gather(first, alone, return_exceptions=True)
    gate.open.set()
    assert (await second)[0, 0] == 2
    await running
    assert bench.computed == 2, "the text nobody waited for was not run"
    assert (await bench.cache.embed(bench.served, [text(3)], context(1.0)))[0, 0] == 3
    bench.engine.stop(5)


async def test_bytes_are_bounded() -> None:
    entry = 4 * 4 + OVERHEAD
    bench = Bench(StubModel(), max_bytes=3 * entry)
    for i in range(10):
        await bench.cache.embed(bench.served, [text(i)], context(1.0))
    await bench.cache.embed(bench.served, [text(9), text(8), text(7)], context(1.0))
    assert bench.computed == 10
    await bench.cache.embed(bench.served, [text(6)], context(1.0))
    assert bench.computed == 11
    bench.engine.stop(5)


async def test_nothing_is_kept_when_told() -> None:
    bench = Bench(StubModel(), max_bytes=0)
    for _ in range(3):
        await bench.cache.embed(bench.served, [text(1)], context(1.0))
    assert bench.computed == 3
    bench.engine.stop(5)


async def test_another_requests_bad_text_fails_that_request_alone() -> None:
    gate = Gate()

    def before(texts: Sequence[TokenizedText]) -> None:
        gate(texts)
        poisoned(texts)

    bench = Bench(StubModel(before))
    bad = asyncio.create_task(bench.cache.embed(bench.served, [text(1), text(POISON)], context(1.0)))
    await asyncio.to_thread(gate.entered.wait, 10)
    good = asyncio.create_task(bench.cache.embed(bench.served, [text(1), text(2)], context(1.0)))
    await asyncio.sleep(0)
    gate.open.set()
    with pytest.raises(ServerFault):
        await bad
    assert (await good)[0, 0] == 1
    bench.engine.stop(5)


@pytest.mark.parametrize("passes", range(4))
async def test_who_asks_as_the_last_one_leaves_is_answered(passes: int) -> None:
    gate = Gate()
    bench = Bench(StubModel(gate))
    leaving = asyncio.create_task(bench.cache.embed(bench.served, [text(7)], context(1.0)))
    await asyncio.to_thread(gate.entered.wait, 10)

    async def later() -> float:
        for _ in range(passes):
            await asyncio.sleep(0)
        return float((await bench.cache.embed(bench.served, [text(7)], context(1.0)))[0, 0])

    leaving.cancel()
    staying = asyncio.create_task(later())
    await asyncio.wait([leaving])
    gate.open.set()
    assert await staying == 7
    bench.engine.stop(5)


async def test_a_query_does_not_wait_for_the_large_request_that_has_its_text() -> None:
    gate = Gate()
    bench = Bench(StubModel(gate))
    large = asyncio.create_task(bench.cache.embed(bench.served, [text(i) for i in range(200)], context(1.0)))
    await asyncio.to_thread(gate.entered.wait, 10)
    small = asyncio.create_task(bench.cache.embed(bench.served, [text(199)], context(1.0)))
    await asyncio.sleep(0)
    assert bench.engine._waiting.lanes[Lane.INTERACTIVE].jobs == 1
    gate.open.set()
    assert (await small)[0, 0] == 199
    np.testing.assert_array_equal((await large)[:, 0], np.arange(200))
    bench.engine.stop(5)


class Device:
    """In an engine's place: texts are computed when the test says so."""

    def __init__(self) -> None:
        self.sent: list[tuple[Sequence[TokenizedText], Future[FloatArray]]] = []

    def submit(
        self, _model: str, _stage: Stage, texts: Sequence[TokenizedText], *_: object, **__: object
    ) -> "Future[FloatArray]":
        future: Future[FloatArray] = Future()
        self.sent.append((texts, future))
        return future

    @property
    def waiting(self) -> list[int]:
        return [i for i, (_, future) in enumerate(self.sent) if not future.done()]

    def compute(self, number: int) -> None:
        """The request fails as a whole where one of its texts is bad, as the engine's do."""
        texts, future = self.sent[number]
        if any(POISON in text.input_ids for text in texts):
            future.set_exception(ServerFault("a bad text"))
        else:
            future.set_result(np.array([[text.input_ids[0]] * 4 for text in texts], np.float32))


TEXTS = st.lists(st.sampled_from([1, 2, 3, POISON]), min_size=1, max_size=4)
ASK = st.tuples(st.just("ask"), TEXTS, st.booleans())
LEAVE = st.tuples(st.just("leave"), st.integers(0, 9), st.none())
COMPUTE = st.tuples(st.just("compute"), st.integers(0, 9), st.none())


@settings(max_examples=500)
@given(
    st.lists(st.tuples(st.one_of(ASK, ASK, LEAVE, COMPUTE), st.integers(0, 4)), max_size=30),
    st.sampled_from([0, 1 << 16]),
)
def test_everybody_has_the_vectors_of_his_own_texts(steps: list[tuple[Any, int]], max_bytes: int) -> None:
    """Whoever comes, leaves or sends bad texts in between: nobody fails for another's, nothing waits in vain."""

    async def run() -> None:
        device = Device()
        cache = VectorCache(cast(Engine, device), max_bytes=max_bytes)
        served = ServedModel(("stub",), StubModel(), cast(TextTokenizer, None))
        asked: list[tuple[list[int], asyncio.Task[FloatArray]]] = []
        for (what, which, background), passes in steps:
            if what == "ask":
                caller = BACKGROUND if background else ANYBODY
                embedding = cache.embed(served, [text(i) for i in which], context(1.0), caller)
                asked.append((which, asyncio.create_task(embedding)))
            elif what == "leave" and asked:
                asked[which % len(asked)][1].cancel()
            elif what == "compute" and device.waiting:
                device.compute(device.waiting[which % len(device.waiting)])
            for _ in range(passes):
                await asyncio.sleep(0)
        for _ in range(200):
            await asyncio.sleep(0)
            if device.waiting and not all(task.done() for _, task in asked):
                device.compute(device.waiting[0])
        assert all(task.done() for _, task in asked)
        assert not device.waiting
        for texts, task in asked:
            if not task.cancelled():
                assert (task.exception() is not None) is (POISON in texts)
                if task.exception() is None:
                    assert task.result()[:, 0].tolist() == texts
        assert not cache._flying

    asyncio.run(run())
