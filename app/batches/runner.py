"""Runs batches at low priority, a few side by side in a process, so that no line is lost and none is answered twice.

A batch belongs to the process that claimed it for as long as that gives signs of life; every write is made in a
transaction that sees to it that it still does.
"""

import asyncio
import logging
import socket
import uuid
from contextlib import suppress

from app.batches.work import BatchWork, Run
from app.errors import ShuttingDown, StoreError
from app.stores.batch_base import Claim, LeaseLost
from app.stores.batches import SqlBatchStore
from app.stores.files import SqlFileStore
from app.stores.threads import StoreThreads

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Between two looks for batches that other processes took in or left."""
SWEEP_SECONDS = 60.0
AT_ONCE = 4
"""Batches side by side, so that a small one does not wait for the end of a large one."""


class BatchRunner:
    """For one event loop."""

    def __init__(self, store: SqlBatchStore, files: SqlFileStore, threads: StoreThreads, work: BatchWork) -> None:
        self._store = store
        self._files = files
        self._threads = threads
        self._work = work
        self._woken = asyncio.Event()
        self._sweeping: asyncio.Task[None] | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by the name each claims batches under
        self._claims: set[asyncio.Task[Claim | None]] = set()

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
        await asyncio.gather(*self._claims, return_exceptions=True)  # a thread cannot be stopped: it may bring a batch
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
                claim = await self._claim(owner)
                if claim is not None:
                    await self._work.carry_through(Run(claim, owner))
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

    async def _claim(self, owner: str) -> Claim | None:
        claim = asyncio.create_task(self._threads.write(self._store.claim, owner))
        self._claims.add(claim)
        claim.add_done_callback(self._claims.discard)
        return await asyncio.shield(claim)
