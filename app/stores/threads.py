"""Where calls to the store run: in threads of their own, beside the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

READERS = WRITERS = 8


class StoreThreads:
    """A database that hangs keeps these threads and no others: texts are tokenized and answers rendered elsewhere.
    Writers that wait for a lock keep no reader from its answer."""

    def __init__(self) -> None:
        self._readers = ThreadPoolExecutor(READERS, "store-read")
        self._writers = ThreadPoolExecutor(WRITERS, "store-write")

    async def read(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(self._readers, partial(call, *args, **kwargs))

    async def write(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(self._writers, partial(call, *args, **kwargs))

    async def _run(self, pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        # As asyncio.to_thread: what is logged there carries the request's id.
        return await asyncio.get_running_loop().run_in_executor(pool, partial(copy_context().run, call))

    def close(self) -> None:
        """What runs, ends; what has not begun, does not begin."""
        for pool in (self._readers, self._writers):
            pool.shutdown(wait=False, cancel_futures=True)
