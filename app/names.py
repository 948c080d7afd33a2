"""Which version a reference means now: asked of the store, and remembered for the time it does not answer."""

import asyncio
import time
from dataclasses import dataclass, replace

from cachetools import LRUCache

from app.domain import ContextInfo, ContextRef, ContextStatus, Space
from app.errors import StoreError
from app.stores.base import ContextStore
from app.stores.errors import StoreBusy
from app.stores.threads import StoreThreads
from app.telemetry.metrics import STALE_CONTEXTS

NAME_SECONDS = 0.5
"""How long an answer is believed before the store is asked again; another process may have moved the name."""
PATIENCE_SECONDS = 2.0
"""How long a request waits for the store where an earlier answer is known."""
REMEMBERED = 4096

Key = tuple[Space, str]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the store said last; `info` None: there is no such context. `at`: monotonic seconds."""

    info: ContextInfo | None
    at: float


@dataclass(frozen=True, slots=True)
class _Question:
    task: "asyncio.Task[ContextInfo | None]"
    at: float


class Names:
    """For one event loop. One question at a time for each reference, however many requests wait for its answer."""

    def __init__(self, store: ContextStore, threads: StoreThreads, *, stale_seconds: float) -> None:
        """`stale_seconds`: for how long the last answer about a name serves while the store gives none."""
        self._store = store
        self._threads = threads
        self._stale_seconds = stale_seconds
        # Apart from each other, so that names nobody has do not drive out those that are in use.
        self._found: LRUCache[Key, _Answer] = LRUCache(REMEMBERED)
        self._missing: LRUCache[Key, _Answer] = LRUCache(REMEMBERED)
        self._asking: dict[Key, _Question] = {}

    async def find(self, space: Space, ref: ContextRef) -> ContextInfo | None:
        """None: there is no such context. Raises StoreError where the store does not answer and nothing is known."""
        key = space, ref.text
        known = self._found.get(key)
        if known is not None and time.monotonic() - known.at < NAME_SECONDS:
            return known.info
        known = known or self._missing.get(key)
        question = self._asking.get(key) or self._ask(key, ref)
        if known is None:
            return await asyncio.shield(question.task)
        try:
            patience = max(0.0, question.at + PATIENCE_SECONDS - time.monotonic())
            return await asyncio.wait_for(asyncio.shield(question.task), patience)
        except StoreError as error:
            return self._last(known, ref, error)
        except TimeoutError:
            return self._last(known, ref, StoreBusy("The context store takes long to say what a name means"))

    def forget(self, space: Space, *, name: str | None = None, context_id: str | None = None) -> None:
        """What was known about a name, and about its versions, or about a content."""
        for answers in (self._found, self._missing):
            for key, answer in list(answers.items()):
                info = answer.info
                same = info is not None and (info.name == name or info.id == context_id)
                if key[0] == space and (same or key[1].partition(".")[0] == name or key[1] == context_id):
                    del answers[key]
        # What is being asked may be answered with what was; that answer is for those who wait for it already.
        self._asking = {key: question for key, question in self._asking.items() if key[0] != space}

    def _ask(self, key: Key, ref: ContextRef) -> _Question:
        task = asyncio.create_task(self._threads.read(self._store.get, key[0], ref))
        question = self._asking[key] = _Question(task, time.monotonic())
        task.add_done_callback(lambda _: self._answered(key, question))
        return question

    def _answered(self, key: Key, question: _Question) -> None:
        failed = question.task.cancelled() or question.task.exception() is not None  # nobody may be left to hear it
        if self._asking.get(key) is not question:  # forgotten meanwhile
            return
        del self._asking[key]
        if failed:
            return
        info = question.task.result()
        self._found.pop(key, None)
        self._missing.pop(key, None)
        (self._missing if info is None else self._found)[key] = _Answer(info, time.monotonic())

    def _last(self, known: _Answer, ref: ContextRef, error: StoreError) -> ContextInfo | None:
        """A version never changes, so that an id or name.version means what it meant; a name may have been moved."""
        moves = ref.id is None and ref.version is None
        if moves and time.monotonic() - known.at > self._stale_seconds:
            raise error
        if known.info is None:
            return None
        if known.info.status is not ContextStatus.COMPLETED:
            raise error
        STALE_CONTEXTS.inc()
        return replace(known.info, stale=True) if moves else known.info
