"""The use case behind `/v1/embeddings`: names -> model and context, tokens -> the engine, vectors -> the answer."""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from app.building import Plan
from app.context_refs import parse_ref
from app.contexts import Contexts
from app.domain import DEFAULT_CONTEXT, Embeddings, InputType, Payload, TokenizedText
from app.embed_request import EmbedRequest, agreed, dimensions_of, input_type_of, quoted
from app.errors import (
    ContextModelMismatch,
    ContextNotFound,
    ContextRequired,
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    TokenIdsNotAccepted,
    UnknownContextNamed,
)
from app.registry import ModelChoice, Registry, ServedModel
from app.telemetry.metrics import count_embeddings
from app.telemetry.requests import note, part
from app.token_ids import Cl100k, VocabularyMissing
from app.tokenization import within
from app.tokenizer_threads import TokenizerThreads
from app.vector_cache import VectorCache
from app.vectors import finished

NO_LANGCHAIN_IDS = "Send strings instead; in LangChain: OpenAIEmbeddings(..., check_embedding_ctx_length=False)."


@dataclass(frozen=True, slots=True)
class EmbedPolicy:
    """What the operator decided about requests; see settings.py."""

    max_tokens: int
    truncate: str
    integers: str
    default_context: str
    require_context: bool


@dataclass(frozen=True, slots=True)
class _Resolved:
    """A context: its id, and its arrays, or the plan to make them of documents that were sent along."""

    id: str
    source: Payload | Plan
    name: str | None = None
    fell_back: bool = False
    stale: bool = False


