"""The same tokenizer, engine and model code as the server's, without the server: for the command line."""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from types import TracebackType
from typing import Self

from app.building import ContextBuilder
from app.catalog import neutral_documents
from app.domain import Arrays, FloatArray, InputType, ModelSpec, Payload, Selection, Stage, TokenizedText
from app.engine.engine import Engine, EngineOptions
from app.errors import ServiceError
from app.models.base import check_arrays
from app.models.loading import LoadOptions, load_model
from app.payloads import id_of_arrays
from app.registry import ServedModel
from app.selection import Minicorpus, select
from app.settings import Settings
from app.tokenizer_threads import TokenizerThreads

CHUNK = 256
IN_FLIGHT = 3
"""Chunks tokenized ahead of the device."""
STOP_SECONDS = 60.0


class Offline:
    """One loaded model with its engine; a context manager."""

    def __init__(self, name: str, options: LoadOptions | None = None, *, workers: int = 0) -> None:
        """`workers`: threads that run batches; 0: as the server does it. Raises CheckpointError."""
        loaded = load_model(name, options)
        self.served = ServedModel((loaded.model.spec.id,), loaded.model, loaded.tokenizer)
        settings, device = Settings(), loaded.model.spec.device
        self.engine = Engine(
            [{self.served.id: loaded.model}],
            EngineOptions(
                batch_tokens=settings.engine.batch_tokens_on(device),
                queue_tokens=settings.limits.queue_tokens,
                cache_bytes=settings.contexts.cache_bytes,
                workers=workers or settings.engine.workers_on(device),
            ),
        )
        self.engine.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.engine.stop(timeout=0.0)  # what waits is given up
        # What runs is waited for in any case: an interpreter that ends beneath a forward aborts the process.
        self.engine.stop(timeout=STOP_SECONDS)

    @property
    def spec(self) -> ModelSpec:
        return self.served.spec

    def context_of(self, documents: Iterable[str], selection: Selection) -> Payload:
        """A context chosen from documents, through the first stage."""
        limit = self.spec.max_characters
        return asyncio.run(self._built(select(documents, selection, self.spec.corpus_size, max_characters=limit)))

    def default_context(self) -> Payload:
        """What answers a request that names none."""
        fallback = self.spec.fallback_documents
        documents = neutral_documents() if fallback is None else fallback
        minicorpus = select(documents, Selection("first"), self.spec.corpus_size)
        return asyncio.run(self._built(minicorpus, allow_empty=True))

    def context_from(self, arrays: Arrays) -> Payload:
        """Raises InvalidContext."""
        check_arrays(self.served.model, arrays)
        return Payload(id_of_arrays(self.spec, arrays), arrays)

    def embed(
        self, texts: Iterable[str], context: Payload, input_type: InputType, *, truncate: bool, first: int = 0
    ) -> Iterator[FloatArray]:
        """Raw vectors, chunk by chunk (up to 256, hidden_size), in the order of the texts.

        `first`: how many came before, as an error counts them. Raises ContextLengthExceeded unless `truncate`.
        """
        stream, before = iter(texts), first
        running: deque[Future[FloatArray]] = deque()
        refused: ServiceError | None = None
        while chunk := list(islice(stream, CHUNK)):
            try:
                tokens = self.served.tokenizer.texts(chunk, input_type, truncate=truncate, first=before)
            except ServiceError as error:  # what came before it is still answered
                refused = error
                break
            before += len(chunk)
            running.append(self.submit(Stage.SECOND, tokens, context))
            if len(running) == IN_FLIGHT:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
        if refused is not None:
            raise refused

    def submit(self, stage: Stage, tokens: Sequence[TokenizedText], context: Payload) -> "Future[FloatArray]":
        return self.engine.submit(self.served.id, stage, tokens, context)

    async def _built(self, minicorpus: Minicorpus, *, allow_empty: bool = False) -> Payload:
        builder = ContextBuilder(self.engine, TokenizerThreads())
        plan = await builder.plan(self.served, minicorpus, param="documents", client="", allow_empty=allow_empty)
        outcome = await builder.build(self.served, plan)
        return Payload(outcome.id, outcome.arrays)
