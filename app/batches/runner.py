"""Runs batches at low priority, a few side by side in a process, so that no line is lost and none is answered twice.

A batch belongs to the process that claimed it for as long as that gives signs of life; every write is made in a
transaction that sees to it that it still does.
"""

import asyncio
import logging
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from app.batches.answering import Answers, answered, given_up
from app.batches.lines import Line, LineTooLong, checked, unanswered
from app.batches.window import WINDOW_LINES, Window
from app.errors import ServerFault, ShuttingDown, StoreError
from app.stores.batch_base import BatchInfo, BatchStatus, LeaseLost, LineResult, Problem
from app.stores.batches import SqlBatchStore
from app.stores.files import SqlFileStore
from app.stores.threads import StoreThreads
from app.telemetry.metrics import BATCH_LINES, BATCHES_RUNNING

log = logging.getLogger(__name__)


Task = asyncio.Task[LineResult | None]


LOOK_SECONDS = 2.0
"""Between two looks for batches that other processes took in or left."""
BEAT_SECONDS = 2.0
SWEEP_SECONDS = 60.0
STORE_SECONDS = 1.0
"""An answer is stored at the latest so long behind the one before it."""
DEADLY = 3
"""A line during which, run alone, the process ended so often is given up."""
ENDED = "The server ended unexpectedly each time it computed this line."
AT_ONCE = 4
"""Batches side by side, so that a small one does not wait for the end of a large one."""


