"""Documents -> a context's arrays: token ids, the id they make, and the first stage in slices."""

import asyncio
from collections.abc import Sequence

import numpy as np

from app.domain import DATASET_EMBEDDINGS, Arrays, FloatArray, InputType, Payload, Stage, TokenizedText
from app.engine.engine import Engine
from app.errors import FirstStageUnavailable, InvalidRequest, QueueFull
from app.payloads import id_of_documents
from app.registry import ServedModel
from app.selection import Minicorpus, repeated

SLICE = 16
"""Documents of one first-stage submission: small, so that queries pass between them."""


class ContextBuilder:
    """Runs first stages on the engine; equal contexts asked for at once are built once. For one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._building: dict[str, asyncio.Task[Arrays]] = {}

    async def identify(
        self, served: ServedModel, minicorpus: Minicorpus, *, param: str, allow_empty: bool = False
    ) -> tuple[str, list[TokenizedText]]:
        """The context's id and its documents' tokens. Raises InvalidRequest where no document has text."""
        documents, spec = minicorpus.documents(), served.spec
        if not documents and not allow_empty:
            raise InvalidRequest(f"Invalid '{param}': at least one document with text is needed.", param=param)
        tokens = await asyncio.to_thread(
            served.tokenizer.texts, documents, InputType.DOCUMENT, InputType.DOCUMENT, truncate=True
        )
        return id_of_documents(spec, spec.prompts[InputType.DOCUMENT], tokens), tokens

    async def build(self, served: ServedModel, context_id: str, tokens: Sequence[TokenizedText]) -> Arrays:
        """The first stage over all documents; equal contexts asked for at once are built once."""
        if not served.spec.has_first_stage:
            raise FirstStageUnavailable(
                f"{served.id} is served without its first stage: import dataset embeddings with "
                f"PUT /v1/contexts/NAME/embeddings instead.",
                param="documents",
            )
        task = self._building.get(context_id)
        if task is None:
            task = asyncio.create_task(self._first_stage(served, context_id, tokens))
            self._building[context_id] = task
            task.add_done_callback(lambda _: self._building.pop(context_id, None))
        return await asyncio.shield(task)

    async def _first_stage(self, served: ServedModel, context_id: str, tokens: Sequence[TokenizedText]) -> Arrays:
        corpus = await asyncio.to_thread(served.model.corpus_arrays, tokens)
        payload = Payload(f"{context_id}:corpus", corpus)
        rows: list[FloatArray] = []
        for start in range(0, len(tokens), SLICE):
            rows.extend(await self._slice(served, tokens[start : start + SLICE], payload))
        if served.spec.corpus_size_is_exact:
            rows = repeated(rows, served.spec.corpus_size)
        embeddings = np.stack(rows) if rows else np.empty((0, served.spec.hidden_size), np.float32)
        return {**corpus, DATASET_EMBEDDINGS: embeddings}

    async def _slice(self, served: ServedModel, tokens: Sequence[TokenizedText], payload: Payload) -> FloatArray:
        while True:
            try:
                future = self._engine.submit(served.id, Stage.FIRST, tokens, payload)
            except QueueFull:  # requests come first; a build waits for room
                await asyncio.sleep(0.2)
            else:
                return await asyncio.wrap_future(future)
