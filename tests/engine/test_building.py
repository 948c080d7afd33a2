"""First stages in the background: behind what somebody waits for, and never waited for by it."""

import asyncio
from functools import partial
from typing import cast

import numpy as np
import pytest

from app.building import ContextBuilder, Outcome, Plan
from app.domain import ANYBODY, DATASET_EMBEDDINGS, DocumentCounts, Lane, Selection, Stage
from app.registry import ServedModel
from app.tokenization import TextTokenizer
from app.tokenizer_threads import TokenizerThreads
from tests.engine.stub import StubModel, context, text
from tests.engine.test_engine import Gate, engine_of
from tests.waiting import until


async def test_a_build_in_the_background_goes_last_and_is_not_joined() -> None:
    gate = Gate()
    model = StubModel(gate)
    engine = engine_of(model)
    builder, served = (
        ContextBuilder(engine, TokenizerThreads()),
        ServedModel(("stub",), model, cast(TextTokenizer, None)),
    )
    plan = Plan("ctx_1", ["a", "b"], [text(1), text(2)], Selection(), DocumentCounts(), 2)
    running = engine.submit("stub", Stage.SECOND, [text(1)], context(1.0))
    await asyncio.to_thread(gate.entered.wait, 10)
    low = asyncio.create_task(builder.build(served, plan))
    await asyncio.to_thread(until, lambda: engine._waiting.lanes[Lane.BACKGROUND].jobs > 0)
    asked = engine.submit("stub", Stage.SECOND, [text(3)] * 5, context(1.0))
    high = asyncio.create_task(builder.build(served, plan, caller=ANYBODY))
    await asyncio.to_thread(until, lambda: engine._waiting.lanes[Lane.INTERACTIVE].jobs == 7)
    gate.open.set()
    made, joined = (await high).arrays[DATASET_EMBEDDINGS], (await low).arrays[DATASET_EMBEDDINGS]
    np.testing.assert_array_equal(made, joined)
    assert (running.result(10).shape, asked.result(10).shape) == ((1, 4), (5, 4))
    assert model.batches == [(Stage.SECOND, 1), (Stage.SECOND, 5), (Stage.FIRST, 2), (Stage.FIRST, 2)]
    engine.stop(5)


@pytest.mark.parametrize("passes", range(6))
async def test_who_asks_as_the_last_one_leaves_gets_a_build_of_their_own(passes: int) -> None:
    gate = Gate()
    model = StubModel(gate)
    engine = engine_of(model)
    builder, served = (
        ContextBuilder(engine, TokenizerThreads()),
        ServedModel(("stub",), model, cast(TextTokenizer, None)),
    )
    plan = Plan("ctx_1", ["a", "b"], [text(1), text(2)], Selection("first"), DocumentCounts(), 2)
    leaving = asyncio.create_task(builder.build(served, plan, caller=ANYBODY))
    await asyncio.to_thread(gate.entered.wait, 10)

    async def later() -> int:
        for _ in range(passes):
            await asyncio.sleep(0)
        return len((await builder.build(served, plan, caller=ANYBODY)).arrays[DATASET_EMBEDDINGS])

    leaving.cancel()
    staying = asyncio.create_task(later())
    await asyncio.wait([leaving])
    gate.open.set()
    assert await staying == 2
    engine.stop(5)


async def test_a_build_is_not_joined_from_another_namespace() -> None:
    """It would be done sooner than it can be, and its progress would stand still."""
    gate = Gate()
    model = StubModel(gate)
    engine = engine_of(model)
    builder = ContextBuilder(engine, TokenizerThreads())
    served = ServedModel(("stub",), model, cast(TextTokenizer, None))
    plan = Plan("ctx_1", ["a", "b"], [text(1), text(2)], Selection("first"), DocumentCounts(), 2)
    told: list[tuple[str, int]] = []

    def build(namespace: str) -> "asyncio.Task[Outcome]":
        progress = partial(lambda name, done: told.append((name, done)), namespace)
        return asyncio.create_task(builder.build(served, plan, progress, ANYBODY, namespace=namespace))

    builds = [build(namespace) for namespace in ("red", "blue", "red")]
    await asyncio.to_thread(gate.entered.wait, 10)
    gate.open.set()
    await asyncio.gather(*builds)
    assert sum(rows for _, rows in model.batches) == 4
    assert sorted(told) == [("blue", 2), ("red", 2)]
    engine.stop(5)
