"""Much text is tokenized by turns, and keeps nobody who sends little waiting."""

import asyncio
import threading
from collections.abc import Iterator
from itertools import chain

import pytest

from app.tokenizer_threads import SMALL, THREADS, TokenizerThreads

LARGE = SMALL + 1


class Work:
    """Pieces of which each waits for `open`; notes in `log` which were made."""

    def __init__(self, log: list[str]) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self._log = log

    def pieces(self, name: str, count: int) -> Iterator[list[int]]:
        for i in range(count):
            self.entered.set()
            assert self.open.wait(20)
            self._log.append(name)
            yield [i, -i]


async def test_pieces_come_together_in_order() -> None:
    work = Work([])
    work.open.set()
    for size in (SMALL, LARGE):
        assert await TokenizerThreads().run(work.pieces("a", 3), size, "a") == [0, 0, 1, -1, 2, -2]
        assert await TokenizerThreads().run(work.pieces("a", 0), size, "a") == []


async def test_however_much_is_sent_little_is_tokenized_at_once() -> None:
    threads, held, free = TokenizerThreads(), Work([]), Work([])
    free.open.set()
    large = [asyncio.create_task(threads.run(held.pieces("a", 2), LARGE, f"client {i}")) for i in range(40)]
    await asyncio.to_thread(held.entered.wait, 10)
    assert await asyncio.wait_for(threads.run(free.pieces("b", 1), SMALL, "b"), 10) == [0, 0]
    held.open.set()
    assert await asyncio.gather(*large) == [[0, 0, 1, -1]] * 40


async def test_a_client_has_one_request_under_way_whatever_it_sent() -> None:
    threads, held, free = TokenizerThreads(), Work([]), Work([])
    free.open.set()
    many = [asyncio.create_task(threads.run(held.pieces("a", 2), LARGE, "a")) for _ in range(5)]
    await asyncio.to_thread(held.entered.wait, 10)
    assert len(await asyncio.wait_for(threads.run(free.pieces("b", 5), LARGE, "b"), 10)) == 10
    held.open.set()
    assert await asyncio.gather(*many) == [[0, 0, 1, -1]] * 5


async def test_a_request_gives_its_thread_up_after_every_piece() -> None:
    threads, first, rest, other = TokenizerThreads(), Work([]), Work([]), Work([])
    many = [
        asyncio.create_task(threads.run(chain(first.pieces("a", 1), rest.pieces("a", 1)), LARGE, f"client {i}"))
        for i in range(THREADS)
    ]
    one = asyncio.create_task(threads.run(other.pieces("b", 1), LARGE, "b"))
    await asyncio.to_thread(first.entered.wait, 10)
    first.open.set()
    assert await asyncio.to_thread(other.entered.wait, 10), "its turn came behind the first pieces"
    other.open.set()
    rest.open.set()
    assert await asyncio.gather(one, *many) == [[0, 0], *[[0, 0, 0, 0]] * THREADS]


async def test_what_nobody_waits_for_ends_behind_its_piece() -> None:
    log: list[str] = []
    threads, work = TokenizerThreads(), Work(log)
    leaving = asyncio.create_task(threads.run(work.pieces("a", 100), LARGE, "a"))
    await asyncio.to_thread(work.entered.wait, 10)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    work.open.set()
    assert await threads.run(work.pieces("b", 1), LARGE, "a") == [0, 0]
    assert log.count("a") <= 1
