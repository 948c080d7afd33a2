"""Runs batches at low priority, a few side by side in a process, so that no line is lost and none is answered twice.

A batch belongs to the process that claimed it for as long as that gives signs of life; every write is made in a
transaction that sees to it that it still does.
"""

import asyncio
import logging
import socket
import uuid
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, Protocol

import orjson

from app.batches.lines import Line, LineTooLong, checked, numbered, parsed
from app.errors import OutOfDeviceMemory, RetryableError, ShuttingDown, StoreError
from app.stores.batch_base import BatchInfo, BatchStatus, LeaseLost, LineResult, Problem
from app.stores.batches import SqlBatchStore
from app.stores.files import SqlFileStore
from app.stores.threads import StoreThreads
from app.telemetry.metrics import BATCH_LINES, BATCHES_RUNNING
from app.telemetry.requests import RequestRecord, current

log = logging.getLogger(__name__)


class Answers(Protocol):
    """A line's body -> status and body, as the endpoint answers."""

    async def __call__(self, body: Any, namespace: str, /) -> tuple[int, bytes]:
        """In that namespace. Raises what may pass."""

    def given_up(self, error: RetryableError, /) -> tuple[int, bytes]:
        """Where what may pass did not."""


LOOK_SECONDS = 2.0
"""Between two looks for batches that other processes took in or left."""
BEAT_SECONDS = 2.0
WINDOW_LINES, WINDOW_TEXTS, WINDOW_BYTES = 32, 256, 4 * 2**20
"""Lines in memory and on the engine together; their answers are stored together."""
LONGEST_WAIT = 5.0
ATTEMPTS = 5
"""At a line that the device has no room for. What is full, down or being built is waited for."""
AT_ONCE = 4
"""Batches side by side, so that a small one does not wait for the end of a large one."""


class BatchRunner:
    """For one event loop."""

    def __init__(
        self,
        store: SqlBatchStore,
        files: SqlFileStore,
        threads: StoreThreads,
        answer: Answers,
        *,
        max_lines: int,
        max_line_bytes: int,
    ) -> None:
        self._store = store
        self._files = files
        self._threads = threads
        self._answer = answer
        self._max_lines = max_lines
        self._max_line_bytes = max_line_bytes
        self._woken = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by the name each claims batches under

    def start(self) -> None:
        for _ in range(AT_ONCE):
            owner = f"{socket.gethostname()[:20]}-{uuid.uuid4().hex}"
            self._tasks[owner] = asyncio.create_task(self._run(owner))

    def wake(self) -> None:
        """There is something to run."""
        self._woken.set()

    async def close(self) -> None:
        """Stops; another process, or the next start, goes on behind the last stored answer."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        with suppress(StoreError):
            await self._threads.write(self._store.release, list(self._tasks))

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
        answered = await self._threads.read(self._store.answered, batch.id)
        windows = self._windows(batch, answered)
        while window := await self._threads.read(next, windows, None):
            found = await asyncio.gather(*(self._result(batch, line, stopped) for line in window))
            results = [result for result in found if result is not None]
            if not results:
                return
            status = await self._threads.write(self._store.record, batch.id, owner, results)
            for result in results:
                BATCH_LINES.labels("completed" if result.ok else "failed").inc()
            if status is BatchStatus.CANCELLING or stopped.is_set():
                return

    def _windows(self, batch: BatchInfo, answered: set[int]) -> Iterator[list[Line]]:
        lines = (
            line
            for number, raw in numbered(self._files.chunks(batch.input_file_id), self._max_line_bytes)
            if number not in answered and isinstance(line := parsed(number, raw), Line)
        )
        while window := list(islice(lines, 1)):
            texts, size = window[0].inputs, window[0].size
            while len(window) < WINDOW_LINES and texts < WINDOW_TEXTS and size < WINDOW_BYTES:
                more = next(lines, None)
                if more is None:
                    break
                window.append(more)
                texts += more.inputs
                size += more.size
            yield window

    async def _result(self, batch: BatchInfo, line: Line, stopped: asyncio.Event) -> LineResult | None:
        request = RequestRecord(f"req_{uuid.uuid4().hex}")
        current.set(request)  # this line's task has a context of its own: what it logs has the id of its answer
        answered = await self._patiently(line.body, batch.namespace, stopped)
        if answered is None:
            return None
        status, body = answered
        response = {"status_code": status, "request_id": request.id, "body": orjson.Fragment(body)}
        answer = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id, "response": response}
        return LineResult(
            line.number, status < 400, orjson.dumps(answer | {"error": None}, option=orjson.OPT_APPEND_NEWLINE)
        )

    async def _patiently(self, body: Any, namespace: str, stopped: asyncio.Event) -> tuple[int, bytes] | None:
        """What may pass is waited for, however long that takes, but for a text that fits on no device; None: until the
        batch was stopped."""
        failures = 0
        while not stopped.is_set():
            try:
                return await self._answer(body, namespace)
            except ShuttingDown:
                raise
            except RetryableError as error:
                failures += isinstance(error, OutOfDeviceMemory)
                if failures == ATTEMPTS:
                    return self._answer.given_up(error)
                seconds = min(error.retry_after, LONGEST_WAIT)
            except StoreError:
                seconds = 1.0
            with suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), seconds)
        return None

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
