"""The runner over a real database: batches side by side, and an end to waiting when a batch is cancelled."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from app.batches import work as batch_work
from app.batches.answering import ATTEMPTS
from app.batches.runner import AT_ONCE, BatchRunner
from app.batches.window import WINDOW_BYTES
from app.batches.work import DEADLY, BatchWork
from app.errors import OutOfDeviceMemory, QueueFull
from app.stores.batch_base import BatchInfo, BatchStatus, Claim
from app.stores.batch_tables import batches, file_chunks
from app.stores.batches import SqlBatchStore
from app.stores.database import Database
from app.stores.files import SqlFileStore


class Bench:
    """`add` puts in a batch whose lines all have one body."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.store, self.files = SqlBatchStore(database), SqlFileStore(database)
        self.wake: Callable[[], None] = lambda: None

    def add(
        self, name: str, lines: int, *, at: Mapping[int, dict[str, Any]] | None = None, namespace: str = "", **body: Any
    ) -> None:
        """`at`: lines with another one."""
        bodies = [(at or {}).get(i, body) for i in range(lines)]
        request = {"method": "POST", "url": "/v1/embeddings"}
        told = (json.dumps({"custom_id": str(i), "body": b} | request) + "\n" for i, b in enumerate(bodies))
        content = "".join(told).encode()
        file = self.files.add(namespace, name, "batch", [content])
        self.store.add(BatchInfo(name, namespace, "/v1/embeddings", file.id, "24h", int(time.time())))
        self.wake()

    async def until(self, name: str, wanted: Callable[[BatchInfo], bool], namespace: str = "") -> BatchInfo:
        async with asyncio.timeout(20):
            while True:
                info = await asyncio.to_thread(self.store.get, namespace, name)
                assert info is not None
                if wanted(info):
                    return info
                await asyncio.sleep(0.01)


class Answers:
    """As `call` says."""

    def __init__(self, call: Callable[[Any, str], Awaitable[tuple[int, bytes]]]) -> None:
        self._call = call

    async def __call__(self, body: Any, namespace: str) -> tuple[int, bytes]:
        return await self._call(body, namespace)

    def given_up(self, error: Exception) -> tuple[int, bytes]:
        return 503, json.dumps({"given_up": str(error)}).encode()


@asynccontextmanager
async def running(
    path: Path,
    answer: Callable[[Any, str], Awaitable[tuple[int, bytes]]],
    max_line_bytes: int = 10_000,
    *,
    failed: bool = False,
) -> AsyncIterator[Bench]:
    database = Database(f"sqlite:///{path / 'b.sqlite3'}")
    bench = Bench(database)
    work = BatchWork(
        bench.store, bench.files, database.threads, Answers(answer), max_lines=1000, max_line_bytes=max_line_bytes
    )
    runner = BatchRunner(bench.store, bench.files, database.threads, work)
    bench.wake = runner.wake
    runner.start()
    try:
        yield bench
    finally:
        await runner.close(failed=failed)
        database.close()
        # What was being written is, and nothing comes behind it: what ran here is as good as dead.
        await asyncio.to_thread(database.threads._writers.shutdown)


async def test_a_small_batch_does_not_wait_for_a_large_one(tmp_path: Path) -> None:
    held = asyncio.Event()

    async def answer(body: Any, _namespace: str) -> tuple[int, bytes]:
        if "large" in body:
            await held.wait()
        return 200, b"{}"

    async with running(tmp_path, answer) as bench:
        bench.add("large", 40, large=True)
        await bench.until("large", lambda info: info.status is BatchStatus.IN_PROGRESS)
        bench.add("small", 3)
        small = await bench.until("small", lambda info: info.status is BatchStatus.COMPLETED)
        assert small.completed == 3
        held.set()
        large = await bench.until("large", lambda info: info.status is BatchStatus.COMPLETED)
        assert large.completed == 40


async def test_a_batch_that_waits_can_be_cancelled(tmp_path: Path) -> None:
    """One that runs and finds no room, and one that has no turn."""

    async def answer(body: Any, _namespace: str) -> tuple[int, bytes]:
        if body.get("first"):
            return 200, b"{}"
        raise QueueFull("Busy.", retry_after=60)

    async with running(tmp_path, answer) as bench:
        for i in range(AT_ONCE):
            bench.add(f"stuck {i}", 40)
            await bench.until(f"stuck {i}", lambda info: info.status is BatchStatus.IN_PROGRESS)
        bench.add("behind", 1, first=True)
        behind = await asyncio.to_thread(bench.store.cancel, "", "behind")
        assert behind is not None
        assert behind.status is BatchStatus.CANCELLED
        await asyncio.to_thread(bench.store.cancel, "", "stuck 0")
        stuck = await bench.until("stuck 0", lambda info: info.status is BatchStatus.CANCELLED)
        assert (stuck.completed, stuck.output_file_id) == (0, None)
        bench.add("next", 1, first=True)
        await bench.until("next", lambda info: info.status is BatchStatus.COMPLETED)


