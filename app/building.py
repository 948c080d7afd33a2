"""Documents -> a context: token ids, the id they make, the first stage in slices, and the choice of diverse ones."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from app.domain import (
    BACKGROUND,
    DATASET_EMBEDDINGS,
    SHARED,
    Arrays,
    Caller,
    DocumentCounts,
    FloatArray,
    InputType,
    Payload,
    Selection,
    Stage,
    TokenizedText,
)
from app.engine.engine import Engine
from app.errors import FirstStageUnavailable, InvalidRequest, QueueFull
from app.payloads import id_of_candidates, id_of_documents
from app.registry import ServedModel
from app.selection import Minicorpus, farthest_first, repeated
from app.telemetry.metrics import FIRST_STAGE_DOCUMENTS
from app.tokenizer_threads import TokenizerThreads

SLICE = 16
"""Documents of one first-stage submission: small, so that queries pass between them."""

Progress = Callable[[int], None]
"""Told how many documents are through the first stage."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A context before its first stage. `id`: of the chosen documents; of the candidates while `diverse` has to choose.
    `documents`: the texts of `tokens`; None where they are not kept."""

    id: str
    documents: Sequence[str] | None
    tokens: Sequence[TokenizedText]
    selection: Selection
    counts: DocumentCounts
    corpus_size: int

    @property
    def is_chosen(self) -> bool:
        """Whether the documents are the context's, and no candidates."""
        return self.selection.method != "diverse" or self.total <= self.corpus_size

    @property
    def total(self) -> int:
        """Documents that go through the first stage."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A context behind its first stage."""

    id: str
    arrays: Arrays
    documents: Sequence[str] | None
    selection: Selection
    counts: DocumentCounts


_Key = tuple[str, str, str, bool]
"""Of a first stage under way: namespace, model, id, and whether it is in the background."""


@dataclass(eq=False, slots=True)
class _Build:
    """A first stage under way, and how many wait for it."""

    task: asyncio.Task[Arrays]
    waiting: int = 0