class BatchRunner:
    """For one event loop."""

    def __init__(
        self,
        store: SqlBatchStore,
        files: SqlFileStore,
        threads: StoreThreads,
        answers: Answers,
        *,
        max_lines: int,
        max_line_bytes: int,
    ) -> None:
        self._store = store
        self._files = files
        self._threads = threads
        self._answers = answers
        self._max_lines = max_lines
        self._max_line_bytes = max_line_bytes
        self._woken = asyncio.Event()
        self._suspects = asyncio.Lock()  # so that each is blamed for its own
        self._sweeping: asyncio.Task[None] | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by the name each claims batches under

    def start(self) -> None:
        self._sweeping = asyncio.create_task(self._sweep())
        for _ in range(AT_ONCE):
            owner = f"{socket.gethostname()[:20]}-{uuid.uuid4().hex}"
            self._tasks[owner] = asyncio.create_task(self._run(owner))

    def wake(self) -> None:
        """There is something to run."""
        self._woken.set()

    async def close(self, *, failed: bool = False) -> None:
        """Stops; another process, or the next start, goes on behind the last stored answer. `failed`: a line may be why
        the process ends, so it leaves its batches as one that was killed does."""
        tasks = [task for task in (self._sweeping, *self._tasks.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if failed:
            return
        with suppress(StoreError):
            await self._threads.write(self._store.release, list(self._tasks))

    async def _sweep(self) -> None:
        """Deletes files that have expired."""
        while True:
            with suppress(StoreError):  # the store has said so in the log
                while await self._threads.write(self._files.delete_expired):
                    pass
            await asyncio.sleep(SWEEP_SECONDS)

    async def _run(self, owner: str) -> None:
        while True:
            self._woken.clear()  # before the look: what comes during it counts
            try:
                batch = await self._threads.write(self._store.claim, owner)
                if batch is not None:
                    await self._carry_through(batch, owner)
                    continue
            except LeaseLost:
                log.warning("a batch was taken over by another process")
            except (StoreError, ShuttingDown) as error:
                log.debug("batches wait: %s", error)  # the store has said so in the log, once
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is None or task.cancelling():  # by close; any other must not end the runner unheard
                    raise
                log.error("a batch was cancelled by nobody", exc_info=error)
            except Exception as error:
                log.error("unexpected %s in a batch", type(error).__name__, exc_info=error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), LOOK_SECONDS)

    async def _carry_through(self, batch: BatchInfo, owner: str) -> None:
        stopped = asyncio.Event()
        beating = asyncio.create_task(self._beat(batch, owner, stopped))
        BATCHES_RUNNING.inc()
        try:
            status = batch.status
            if status is BatchStatus.VALIDATING:
                total, problems = await self._threads.read(self._checked, batch)
                if problems:
                    await self._threads.write(self._store.refuse, batch.id, owner, problems)
                    log.info("batch %s: its input is refused", batch.id)
                    return
                status = await self._threads.write(self._store.begin, batch.id, owner, total)
            if status is BatchStatus.IN_PROGRESS:
                await self._work(batch, owner, stopped)
            done = await self._threads.write(self._store.finish, batch.id, owner)
            log.info("batch %s is %s: %d of %d lines, %d failed", done.id, done.status, done.completed, done.total,
                     done.failed)  # fmt: skip
        except LineTooLong as error:  # the limit is another one than when it was taken
            await self._end_early(batch, owner, f"Line {error.number} is longer than this server takes.", error)
        except StoreError as error:
            if error.passes:
                raise
            await self._end_early(batch, owner, error.answer, error)
        finally:
            beating.cancel()
            BATCHES_RUNNING.dec()

    async def _end_early(self, batch: BatchInfo, owner: str, why: str, error: Exception) -> None:
        log.error("batch %s ends early: %s", batch.id, error or why)
        problem = Problem("damaged_input_file", why, param="input_file_id")
        await self._threads.write(self._store.refuse, batch.id, owner, [problem])

    def _checked(self, batch: BatchInfo) -> tuple[int, list[Any]]:
        return checked(self._files.chunks(batch.input_file_id), self._max_lines, self._max_line_bytes)

    async def _work(self, batch: BatchInfo, owner: str, stopped: asyncio.Event) -> None:
        """All lines that have no answer yet; ends early when the batch is cancelled or lost."""
        done_before = await self._threads.read(self._store.answered, batch.id)
        lines = unanswered(self._files.chunks(batch.input_file_id), done_before, self._max_line_bytes)
        if batch.orphaned:
            await self._one_by_one(batch, owner, lines, stopped)
        window, running = Window(lines), set[Task]()
        try:
            while True:
                more = [] if stopped.is_set() else await self._threads.read(window.more)
                running |= {
                    asyncio.create_task(answered(self._answers, line, batch.namespace, stopped)) for line in more
                }
                if not running:
                    return
                done, running = await _some(running)
                results = [result for task in done if (result := task.result()) is not None]
                if results:
                    await self._record(batch, owner, results, stopped)
                    window.stored(result.number for result in results)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _one_by_one(self, batch: BatchInfo, owner: str, lines: Iterator[Line], stopped: asyncio.Event) -> None:
        """The lines among which is the one that ended the last process, if one of this batch did."""
        for _ in range(WINDOW_LINES):
            async with self._suspects:
                line = None if stopped.is_set() else await self._threads.read(next, lines, None)
                if line is None:
                    return
                if await self._threads.write(self._store.try_alone, batch.id, owner, line.number) > DEADLY:
                    log.error("batch %s: line %d is given up, it has ended the process again and again", batch.id,
                              line.number)  # fmt: skip
                    result: LineResult | None = given_up(self._answers, line, ServerFault(ENDED))
                else:
                    task = asyncio.create_task(answered(self._answers, line, batch.namespace, stopped))
                    result = await task
                if result is not None:
                    await self._record(batch, owner, [result], stopped)

    async def _record(
        self, batch: BatchInfo, owner: str, results: Sequence[LineResult], stopped: asyncio.Event
    ) -> None:
        if await self._threads.write(self._store.record, batch.id, owner, results) is BatchStatus.CANCELLING:
            stopped.set()
        for result in results:
            BATCH_LINES.labels("completed" if result.ok else "failed").inc()

    async def _beat(self, batch: BatchInfo, owner: str, stopped: asyncio.Event) -> None:
        while True:  # also while it stops: what is being answered is still to be stored
            await asyncio.sleep(BEAT_SECONDS)
            try:
                if await self._threads.write(self._store.beat, batch.id, owner) is BatchStatus.CANCELLING:
                    stopped.set()
            except LeaseLost:
                stopped.set()  # the next answers cannot be stored, which ends the run
                return
            except StoreError as error:
                log.debug("no sign of life of batch %s: %s", batch.id, error)


async def _some(running: set[Task]) -> tuple[set[Task], set[Task]]:
    """Those that are done when half of them are, or a second behind the first one, and the others."""
    done, rest = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    end = time.monotonic() + STORE_SECONDS
    while rest and len(done) < len(rest) and (left := end - time.monotonic()) > 0:
        more, rest = await asyncio.wait(rest, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        done |= more
    return done, rest
