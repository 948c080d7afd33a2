"""The harness in its short form, on one small server: nothing that depends on how fast that is. `make load` runs the
long forms and prints their figures."""

import math
import random
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from tests.conftest import BUILTIN
from tests.load import disconnects, overload, scheduling, soak
from tests.load.calls import Calls
from tests.load.known import Known
from tests.load.metrics import Metrics
from tests.load.report import Line, show, write
from tests.load.server import NO_CACHE, LoadServer

SETTINGS = {**NO_CACHE, "CDE__LIMITS__QUEUE_TOKENS": "3000", "CDE__CONTEXTS__CACHE_BYTES": str(2**20)}
"""The queue holds about a hundred texts, however fast the machine is."""
WORDS = (10, 30)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadServer]:
    with LoadServer(tmp_path_factory.mktemp("load"), BUILTIN, **SETTINGS) as server:
        yield server


async def nothing_waits(server: LoadServer) -> bool:
    now = await server.metrics()
    return not now("cde_queue_tokens") + now("cde_queue_jobs") + now("cde_running_tokens")


async def test_who_is_taken_is_answered_and_all_others_are_refused(loaded: LoadServer) -> None:
    plan = overload.Plan(
        seconds=1, factor=20, capacity_seconds=0.5, clients=5, known_seconds=0, words=WORDS, probes=5, after=0.5
    )
    seen = await overload.run(loaded, plan)
    assert seen.problems == {}
    assert seen.right
    assert seen.refused
    assert len(seen.right) + len(seen.refused) == len(seen.answers)
    await loaded.until_quiet()
    assert seen.lines()


async def test_few_texts_beside_many(loaded: LoadServer) -> None:
    plan = scheduling.Plan(
        seconds=1.5,
        rounds=1,
        share=0.5,
        bulk_clients=2,
        bulk_texts=(6, 12),
        capacity_seconds=0.5,
        clients=1,
        words=WORDS,
    )
    seen = await scheduling.run(loaded, plan)
    assert seen.problems == {}
    assert seen.answers > 0
    assert seen.bulk[0].bulk_rate > 0
    assert math.isnan(seen.p(seen.alone, 95)) or seen.p(seen.alone, 95) > 0
    assert await nothing_waits(loaded)
    assert seen.lines()


async def test_clients_that_go_away_leave_nothing_behind(loaded: LoadServer) -> None:
    saved = 0
    for seed in range(4):  # on a machine that is late with leaving, all of a round may be computed by then
        seen = await disconnects.run(loaded, disconnects.Plan(clients=50, at_once=25, seed=seed))
        assert seen.left.total() == 50
        assert seen.problems == {}
        assert seen.unaccounted == 0
        assert seen.files_after <= seen.files_before
        assert await nothing_waits(loaded)
        assert seen.lines()
        saved += seen.saved
        if saved:
            break
    assert saved > 0


async def test_a_short_soak(loaded: LoadServer) -> None:
    plan = soak.Plan(seconds=2, warm_up=5, every=0.2, capacity_seconds=0.5, clients=1, words=WORDS)
    seen = await soak.run(loaded, plan)
    assert seen.calls.total() > 0
    assert seen.problems == {}
    assert seen.files_after <= seen.files_before + soak.FILES
    assert math.isfinite(seen.slope)
    assert await nothing_waits(loaded)
    assert seen.lines()


async def test_every_call_of_a_soak_goes_well(loaded: LoadServer) -> None:
    known = Known(loaded, words=WORDS)
    async with loaded.client() as client:
        await known.prepare(client, 32)
        calls = Calls(loaded, client, known, random.Random(0))
        assert {what: await getattr(calls, what)() for what in soak.MIX} == dict.fromkeys(soak.MIX, "")


async def test_a_wrong_vector_does_not_go_unseen(loaded: LoadServer) -> None:
    """Of another text, of the same one under another context, and too few."""
    known = Known(loaded, words=WORDS)
    async with loaded.client() as client:
        await known.prepare(client, 4)
        for deck in known.decks:
            sent = orjson.dumps(deck.body([2, 0, 1]))
            answer = (await client.post("/v1/embeddings", content=sent)).json()
            assert deck.problem([2, 0, 1], answer) == ""
            assert deck.problem([2, 1, 0], answer) == "wrong vectors"
            assert deck.problem([2, 0], answer) == "another number of vectors"
            for other in known.decks:
                assert (other.problem([2, 0, 1], answer) == "") is (other is deck)


def test_what_passed_between_two_readings() -> None:
    before = Metrics("# TYPE s histogram\n" + "".join(f's_bucket{{le="{le}"}} 0\n' for le in ("1", "2", "+Inf")))
    buckets = {"1": 4, "2": 9, "+Inf": 10}
    after = Metrics("# TYPE s histogram\n" + "".join(f's_bucket{{le="{le}"}} {n}\n' for le, n in buckets.items()))
    assert after.quantile(before, 0.2, "s") == 0.5
    assert after.quantile(before, 0.65, "s") == 1.5
    assert after.quantile(before, 1.0, "s") == 2
    assert math.isnan(before.quantile(before, 0.5, "s"))
    assert after.since(before, "s_bucket", le="2") == 9
    assert after("nothing") == 0


def test_a_broken_promise_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [Line("a", "1"), Line("b", "2", "2", kept=True)]
    assert show("title", lines)
    assert not show("title", [*lines, Line("c", "3", "4", kept=False)])
    assert "NOT KEPT" in capsys.readouterr().out
    write(tmp_path / "figures.json", {"lines": lines})
    assert orjson.loads((tmp_path / "figures.json").read_bytes())["lines"][1]["kept"] is True
