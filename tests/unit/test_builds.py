"""What becomes of a version that is built while the store is away."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from app import builds
from app.building import ContextBuilder, Outcome, Plan
from app.builds import MOST, Builds
from app.context_refs import parse_ref
from app.domain import ContextStatus, Selection, Space
from app.errors import BuildsFull, StoreError
from app.registry import ServedModel
from app.stores import faults
from app.stores.base import LEASE_SECONDS, Begun
from app.stores.database import Database
from app.stores.sql import SqlContextStore
from tests.contract.test_store import COUNTS, M, arrays_of, new_context, silent_for

PLAN = Plan(f"ctx_{1:032x}", ["a", "b"], [], Selection("random", 7), COUNTS, 2)
ANY_MODEL = cast(ServedModel, None)


class Builder:
    """A first stage that is done when the test says so."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.plans: list[Plan] = []
        self.running = 0

    async def build(self, _served: ServedModel, plan: Plan, *_: Any, **__: Any) -> Outcome:
        self.plans.append(plan)
        self.running += 1
        try:
            await self.done.wait()
        finally:
            self.running -= 1
        return Outcome(PLAN.id, arrays_of(1), plan.documents, PLAN.selection, PLAN.counts)


@asynccontextmanager
async def building(
    file: Path, *, keep_documents: bool = False
) -> AsyncIterator[tuple[Builds, Builder, SqlContextStore]]:
    database = Database(f"sqlite:///{file}")
    store, builder = SqlContextStore(database), Builder()
    made = Builds(cast(ContextBuilder, builder), store, database.threads, keep_documents=keep_documents)
    try:
        yield made, builder, store
    finally:
        await made.close()
        store.close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "AWAY_SECONDS", 0.0)
    monkeypatch.setattr(builds, "TRY_SECONDS", 0.05)
    monkeypatch.setattr(StoreError, "retry_after", 0.05)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - logs, stores and counts have no event
        await asyncio.sleep(0.01)


async def test_it_is_stored_when_the_store_is_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "app.builds")
    file = tmp_path / "c.sqlite3"
    async with building(file) as (made, builder, store):
        info, begun = await made.begin(ANY_MODEL, new_context("legal", 1), PLAN)
        assert begun is Begun.OURS
        away = file.rename(tmp_path / "away")
        builder.done.set()
        await until(lambda: "waits for the store" in caplog.text)
        away.rename(file)
        completed = await made.finished(info)
        assert completed.status is ContextStatus.COMPLETED
        assert store.get(M, parse_ref("legal")) == completed
        assert store.arrays(completed.id) is not None


async def test_there_is_an_end_to_waiting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind it the version has failed, and may be created again."""
    monkeypatch.setattr(builds, "KEEP_SECONDS", 0.2)
    file = tmp_path / "c.sqlite3"
    async with building(file) as (made, builder, _):
        info, _ = await made.begin(ANY_MODEL, new_context("legal", 1), PLAN)
        away = file.rename(tmp_path / "away")
        builder.done.set()
        with pytest.raises(StoreError):
            await made.finished(info)
        away.rename(file)
        silent_for(monkeypatch, LEASE_SECONDS + 1)
        again, begun = await made.begin(ANY_MODEL, new_context("legal", 1), PLAN)
        assert (begun, again.version) == (Begun.OURS, 1)
        assert (await made.finished(again)).status is ContextStatus.COMPLETED


async def test_a_build_that_began_anew_ends_with_the_server_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before could not show for a while that it lives, and is done first."""
    async with building(tmp_path / "c.sqlite3") as (made, builder, store):
        await made.begin(ANY_MODEL, new_context("legal", 1), PLAN)
        await until(lambda: builder.running == 1)
        first, builder.done = builder.done, asyncio.Event()
        silent_for(monkeypatch, LEASE_SECONDS + 1)
        again, begun = await made.begin(ANY_MODEL, new_context("legal", 1), PLAN)
        assert (begun, again.version) == (Begun.OURS, 1)
        await until(lambda: builder.running == 2)
        first.set()
        await until(lambda: builder.running == 1)
        await until(lambda: store.get(M, parse_ref("legal")) != again)
        await asyncio.sleep(0.05)  # the first has ended
        await made.close()
        assert builder.running == 0


async def test_a_stop_does_not_wait_for_the_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "app.builds")
    file = tmp_path / "c.sqlite3"
    async with building(file) as (made, builder, _):
        await made.begin(ANY_MODEL, new_context("legal", 1), PLAN)
        file.rename(tmp_path / "away")
        builder.done.set()
        await until(lambda: "waits for the store" in caplog.text)
        await asyncio.wait_for(made.close(), 20)


async def test_a_namespace_has_so_many_under_way_and_no_more(tmp_path: Path) -> None:
    """What waits to be made takes memory for as long as it waits."""
    theirs = Space("m", "theirs")
    async with building(tmp_path / "c.sqlite3") as (made, builder, _):
        begun = [await made.begin(ANY_MODEL, new_context(f"n{i}", i), PLAN) for i in range(MOST)]
        with pytest.raises(BuildsFull) as refused:
            await made.begin(ANY_MODEL, new_context("more", 99), PLAN)
        assert refused.value.retry_after >= 1
        with pytest.raises(BuildsFull):
            made.check_room("")
        await made.begin(ANY_MODEL, new_context("more", 99, theirs), PLAN)
        builder.done.set()
        await asyncio.gather(*(made.finished(info) for info, _ in begun))
        for _ in range(MOST + 1):  # what is there takes no room
            assert (await made.begin(ANY_MODEL, new_context("n1", 1), PLAN))[1] is Begun.THERE
        assert (await made.begin(ANY_MODEL, new_context("more", 99), PLAN))[1] is Begun.OURS


async def test_many_at_once_are_no_more(tmp_path: Path) -> None:
    async with building(tmp_path / "c.sqlite3") as (made, _, store):
        asked = (made.begin(ANY_MODEL, new_context(f"n{i}", i), PLAN) for i in range(3 * MOST))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(answer, BuildsFull) for answer in answers) == 2 * MOST
        page = store.list_current("", "m", after=None, limit=100, newest_first=True)
        assert page is not None
        assert len(page.items) == MOST


async def test_one_that_could_not_be_begun_takes_no_room(tmp_path: Path) -> None:
    file = tmp_path / "c.sqlite3"
    async with building(file) as (made, _, _):
        await made.begin(ANY_MODEL, new_context("legal", 1), PLAN)
        away = file.rename(tmp_path / "away")
        for _ in range(MOST + 1):
            with pytest.raises(StoreError):
                await made.begin(ANY_MODEL, new_context("other", 2), PLAN)
        away.rename(file)
        assert (await made.begin(ANY_MODEL, new_context("other", 2), PLAN))[1] is Begun.OURS


@pytest.mark.parametrize("keep", [True, False])
async def test_documents_are_held_only_where_they_are_to_be_kept(tmp_path: Path, *, keep: bool) -> None:
    async with building(tmp_path / "c.sqlite3", keep_documents=keep) as (made, builder, store):
        info, _ = await made.begin(ANY_MODEL, new_context("legal", 1), PLAN)
        builder.done.set()
        completed = await made.finished(info)
        assert [plan.documents for plan in builder.plans] == [PLAN.documents if keep else None]
        assert store.texts(completed) == (PLAN.documents if keep else None)
