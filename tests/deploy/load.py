"""Open-loop load: requests go out when they are due, whether or not earlier ones have been answered."""

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import openai

MOST_TEXTS = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request was, and what came of it. Times are `time.monotonic()`."""

    sent: float
    seconds: float
    retries: int
    texts: tuple[str, ...]
    context_id: str
    vectors: list[list[float]]


@dataclass
class Load:
    """Use as a context manager: it runs inside the block, and every request has ended behind it."""

    base_url: str
    key: str
    models: list[str]
    """Names to choose from, with their contexts. May grow while the load runs."""
    texts: Sequence[str]
    rate: float
    """Requests a second, on average; they come at random (a Poisson process)."""
    answers: list[Answer] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)
    """When it was sent, and what the client raised after its own retries."""
    sent: int = 0

    def __enter__(self) -> Self:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    async def _run(self) -> None:
        choose = random.Random(0)
        tasks: set[asyncio.Task[None]] = set()
        async with openai.AsyncOpenAI(base_url=self.base_url, api_key=self.key, timeout=60) as client:
            due = time.monotonic()
            while not self._ended.is_set():
                due += choose.expovariate(self.rate)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                texts = tuple(choose.choices(self.texts, k=choose.randint(1, MOST_TEXTS)))
                task = asyncio.create_task(self._request(client, choose.choice(self.models), texts))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                self.sent += 1
            await asyncio.gather(*tasks)

    async def _request(self, client: openai.AsyncOpenAI, model: str, texts: tuple[str, ...]) -> None:
        sent = time.monotonic()
        try:
            raw = await client.embeddings.with_raw_response.create(model=model, input=list(texts))
        except openai.OpenAIError as error:
            self.failures.append((sent, f"{type(error).__name__}: {error}"))
            return
        vectors = [item.embedding for item in raw.parse().data]
        seconds, context_id = time.monotonic() - sent, raw.headers["x-context-id"]
        self.answers.append(Answer(sent, seconds, raw.retries_taken, texts, context_id, vectors))
