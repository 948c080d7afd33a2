"""Use cases around contexts: build, import, export, resolve, move, delete."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from importlib.resources import files

from cachetools import LRUCache, TTLCache

from app.building import ContextBuilder
from app.domain import (
    DATASET_EMBEDDINGS,
    DEFAULT_CONTEXT,
    Arrays,
    ContextInfo,
    ContextRef,
    DocumentCounts,
    Page,
    Payload,
    Selection,
)
from app.engine.engine import Engine
from app.errors import (
    ContextInUse,
    ContextModelMismatch,
    ContextNotFound,
    InvalidRequest,
    UnknownContextNamed,
)
from app.models.base import InvalidContext, check_arrays
from app.payloads import id_of_arrays
from app.registry import Registry, ServedModel, check_name
from app.selection import Minicorpus, select
from app.stores.base import ContextStore, NewContext

log = logging.getLogger(__name__)

NAME_SECONDS = 0.5
"""How long a name's target is believed before the store is asked again; another process may have moved it."""


class ContextService:
    """All that is done with contexts, for one process. Coroutines run on one event loop; the store in threads."""

    def __init__(self, registry: Registry, engine: Engine, store: ContextStore, *, cache_bytes: int) -> None:
        self._registry = registry
        self._builder = ContextBuilder(engine)
        self._store = store
        self._infos: TTLCache[tuple[str, str], ContextInfo] = TTLCache(4096, NAME_SECONDS)
        self._generation = 0
        self._payloads: LRUCache[str, Payload] = LRUCache(
            cache_bytes, getsizeof=lambda p: sum(a.nbytes for a in p.arrays.values()) + 1
        )

    async def resolve(self, served: ServedModel, ref: ContextRef) -> tuple[ContextInfo, Payload]:
        """The version `ref` means now, and its arrays. Raises UnknownContextNamed, ContextModelMismatch."""
        info = await self._find(served, ref)
        if info is None:
            await self._explain_missing(served, ref)
            raise UnknownContextNamed(
                f"The context '{ref.text}' does not exist for model {served.id}. POST /v1/contexts creates it.",
                param="context",
            )
        if info.model_revision != served.spec.revision:
            raise ContextModelMismatch(
                f"The context '{ref.text}' was made with other weights of {served.id} than the ones that are served. "
                f"Create it again from its documents.",
                param="context",
            )
        payload = self._payloads.get(info.id)
        if payload is None:
            arrays = await asyncio.to_thread(self._store.arrays, info.id)
            if arrays is None:  # deleted since it was found
                self._forget()
                return await self.resolve(served, ref)
            payload = self._keep(Payload(info.id, arrays))
        return info, payload

    async def inline(self, served: ServedModel, documents: Sequence[str]) -> Payload:
        """Documents sent with a request, through the first stage once, then kept by content."""
        minicorpus = await asyncio.to_thread(select, documents, Selection(), served.spec.corpus_size)
        context_id, tokens = await self._builder.identify(served, minicorpus, param="context")
        payload = self._payloads.get(context_id)
        if payload is None:
            payload = self._keep(Payload(context_id, await self._builder.build(served, context_id, tokens)))
        return payload

    async def create(
        self,
        served: ServedModel,
        name: str,
        minicorpus: Minicorpus,
        selection: Selection,
        metadata: Mapping[str, str],
        *,
        allow_empty: bool = False,
    ) -> tuple[ContextInfo, bool]:
        """A version from documents; False where this content is there already. Raises InvalidRequest and its kin."""
        check_name(name)
        context_id, tokens = await self._builder.identify(
            served, minicorpus, param="documents", allow_empty=allow_empty
        )
        known = await asyncio.to_thread(self._store.arrays, context_id)
        arrays = known or await self._builder.build(served, context_id, tokens)
        spec = served.spec
        short = spec.corpus_size - len(tokens) if spec.corpus_size_is_exact else 0
        new = NewContext(
            id=context_id,
            model=served.id,
            model_revision=spec.revision,
            name=name,
            selection=selection,
            documents=minicorpus.counts(truncated=sum(t.truncated for t in tokens), repeated=short),
            corpus_size=len(arrays[DATASET_EMBEDDINGS]),
            dimensions=spec.hidden_size,
            metadata=metadata,
        )
        return await self._put(new, arrays)

    async def import_arrays(
        self, served: ServedModel, name: str, arrays: Arrays, metadata: Mapping[str, str]
    ) -> tuple[ContextInfo, bool]:
        """A version from arrays made elsewhere. Raises InvalidRequest."""
        check_name(name)
        try:
            await asyncio.to_thread(check_arrays, served.model, arrays)
        except InvalidContext as error:
            raise InvalidRequest(f"These arrays are no context of {served.id}: {error}.", param="body") from error
        new = NewContext(
            id=await asyncio.to_thread(id_of_arrays, served.spec, arrays),
            model=served.id,
            model_revision=served.spec.revision,
            name=name,
            selection=Selection("import"),
            documents=DocumentCounts(),
            corpus_size=len(arrays[DATASET_EMBEDDINGS]),
            dimensions=served.spec.hidden_size,
            metadata=metadata,
        )
        return await self._put(new, arrays)

    async def get(self, served: ServedModel, ref: ContextRef) -> ContextInfo:
        """Raises ContextNotFound."""
        info = await asyncio.to_thread(self._store.get, served.id, ref)
        if info is None:
            raise ContextNotFound(f"The context '{ref.text}' does not exist for model {served.id}.", param="ref")
        return info

    async def export(self, served: ServedModel, ref: ContextRef) -> tuple[ContextInfo, Arrays]:
        info = await self.get(served, ref)
        arrays = await asyncio.to_thread(self._store.arrays, info.id)
        if arrays is None:
            raise ContextNotFound(f"The context '{ref.text}' was deleted just now.", param="ref")
        return info, arrays

    async def list_current(
        self, served: ServedModel | None, *, after: str | None, limit: int, newest_first: bool
    ) -> Page:
        model = served.id if served else None
        page = await asyncio.to_thread(
            self._store.list_current, model, after=after, limit=limit, newest_first=newest_first
        )
        if page is None:
            raise InvalidRequest(f"Invalid 'after': there is no context '{after}'.", param="after")
        return page

    async def versions(self, served: ServedModel, name: str) -> Sequence[ContextInfo]:
        found = await asyncio.to_thread(self._store.versions, served.id, name)
        if not found:
            raise ContextNotFound(f"The context '{name}' does not exist for model {served.id}.", param="name")
        return found

    async def rollback(self, served: ServedModel, name: str, version: int) -> ContextInfo:
        info = await asyncio.to_thread(self._store.move, served.id, name, version)
        if info is None:
            raise ContextNotFound(f"The context '{name}' has no version {version}.", param="version")
        self._forget()
        return info

    async def delete(self, served: ServedModel, ref: ContextRef) -> None:
        """Raises ContextNotFound, ContextInUse."""
        if ref.name is not None and ref.version is None:
            deleted: bool | None = await asyncio.to_thread(self._store.delete_name, served.id, ref.name) or None
        else:
            deleted = await asyncio.to_thread(self._store.delete_versions, served.id, ref)
        self._forget()
        if deleted is None:
            raise ContextNotFound(f"The context '{ref.text}' does not exist for model {served.id}.", param="ref")
        if deleted is False:
            raise ContextInUse(
                f"'{ref.text}' is the version its name points at. Delete the name, or point it elsewhere first "
                f"(POST /v1/contexts/NAME/rollback).",
                param="ref",
            )

    async def ensure_default(self, served: ServedModel) -> bool:
        """Builds the model's own fallback where no usable `default` is stored. False: it cannot be built here."""
        spec = served.spec
        info = await self._find(served, ContextRef(DEFAULT_CONTEXT, name=DEFAULT_CONTEXT))
        if info is not None and info.model_revision == spec.revision:
            return True
        if not spec.has_first_stage:
            return False
        documents = neutral_documents() if spec.fallback_documents is None else spec.fallback_documents
        selection = Selection("first")
        minicorpus = select(documents, selection, spec.corpus_size)
        await self.create(served, DEFAULT_CONTEXT, minicorpus, selection, {}, allow_empty=True)
        return True

    async def _find(self, served: ServedModel, ref: ContextRef) -> ContextInfo | None:
        key = (served.id, ref.text)
        info = self._infos.get(key)
        if info is None:
            generation = self._generation
            info = await asyncio.to_thread(self._store.get, served.id, ref)
            if info is not None and generation == self._generation:  # nothing has moved while the store was asked
                self._infos[key] = info
        return info

    def _forget(self) -> None:
        self._infos.clear()
        self._generation += 1

    async def _explain_missing(self, served: ServedModel, ref: ContextRef) -> None:
        others = [m for m in await asyncio.to_thread(self._store.models_of, ref) if m != served.id]
        if others:
            raise ContextModelMismatch(
                f"The context '{ref.text}' belongs to {', '.join(others)}; it cannot be used with {served.id}.",
                param="context",
            )

    async def _put(self, new: NewContext, arrays: Arrays) -> tuple[ContextInfo, bool]:
        info, created = await asyncio.to_thread(self._store.put, new, arrays)
        self._forget()
        self._keep(Payload(info.id, arrays))
        log.info("context %s.%d is %s (%s)", info.name, info.version, info.id, "new" if created else "there already")
        return info, created

    def _keep(self, payload: Payload) -> Payload:
        if self._payloads.getsizeof(payload) <= self._payloads.maxsize:
            self._payloads[payload.key] = payload
        return payload


def neutral_documents() -> list[str]:
    """The list behind the default context of a checkpoint that ships none."""
    return files("app").joinpath("data/neutral_documents.txt").read_text(encoding="utf-8").splitlines()
