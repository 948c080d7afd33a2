"""Where texts are tokenized, beside the event loop: a little in the threads that everybody shares, much in few threads
of its own, so that a small request always finds one."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")

SMALL = 2**16
"""Characters, or ids: some hundredths of a second."""
THREADS = 2


class TokenizerThreads:
    """Large requests take turns: each client has one under way, which gives its thread up after every piece, and goes
    no further once nobody waits for it. For one event loop; the threads end with the object."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "tokenize")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self, pieces: Iterator[list[T]], size: int, client: str) -> list[T]:
        """What `pieces` gives, together, made in threads. `size`: of all texts. Raises what `pieces` raises."""
        if size <= SMALL:
            return await asyncio.to_thread(lambda: list(chain.from_iterable(pieces)))
        loop, done = asyncio.get_running_loop(), list[T]()
        async with self._turns.setdefault(client, asyncio.Lock()):
            while (piece := await loop.run_in_executor(self._pool, next, pieces, None)) is not None:
                done += piece
        return done
