"""One batch, from the look at its input to its output files, by whoever has claimed it."""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from app.batches.answering import Answers, answered, given_up
from app.batches.lines import Line, LineTooLong, checked, unanswered
from app.batches.window import WINDOW_LINES, Window
from app.errors import ServerFault, StoreError
from app.stores.batch_base import BatchInfo, BatchStatus, Claim, LeaseLost, LineResult, Problem
from app.stores.batches import SqlBatchStore
from app.stores.files import SqlFileStore
from app.stores.threads import StoreThreads
from app.telemetry.metrics import BATCH_LINES, BATCHES_RUNNING

log = logging.getLogger(__name__)

Task = asyncio.Task[LineResult | None]

BEAT_SECONDS = 2.0
STORE_SECONDS = 1.0
"""An answer waits at most so long for others, to be stored with them."""
DEADLY = 3
"""A line is given up when the process has ended so often while it ran alone."""
ENDED = "The server ended unexpectedly each time it computed this line."
TURN_SECONDS = 600.0
"""A batch gives way to a namespace that has at least two fewer running; after so long, to one that has any fewer."""
LAST_SECONDS = 30.0
"""What lines under way then have to be answered."""


@dataclass(frozen=True, slots=True)
class Run:
    """A claimed batch in the hands of `owner`. `stopped`: it is cancelled or lost. `crowded`: another namespace is to
    have its place."""

    claim: Claim
    owner: str
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    crowded: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def batch(self) -> BatchInfo:
        return self.claim.batch

    @property
    def id(self) -> str:
        return self.batch.id


class Refused(Exception):
    """The input is not right."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(len(problems))
        self.problems = problems


class BatchWork:
    """For one event loop. Batches side by side; all methods raise StoreError and LeaseLost."""

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
        self._suspects = asyncio.Lock()  # so that each is blamed for its own

    async def carry_through(self, run: Run) -> None:
        """Until it is finished, refused, lost, or gives way to another one."""
        beating = asyncio.create_task(self._beat(run))
        BATCHES_RUNNING.inc()
        try:
            if await self._status(run) is BatchStatus.IN_PROGRESS and not await self._work(run):
                await self._threads.write(self._store.release, [run.owner])
                log.info("batch %s gives way to another namespace's", run.id)
                return
            done = await self._threads.write(self._store.finish, run.id, run.owner)
            log.info("batch %s is %s: %d of %d lines, %d failed", done.id, done.status, done.completed, done.total,
                     done.failed)  # fmt: skip
        except Refused as error:
            await self._threads.write(self._store.refuse, run.id, run.owner, error.problems)
            log.info("batch %s: its input is refused", run.id)
        except LineTooLong as error:  # the limit is another one than when it was taken
            await self._end_early(run, f"Line {error.number} is longer than this server takes.", error)
        except StoreError as error:
            if error.passes:
                raise
            await self._end_early(run, error.answer, error)
        finally:
            beating.cancel()
            BATCHES_RUNNING.dec()

    async def _end_early(self, run: Run, why: str, error: Exception) -> None:
        log.error("batch %s ends early: %s", run.id, error or why)
        problem = Problem("damaged_input_file", why, param="input_file_id")
        await self._threads.write(self._store.refuse, run.id, run.owner, [problem])

    async def _status(self, run: Run) -> BatchStatus:
        """Behind the look at a new one's input. Raises Refused."""
        if run.batch.status is not BatchStatus.VALIDATING:
            return run.batch.status
        total, problems = await self._threads.read(self._checked, run.batch)
        if problems:
            raise Refused(problems)
        return await self._threads.write(self._store.begin, run.id, run.owner, total)

    def _checked(self, batch: BatchInfo) -> tuple[int, list[Problem]]:
        return checked(self._files.chunks(batch.input_file_id), self._max_lines, self._max_line_bytes)

    async def _work(self, run: Run) -> bool:
        """All lines that have no answer yet; ends early when the batch is cancelled or lost, and, with False, when it
        is another namespace's turn."""
        done_before = await self._threads.read(self._store.answered, run.id)
        lines = unanswered(self._files.chunks(run.batch.input_file_id), done_before, self._max_line_bytes)
        if run.claim.orphaned:
            await self._one_by_one(run, lines)
        window, running = Window(lines), set[Task]()
        try:
            while not run.crowded.is_set():
                more = [] if run.stopped.is_set() else await self._threads.read(window.more)
                running |= {asyncio.create_task(self._answered(run, line)) for line in more}
                if not running:
                    return True
                done, running = await _some(running)
                window.stored(await self._record(run, [task.result() for task in done]))
            if running:
                done, running = await asyncio.wait(running, timeout=LAST_SECONDS)
                await self._record(run, [task.result() for task in done])
            return False
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _one_by_one(self, run: Run, lines: Iterator[Line]) -> None:
        """The lines among which is the one that ended the last process, if one of this batch did."""
        for _ in range(WINDOW_LINES):
            async with self._suspects:
                line = None if run.stopped.is_set() else await self._threads.read(next, lines, None)
                if line is None:
                    return
                if await self._threads.write(self._store.try_alone, run.id, run.owner, line.number) > DEADLY:
                    log.error("batch %s: line %d is given up, it has ended the process again and again", run.id,
                              line.number)  # fmt: skip
                    result: LineResult | None = given_up(self._answers, line, ServerFault(ENDED))
                else:
                    result = await asyncio.create_task(self._answered(run, line))
                await self._record(run, [result])

    async def _answered(self, run: Run, line: Line) -> LineResult | None:
        return await answered(self._answers, line, run.batch.namespace, run.stopped)

    async def _record(self, run: Run, found: Sequence[LineResult | None]) -> list[int]:
        """The numbers of the lines whose answers are stored now."""
        results = [result for result in found if result is not None]
        if not results:
            return []
        if await self._threads.write(self._store.record, run.id, run.owner, results) is BatchStatus.CANCELLING:
            run.stopped.set()
        for result in results:
            BATCH_LINES.labels("completed" if result.ok else "failed").inc()
        return [result.number for result in results]

    async def _beat(self, run: Run) -> None:
        began = time.monotonic()
        while True:  # also while it stops: what is being answered is still to be stored
            await asyncio.sleep(BEAT_SECONDS)
            try:
                if await self._threads.write(self._store.beat, run.id, run.owner) is BatchStatus.CANCELLING:
                    run.stopped.set()
                by = 1 if time.monotonic() - began > TURN_SECONDS else 2
                if await self._threads.read(self._store.is_crowded, run.owner, run.batch.namespace, by=by):
                    run.crowded.set()
            except LeaseLost:
                run.stopped.set()  # the next answers cannot be stored, which ends the run
                return
            except StoreError as error:
                log.debug("no sign of life of batch %s: %s", run.id, error)


async def _some(running: set[Task]) -> tuple[set[Task], set[Task]]:
    """The tasks that are done, and the others: as soon as half are done, or a second after the first one was. None done
    where none is within a second."""
    done, rest = await asyncio.wait(running, timeout=STORE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    end = time.monotonic() + STORE_SECONDS
    while done and rest and len(done) < len(rest) and (left := end - time.monotonic()) > 0:
        more, rest = await asyncio.wait(rest, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        done |= more
    return done, rest