async def test_a_damaged_input_ends_its_batch(tmp_path: Path) -> None:
    """Nobody waits for what will not come; the answers that are there can be had."""

    hurt = asyncio.Event()

    async def answer(_body: Any, _namespace: str) -> tuple[int, bytes]:
        await hurt.wait()
        return 200, b"{}"

    database = Database(f"sqlite:///{tmp_path / 'b.sqlite3'}")
    async with running(tmp_path, answer) as bench:
        bench.add("hurt", 300, input="x" * 4000)
        await bench.until("hurt", lambda info: info.status is BatchStatus.IN_PROGRESS)
        second = update(file_chunks).where(file_chunks.c.number == 1).values(data=b"z")
        await asyncio.to_thread(database.write, lambda connection: connection.execute(second))
        hurt.set()
        failed = await bench.until("hurt", lambda info: info.status is BatchStatus.FAILED)
        assert [problem.code for problem in failed.problems] == ["damaged_input_file"]
        assert failed.completed > 0
        assert failed.output_file_id is not None
    database.close()


async def test_few_large_lines_are_in_memory_at_once(tmp_path: Path) -> None:
    waiting, most = 0, 0

    async def answer(_body: Any, _namespace: str) -> tuple[int, bytes]:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await asyncio.sleep(0)
        waiting -= 1
        return 200, b"{}"

    async with running(tmp_path, answer, max_line_bytes=WINDOW_BYTES) as bench:
        bench.add("large", 7, text="x" * (WINDOW_BYTES // 2))
        done = await bench.until("large", lambda info: info.status is BatchStatus.COMPLETED)
    assert (done.completed, most) == (7, 2)


async def test_a_line_that_is_cancelled_by_nobody_ends_no_runner(tmp_path: Path) -> None:
    cancelled: set[int] = set()

    async def answer(body: Any, _namespace: str) -> tuple[int, bytes]:
        if "odd" in body and body["odd"] not in cancelled:
            cancelled.add(body["odd"])
            raise asyncio.CancelledError
        return 200, b"{}"

    async with running(tmp_path, answer) as bench:
        for i in range(AT_ONCE):
            bench.add(f"odd-{i}", 1, odd=i)
        for i in range(AT_ONCE):
            await bench.until(f"odd-{i}", lambda info: info.status is BatchStatus.COMPLETED)
    assert len(cancelled) == AT_ONCE


async def test_a_line_that_fits_on_no_device_is_answered_so_and_the_others_as_they_are(tmp_path: Path) -> None:
    tried = []

    async def answer(body: Any, _namespace: str) -> tuple[int, bytes]:
        if "huge" in body:
            tried.append(1)
            raise OutOfDeviceMemory("There is not enough memory.", retry_after=0.01)
        return 200, b"{}"

    async with running(tmp_path, answer) as bench:
        for i in range(AT_ONCE):
            bench.add(f"huge-{i}", 1, huge=True)
        bench.add("healthy", 2)
        healthy = await bench.until("healthy", lambda info: info.status is BatchStatus.COMPLETED)
        assert (healthy.completed, healthy.failed) == (2, 0)
        for i in range(AT_ONCE):
            huge = await bench.until(f"huge-{i}", lambda info: info.status is BatchStatus.COMPLETED)
            assert (huge.completed, huge.failed) == (0, 1)
    assert len(tried) == AT_ONCE * ATTEMPTS


async def test_a_line_that_is_over_a_limit_set_since_ends_the_batch(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def answer(_body: Any, _namespace: str) -> tuple[int, bytes]:
        await release.wait()
        return 200, b"{}"

    async with running(tmp_path, answer) as bench:
        bench.add("long", 2, text="x" * 200)
        await bench.until("long", lambda info: info.status is BatchStatus.IN_PROGRESS)
    async with running(tmp_path, answer, max_line_bytes=100) as bench:
        ended = await bench.until("long", lambda info: info.status is BatchStatus.FAILED)
        assert [problem.code for problem in ended.problems] == ["damaged_input_file"]
        assert "Line 1 is longer" in ended.problems[0].message


async def test_lines_that_are_gone_are_told(tmp_path: Path) -> None:
    held = asyncio.Event()

    async def answer(_body: Any, _namespace: str) -> tuple[int, bytes]:
        await held.wait()
        return 200, b"{}"

    async with running(tmp_path, answer) as bench:
        bench.add("cut", 40)
        info = await bench.until("cut", lambda info: info.status is BatchStatus.IN_PROGRESS)
        more = update(batches).where(batches.c.id == info.id).values(total=50)
        await asyncio.to_thread(bench.database.write, lambda connection: connection.execute(more))
        held.set()
        ended = await bench.until("cut", lambda info: info.status is BatchStatus.FAILED)
        assert (ended.completed, ended.output_file_id is not None) == (40, True)
        assert "10 of its 50 lines" in ended.problems[0].message


async def test_a_line_that_takes_long_keeps_no_other_answer_from_being_stored(tmp_path: Path) -> None:
    held = asyncio.Event()

    async def answer(body: Any, _namespace: str) -> tuple[int, bytes]:
        if "slow" in body:
            await held.wait()
        return 200, b"{}"

    async with running(tmp_path, answer) as bench:
        bench.add("mixed", 200, at={0: {"slow": True}})
        info = await bench.until("mixed", lambda info: info.completed == 199)
        assert info.status is BatchStatus.IN_PROGRESS
        held.set()
        await bench.until("mixed", lambda info: info.status is BatchStatus.COMPLETED)


async def test_a_line_that_ends_the_process_is_found_and_given_up(tmp_path: Path) -> None:
    """Its process is killed whenever it is computed. Batches beside it, and its other lines, are none the worse."""
    killed = asyncio.Event()
    deaths = 0

    async def answer(body: Any, _namespace: str) -> tuple[int, bytes]:
        if "deadly" in body:
            killed.set()
        if killed.is_set():
            await asyncio.Event().wait()
        return 200, b"{}"

    database = Database(f"sqlite:///{tmp_path / 'b.sqlite3'}")
    over = update(batches).values(beat_at=0.0)
    while deaths <= DEADLY + 2:
        killed.clear()
        async with running(tmp_path, answer, failed=True) as bench:
            if deaths == 0:
                bench.add("deadly", 150, at={70: {"deadly": True}})
                bench.add("healthy", 100)
            done = asyncio.create_task(bench.until("deadly", lambda info: info.status is BatchStatus.COMPLETED))
            dead = asyncio.create_task(killed.wait())
            await asyncio.wait([done, dead], return_when=asyncio.FIRST_COMPLETED)
            done.cancel()
            dead.cancel()
            if not killed.is_set():
                await bench.until("healthy", lambda info: info.status is BatchStatus.COMPLETED)
                break
        deaths += 1
        await asyncio.to_thread(database.write, lambda connection: connection.execute(over))
    store, files = SqlBatchStore(database), SqlFileStore(database)
    deadly, healthy = store.get("", "deadly"), store.get("", "healthy")
    assert deadly is not None
    assert healthy is not None
    assert deaths == 1 + DEADLY
    assert (deadly.completed, deadly.failed) == (149, 1)
    assert (healthy.completed, healthy.failed) == (100, 0)
    (told,) = b"".join(files.chunks(deadly.error_file_id or "")).splitlines()
    line = json.loads(told)
    assert line["custom_id"] == "70"
    assert "ended unexpectedly" in line["response"]["body"]["given_up"]
    database.close()


async def test_a_namespace_with_long_batches_keeps_no_other_one_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of four gives its place to the second namespace at once, and to a fifth, sixth in their turn; it goes on
    afterwards, and no line is answered twice."""
    monkeypatch.setattr(batch_work, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(batch_work, "TURN_SECONDS", 0.3)
    seen: Counter[str] = Counter()
    small_done = asyncio.Event()

    async def answer(body: Any, _namespace: str) -> tuple[int, bytes]:
        if not small_done.is_set():
            await asyncio.sleep(0.3)
        seen[json.dumps(body)] += 1
        return 200, b"{}"

    async with running(tmp_path, answer) as bench:
        for i in range(AT_ONCE + 2):
            bench.add(f"long-{i}", 800, long=i, namespace="tenant")
        for i in range(AT_ONCE):
            await bench.until(f"long-{i}", lambda info: info.status is BatchStatus.IN_PROGRESS, "tenant")
        for i in range(AT_ONCE + 2):
            bench.add(f"small-{i}", 1, small=i, namespace=f"other-{i}")
        for i in range(AT_ONCE + 2):
            await bench.until(f"small-{i}", lambda info: info.status is BatchStatus.COMPLETED, f"other-{i}")
        first = await bench.until("long-0", lambda _: True, "tenant")
        assert first.status is BatchStatus.IN_PROGRESS, "else this shows nothing"
        small_done.set()
        for i in range(AT_ONCE + 2):
            done = await bench.until(f"long-{i}", lambda info: info.status is BatchStatus.COMPLETED, "tenant")
            assert (done.completed, done.failed) == (800, 0)
    assert set(seen.values()) == {1, 800}


async def test_what_is_claimed_while_it_stops_is_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, claim = threading.Event(), threading.Event(), SqlBatchStore.claim

    def slow(store: SqlBatchStore, owner: str) -> Claim | None:
        begun.set()
        assert go_on.wait(20)
        return claim(store, owner)

    async def answer(_body: Any, _namespace: str) -> tuple[int, bytes]:
        return 200, b"{}"

    monkeypatch.setattr(SqlBatchStore, "claim", slow)
    stopped = running(tmp_path, answer)
    bench = await stopped.__aenter__()
    bench.add("late", 1)
    assert await asyncio.to_thread(begun.wait, 10)
    stop = asyncio.create_task(stopped.__aexit__(None, None, None))
    await asyncio.wait([stop], timeout=0.2)  # one that does not wait for the claim is done, or the weaker the check
    go_on.set()
    await stop
    database = Database(f"sqlite:///{tmp_path / 'b.sqlite3'}")
    with database.reading() as connection:
        assert connection.execute(select(batches.c.owner)).scalar_one() is None
    database.close()
