"""The use case behind `/v1/embeddings`: names -> model and context, tokens -> the engine, vectors -> the answer."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from app.contexts import Contexts
from app.domain import DEFAULT_CONTEXT, SHARED, ContextInfo, Embeddings, InputType, Payload, TokenizedText
from app.errors import (
    ContextModelMismatch,
    ContextNotFound,
    ContextRequired,
    FingerprintMismatch,
    InvalidRequest,
    TokenIdsNotAccepted,
    TooManyTokens,
    UnknownContextNamed,
)
from app.registry import ModelChoice, Registry, ServedModel, parse_ref
from app.telemetry.metrics import count_embeddings
from app.telemetry.requests import note, part
from app.token_ids import Cl100k, VocabularyMissing
from app.vector_cache import VectorCache
from app.vectors import finished

NO_LANGCHAIN_IDS = "Send strings instead; in LangChain: OpenAIEmbeddings(..., check_embedding_ctx_length=False)."


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """One request, parsed. `contexts` and `input_types`: every source that named one, to be held against each other."""

    model: str
    texts: Sequence[str] | None = None
    token_ids: Sequence[Sequence[int]] | None = None
    inline_documents: Sequence[str] | None = None
    contexts: Mapping[str, str] = field(default_factory=dict)
    input_types: Mapping[str, str] = field(default_factory=dict)
    truncate: str | None = None
    dimensions: int | None = None
    normalize: bool = True
    expect_fingerprint: str | None = None
    namespace: str = SHARED
    """Whose contexts are seen."""
    background: bool = False
    """Computed when nobody waits."""


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
    """A context: its id now, its arrays when they are needed."""

    id: str
    load: Callable[[], Awaitable[Payload]]
    name: str | None
    fell_back: bool = False

    @classmethod
    def stored(cls, info: ContextInfo, payload: Payload, *, fell_back: bool = False) -> "_Resolved":
        async def load() -> Payload:
            return payload

        return cls(info.id, load, info.name, fell_back)


class EmbeddingService:
    """Embeds texts under contexts."""

    def __init__(self, registry: Registry, contexts: Contexts, vectors: VectorCache, policy: EmbedPolicy) -> None:
        self.registry = registry
        self._contexts = contexts
        self._vectors = vectors
        self._policy = policy
        self._cl100k = Cl100k()

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Raises the InvalidRequest family, NotFound, FingerprintMismatch, QueueFull, Unavailable, ServerFault."""
        choice = self.registry.choose(request.model)
        served = choice.served
        note(model=served.id)
        dimensions = _dimensions(served, request.dimensions)
        input_type = _input_type(choice, request.input_types)
        truncate = request.truncate or self._policy.truncate
        with part("tokenize"):
            tokens = await self.tokenize(served, request.texts, request.token_ids, input_type, truncate=truncate)
        prompt_tokens = sum(len(text.input_ids) for text in tokens)
        note(inputs=len(tokens), tokens=prompt_tokens)
        if prompt_tokens > self._policy.max_tokens:
            raise TooManyTokens(
                f"Invalid 'input': {prompt_tokens} tokens requested, at most {self._policy.max_tokens} fit in one "
                f"request. Send fewer texts at a time.",
                param="input",
            )
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
            payload = await context.load()
        with part("compute"):
            raw = await self._vectors.embed(served, tokens, payload, background=request.background)
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
        )
        count_embeddings(served.id, len(tokens), prompt_tokens, truncated=len(embeddings.truncated_inputs))
        note(compute_tokens=embeddings.compute_tokens, truncated=len(embeddings.truncated_inputs))
        return embeddings

    async def tokenize(
        self,
        served: ServedModel,
        texts: Sequence[str] | None,
        token_ids: Sequence[Sequence[int]] | None,
        input_type: InputType | None,
        *,
        truncate: str,
    ) -> list[TokenizedText]:
        """Exactly one of `texts` and `token_ids` is given. Raises InvalidRequest and its kin."""
        default, cut = served.spec.default_input_type, truncate == "end"
        if texts is None:
            ids = token_ids or []
            if self._policy.integers == "model":
                return await asyncio.to_thread(served.tokenizer.ids, ids, input_type, default, truncate=cut)
            texts = await self._decoded(ids)
        return await asyncio.to_thread(served.tokenizer.texts, texts, input_type, default, truncate=cut)

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
                    f"Documents came in 'context', and {_named(sources)} names a stored context. Send one of them.",
                    param="context",
                )
            inline = await self._contexts.inline(choice.served, request.inline_documents, background=request.background)
            return _Resolved(inline.id, inline.load, None)
        text = _agreed("context", sources)
        if text is None:
            return await self._fallback(choice.served, request.namespace)
        ref = parse_ref(text, param=next(iter(sources)))
        try:
            info, payload = await self._contexts.resolve(choice.served, ref, request.namespace)
        except UnknownContextNamed as error:
            if "model" in sources:  # the model name as a whole names nothing
                raise ContextNotFound(error.message, param="model") from error
            raise
        return _Resolved.stored(info, payload)

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
        return _Resolved.stored(info, payload, fell_back=name == DEFAULT_CONTEXT)


def _agreed(what: str, sources: Mapping[str, str]) -> str | None:
    values = set(sources.values())
    if len(values) > 1:
        raise InvalidRequest(f"{_named(sources)} name different {what}s. Send one of them.", param=next(iter(sources)))
    return values.pop() if values else None


def _named(sources: Mapping[str, str]) -> str:
    return " and ".join(f"'{source}' ({value[:80]})" for source, value in sources.items())


def _input_type(choice: ModelChoice, sources: Mapping[str, str]) -> InputType | None:
    named = dict(sources)
    if choice.input_type is not None:
        named["model"] = choice.input_type.value
    text = _agreed("input type", named)
    if text is None:
        return None
    try:
        return InputType(text)
    except ValueError as error:
        raise InvalidRequest(
            "Invalid input type: it is 'query', 'document' or 'none'.", param=next(iter(named))
        ) from error


def _dimensions(served: ServedModel, asked: int | None) -> int:
    native = served.spec.hidden_size
    if asked is None or asked == native:
        return native
    if served.matryoshka and asked < native:
        return asked
    allowed = f"1 to {native}" if served.matryoshka else f"{native} (or leave it out)"
    raise InvalidRequest(f"Invalid 'dimensions': {served.id} gives vectors of {allowed}.", param="dimensions")
