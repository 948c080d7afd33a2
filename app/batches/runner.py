"""Runs batches at low priority, one at a time in a process, so that no line is lost and none is answered twice.

A batch belongs to the process that claimed it for as long as that gives signs of life; every write is made in a
transaction that sees to it that it still does.
"""

import asyncio
import logging
import socket
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import orjson

from app.batches.lines import Line, checked, numbered, parsed
from app.errors import RetryableError, ShuttingDown, StoreError
from app.stores.batch_base import BatchInfo, BatchStatus, LeaseLost, LineResult
from app.stores.batches import SqlBatchStore
from app.stores.files import SqlFileStore
from app.telemetry import BATCH_LINES, BATCHES_RUNNING

log = logging.getLogger(__name__)

Answer = Callable[[Any, str], Awaitable[tuple[int, bytes]]]
"""A line's body and the namespace it runs in -> status and body, as the endpoint answers. Raises what may pass."""

LOOK_SECONDS = 2.0
"""Between two looks for batches that other processes took in or left."""
BEAT_SECONDS = 2.0
WINDOW_LINES, WINDOW_TEXTS = 32, 256
"""Lines on the engine together; their answers are stored together."""
LONGEST_WAIT = 5.0


class BatchRunner:
    """For one event loop."""

    def __init__(self, store: SqlBatchStore, files: SqlFileStore, answer: Answer, *, max_lines: int) -> None:
        self._store = store
        self._files = files
        self._answer = answer
        self._max_lines = max_lines
        self._owner = f"{socket.gethostname()[:20]}-{uuid.uuid4().hex}"
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def wake(self) -> None:
        """There is something to run."""
        self._woken.set()

    async def close(self) -> None:
        """Stops; another process, or the next start, goes on behind the last stored answer."""
        if self._task is None:
            return
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        with suppress(StoreError):
            await asyncio.to_thread(self._store.release, self._owner)

    async def _run(self) -> None:
        while True:
            try:
                batch = await asyncio.to_thread(self._store.claim, self._owner)
                if batch is not None:
                    await self._carry_through(batch)
                    continue
            except LeaseLost:
                log.warning("a batch was taken over by another process")
            except (StoreError, ShuttingDown) as error:
                log.warning("batches wait: %s", error)
            except Exception as error:
                log.error("unexpected %s in a batch", type(error).__name__, exc_info=error)
            self._woken.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), LOOK_SECONDS)

    async def _carry_through(self, batch: BatchInfo) -> None:
        beating = asyncio.create_task(self._beat(batch))
        BATCHES_RUNNING.inc()
        try:
            status = batch.status
            if status is BatchStatus.VALIDATING:
                total, problems = await asyncio.to_thread(self._checked, batch)
                if problems:
                    await asyncio.to_thread(self._store.refuse, batch.id, self._owner, problems)
                    log.info("batch %s: its input is refused", batch.id)
                    return
                status = await asyncio.to_thread(self._store.begin, batch.id, self._owner, total)
            if status is BatchStatus.IN_PROGRESS:
                await self._work(batch)
            done = await asyncio.to_thread(self._store.finish, batch.id, self._owner)
            log.info("batch %s is %s: %d of %d lines, %d failed", done.id, done.status, done.completed, done.total,
                     done.failed)  # fmt: skip
        finally:
            beating.cancel()
            BATCHES_RUNNING.dec()

    def _checked(self, batch: BatchInfo) -> tuple[int, list[Any]]:
        return checked(self._files.chunks(batch.input_file_id), self._max_lines)

    async def _work(self, batch: BatchInfo) -> None:
        """All lines that have no answer yet; ends early when the batch is cancelled."""
        answered = await asyncio.to_thread(self._store.answered, batch.id)
        windows = self._windows(batch, answered)
        while window := await asyncio.to_thread(next, windows, None):
            results = await asyncio.gather(*(self._result(batch, line) for line in window))
            status = await asyncio.to_thread(self._store.record, batch.id, self._owner, results)
            for result in results:
                BATCH_LINES.labels("completed" if result.ok else "failed").inc()
            if status is BatchStatus.CANCELLING:
                return

    def _windows(self, batch: BatchInfo, answered: set[int]) -> Iterator[list[Line]]:
        lines = (
            line
            for number, raw in numbered(self._files.chunks(batch.input_file_id))
            if number not in answered and isinstance(line := parsed(number, raw), Line)
        )
        while window := list(islice(lines, 1)):
            texts = window[0].inputs
            while len(window) < WINDOW_LINES and texts < WINDOW_TEXTS and (more := list(islice(lines, 1))):
                window += more
                texts += more[0].inputs
            yield window

    async def _result(self, batch: BatchInfo, line: Line) -> LineResult:
        status, body = await self._patiently(line.body, batch.namespace)
        response = {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": orjson.Fragment(body)}
        answer = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id, "response": response}
        return LineResult(line.number, status < 400, orjson.dumps(answer | {"error": None}))

    async def _patiently(self, body: Any, namespace: str) -> tuple[int, bytes]:
        """What may pass is waited for, however long that takes."""
        while True:
            try:
                return await self._answer(body, namespace)
            except ShuttingDown:
                raise
            except RetryableError as error:
                await asyncio.sleep(min(error.retry_after, LONGEST_WAIT))
            except StoreError:
                await asyncio.sleep(1.0)

    async def _beat(self, batch: BatchInfo) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                await asyncio.to_thread(self._store.beat, batch.id, self._owner)
            except LeaseLost:
                return  # the next answers cannot be stored, which ends the run
            except StoreError as error:
                log.warning("no sign of life of batch %s: %s", batch.id, error)