class ContextBuilder:
    """Runs first stages on the engine; equal contexts that a namespace asks for at once are built once. For one event
    loop."""

    def __init__(self, engine: Engine, threads: TokenizerThreads) -> None:
        self._engine = engine
        self._threads = threads
        self._building: dict[_Key, _Build] = {}

    async def plan(
        self,
        served: ServedModel,
        minicorpus: Minicorpus,
        *,
        param: str,
        client: str,
        allow_empty: bool = False,
    ) -> Plan:
        """Tokens and id. `client`: whose turn it takes. Raises InvalidRequest where no document has text."""
        documents, spec = minicorpus.documents(), served.spec
        if not documents and not allow_empty:
            raise InvalidRequest(f"Invalid '{param}': at least one document with text is needed.", param=param)
        pieces = served.tokenizer.texts_in_pieces(documents, InputType.DOCUMENT, truncate=True)
        tokens = await self._threads.run(pieces, sum(map(len, documents)), client)
        plan = Plan("", documents, tokens, minicorpus.selection, minicorpus.counts(), spec.corpus_size)
        prompt = spec.prompts[InputType.DOCUMENT]
        if plan.is_chosen:
            if plan.selection.method == "diverse":  # nothing is left out
                everything = replace(plan.selection, candidates=len(documents), coverage_radius=0.0)
                plan = replace(plan, selection=everything)
            return _chosen(replace(plan, id=id_of_documents(spec, prompt, tokens)), served)
        return replace(plan, id=id_of_candidates(spec, prompt, tokens, plan.selection))

    async def build(
        self,
        served: ServedModel,
        plan: Plan,
        progress: Progress = lambda _: None,
        caller: Caller = BACKGROUND,
        *,
        namespace: str = SHARED,
    ) -> Outcome:
        """The first stage over all documents for this namespace. One that is waited for never waits for one in the
        background. It ends when nobody waits for it any more.

        Raises FirstStageUnavailable, and what the engine raises."""
        if not served.spec.has_first_stage:
            raise FirstStageUnavailable(
                f"{served.spec.id} is served without its first stage: import dataset embeddings with "
                f"PUT /v1/contexts/NAME/embeddings instead.",
                param="documents",
            )
        known: Mapping[TokenizedText, FloatArray] = {}
        if not plan.is_chosen:
            plan, known = await self._diverse(served, plan, progress, caller)
        own = (namespace, served.id, plan.id)  # one that is served in two precisions has two first stages
        key = (*own, caller.background and (*own, False) not in self._building)
        build = self._building.get(key)
        if build is None:
            whole = replace(caller, deadline=None)  # others may join, and wait longer
            build = _Build(asyncio.create_task(self._first_stage(served, plan, known, progress, whole)))
            self._building[key] = build
            build.task.add_done_callback(lambda _: self._over(key, build))
        return Outcome(plan.id, await self._awaited(key, build), plan.documents, plan.selection, plan.counts)

    async def _awaited(self, key: _Key, build: _Build) -> Arrays:
        build.waiting += 1
        try:
            return await asyncio.shield(build.task)
        finally:
            build.waiting -= 1
            if build.waiting == 0:
                self._over(key, build)  # first: nobody may join what is cancelled
                build.task.cancel()  # nothing, where it is done

    def _over(self, key: _Key, build: _Build) -> None:
        if self._building.get(key) is build:
            del self._building[key]

    async def _diverse(
        self, served: ServedModel, plan: Plan, progress: Progress, caller: Caller
    ) -> tuple[Plan, Mapping[TokenizedText, FloatArray]]:
        """The plan of the documents that lie farthest apart, and the vectors that need no second computation."""
        corpus, vectors = await self._vectors(served, plan, {}, progress, caller)
        chosen, radius = await asyncio.to_thread(farthest_first, np.stack(vectors), plan.corpus_size)
        tokens = [plan.tokens[i] for i in chosen]
        selection = replace(plan.selection, candidates=plan.total, coverage_radius=radius)
        counts = replace(plan.counts, chosen=len(chosen))
        fewer = replace(
            plan,
            id=id_of_documents(served.spec, served.spec.prompts[InputType.DOCUMENT], tokens),
            documents=None if plan.documents is None else [plan.documents[i] for i in chosen],
            tokens=tokens,
            selection=selection,
            counts=counts,
        )
        known = {} if corpus else dict(zip(plan.tokens, vectors, strict=True))
        return _chosen(fewer, served), known

    async def _first_stage(
        self,
        served: ServedModel,
        plan: Plan,
        known: Mapping[TokenizedText, FloatArray],
        progress: Progress,
        caller: Caller,
    ) -> Arrays:
        corpus, rows = await self._vectors(served, plan, known, progress, caller)
        if served.spec.corpus_size_is_exact:
            rows = repeated(rows, served.spec.corpus_size)
        embeddings = np.stack(rows) if rows else np.empty((0, served.spec.hidden_size), np.float32)
        return {**corpus, DATASET_EMBEDDINGS: embeddings}

    async def _vectors(
        self,
        served: ServedModel,
        plan: Plan,
        known: Mapping[TokenizedText, FloatArray],
        progress: Progress,
        caller: Caller,
    ) -> tuple[Arrays, list[FloatArray]]:
        """What the first stage takes from all documents together, and their vectors (hidden_size,), in order."""
        corpus = await asyncio.to_thread(served.model.corpus_arrays, plan.tokens)
        payload = Payload(f"{plan.id}:corpus", corpus)
        vectors = dict(known)
        missing = [text for text in plan.tokens if text not in vectors]
        for start in range(0, len(missing), SLICE):
            some = missing[start : start + SLICE]
            vectors |= zip(some, await self._slice(served, some, payload, caller), strict=True)
            FIRST_STAGE_DOCUMENTS.labels(served.id).inc(len(some))
            progress(min(plan.total, start + len(some)))
        return corpus, [vectors[text] for text in plan.tokens]

    async def _slice(
        self, served: ServedModel, tokens: Sequence[TokenizedText], payload: Payload, caller: Caller
    ) -> FloatArray:
        while True:
            try:
                future = self._engine.submit(served.id, Stage.FIRST, tokens, payload, caller=caller)
            except QueueFull:  # requests come first; a build waits for room
                await asyncio.sleep(0.2)
            else:
                return await asyncio.wrap_future(future)


def _chosen(plan: Plan, served: ServedModel) -> Plan:
    """With the counts that are known once the documents are."""
    spec = served.spec
    short = spec.corpus_size - len(plan.tokens) if spec.corpus_size_is_exact else 0
    truncated = sum(text.truncated for text in plan.tokens)
    return replace(plan, counts=replace(plan.counts, truncated=truncated, repeated=short))