class EmbeddingService:
    """Embeds texts under contexts."""

    def __init__(
        self,
        registry: Registry,
        contexts: Contexts,
        vectors: VectorCache,
        threads: TokenizerThreads,
        policy: EmbedPolicy,
    ) -> None:
        self.registry = registry
        self.threads = threads
        self._contexts = contexts
        self._vectors = vectors
        self._policy = policy
        self._cl100k = Cl100k()

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Raises the InvalidRequest family, NotFound, FingerprintMismatch, QueueFull, Unavailable, ServerFault.

        At the caller's deadline, and when it is cancelled, what still waits for the device is dropped.
        """
        deadline = request.caller.deadline
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                return await self._embed(request)
        except TimeoutError:
            raise DeadlineExceeded(
                "The request was not answered in its time (x-timeout-ms, or the server's default). Please try again, "
                "with fewer texts or more time."
            ) from None

    async def _embed(self, request: EmbedRequest) -> Embeddings:
        choice = self.registry.choose(request.model)
        served = choice.served
        note(model=served.id)
        dimensions = dimensions_of(served, request.dimensions)
        input_type = input_type_of(choice, request.input_types)
        with part("tokenize"):
            tokens = await self._tokenized(request, served, input_type)
        prompt_tokens = sum(len(text.input_ids) for text in tokens)
        note(inputs=len(tokens), tokens=prompt_tokens)
        with part("context"):
            context = await self._context(choice, request)
        note(context_id=context.id)
        fingerprint = served.spec.fingerprint(context.id, dimensions, normalized=request.normalize)
        if request.expect_fingerprint not in (None, fingerprint):
            raise FingerprintMismatch(
                f"These vectors would have fingerprint {fingerprint}, not the expected one: model, context or options "
                f"differ from the ones the index was made with.",
                param="x-expect-fingerprint",
            )
        with part("context"):
            payload = context.source
            if isinstance(payload, Plan):
                payload = await self._contexts.inline(served, payload, request.caller, request.namespace)
        with part("compute"):
            raw = await self._vectors.embed(served, tokens, payload, request.caller, request.namespace)
        embeddings = Embeddings(
            vectors=finished(raw, dimensions, normalize=request.normalize),
            prompt_tokens=prompt_tokens,
            compute_tokens=prompt_tokens + served.spec.context_rows * len(tokens),
            truncated_inputs=[i for i, text in enumerate(tokens) if text.truncated],
            model=request.model,
            context_id=context.id,
            context_name=context.name,
            fell_back=context.fell_back,
            fingerprint=fingerprint,
            stale=context.stale,
        )
        count_embeddings(served.id, len(tokens), prompt_tokens, truncated=len(embeddings.truncated_inputs))
        note(compute_tokens=embeddings.compute_tokens, truncated=len(embeddings.truncated_inputs))
        return embeddings

    async def _tokenized(
        self, request: EmbedRequest, served: ServedModel, input_type: InputType | None
    ) -> list[TokenizedText]:
        """Raises InvalidRequest and its kin."""
        tokenizer = served.tokenizer
        most: float = self._policy.max_tokens
        cut = (request.truncate or self._policy.truncate) == "end"
        texts, ids = request.texts, request.token_ids or ()
        if texts is None and self._policy.integers == "model":
            size = sum(map(len, ids))
            pieces = tokenizer.ids_in_pieces(ids, input_type, truncate=cut)
        else:
            if texts is None:
                # Clients that cut their requests by tokens count cl100k_base's; the model's own may be more.
                most = math.inf if sum(map(len, ids)) <= most else most
                texts = await self._decoded(ids)
            size = sum(map(len, texts))
            pieces = tokenizer.texts_in_pieces(texts, input_type, truncate=cut)
        return await self.threads.run(within(most, pieces), size, request.caller.client)

    async def _decoded(self, ids: Sequence[Sequence[int]]) -> list[str]:
        if self._policy.integers == "reject":
            raise TokenIdsNotAccepted(
                f"This server does not take token ids in 'input'. {NO_LANGCHAIN_IDS}", param="input"
            )
        try:
            return await asyncio.to_thread(self._cl100k.decode, ids)
        except VocabularyMissing as error:
            raise TokenIdsNotAccepted(
                f"Token ids in 'input' are read as tiktoken's cl100k_base, and this server has no copy of that "
                f"vocabulary. {NO_LANGCHAIN_IDS}",
                param="input",
            ) from error
        except ValueError as error:
            raise InvalidRequest(f"Invalid 'input': {error}.", param="input") from error

    async def _context(self, choice: ModelChoice, request: EmbedRequest) -> _Resolved:
        sources = dict(request.contexts)
        if choice.context is not None:
            sources["model"] = choice.context
        if request.inline_documents is not None:
            if sources:
                raise InvalidRequest(
                    f"Documents came in 'context', and {quoted(sources)} names a stored context. Send one of them.",
                    param="context",
                )
            plan = await self._contexts.plan_inline(choice.served, request.inline_documents, request.caller)
            return _Resolved(plan.id, plan)
        text = agreed("context", sources)
        if text is None:
            return await self._fallback(choice.served, request.namespace)
        ref = parse_ref(text, param=next(iter(sources)))
        try:
            info, payload = await self._contexts.resolve(choice.served, ref, request.namespace)
        except UnknownContextNamed as error:
            if "model" in sources:  # the model name as a whole names nothing
                raise ContextNotFound(error.message, param="model") from error
            raise
        return _Resolved(info.id, payload, info.name, stale=info.stale)

    async def _fallback(self, served: ServedModel, namespace: str) -> _Resolved:
        name = self._policy.default_context
        if self._policy.require_context:
            raise ContextRequired(
                "This server wants a context named in every request: 'context' in the body, the header X-Context, or "
                "MODEL@CONTEXT as the model.",
                param="context",
            )
        try:
            info, payload = await self._contexts.resolve(served, parse_ref(name), namespace)
        except (UnknownContextNamed, ContextModelMismatch) as error:
            raise ContextRequired(
                f"There is no default context '{name}' for {served.id} yet. Name a context, or create '{name}'.",
                param="context",
            ) from error
        return _Resolved(info.id, payload, info.name, fell_back=name == DEFAULT_CONTEXT, stale=info.stale)
