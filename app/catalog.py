"""Contexts as resources: create, import, look at, export, roll back, delete."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files

from app.building import ContextBuilder, Plan
from app.builds import Builds, FailedElsewhere
from app.context_refs import check_name
from app.contexts import Contexts, check_completed, key_of
from app.domain import (
    DATASET_EMBEDDINGS,
    DEFAULT_CONTEXT,
    SHARED,
    Arrays,
    ContextInfo,
    ContextRef,
    ContextStatus,
    DocumentCounts,
    Page,
    Payload,
    Selection,
    Space,
)
from app.errors import ContextInUse, ContextNotFound, InvalidRequest
from app.models.base import InvalidContext, check_arrays
from app.payloads import id_of_arrays
from app.registry import ServedModel
from app.selection import Minicorpus, select
from app.stores.base import Begun, ContextStore, NewContext
from app.stores.threads import StoreThreads

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Creation:
    """What to make of documents, and for whom. `wait`: until it is built; else the answer is a version in progress.
    Raises InvalidRequest for a name that may not be one."""

    name: str
    metadata: Mapping[str, str]
    namespace: str = SHARED
    wait: bool = True

    def __post_init__(self) -> None:
        check_name(self.name)


class Catalog:
    """Everything callers do to contexts. Coroutines run on one event loop; the store in threads."""

    def __init__(
        self,
        contexts: Contexts,
        builder: ContextBuilder,
        store: ContextStore,
        threads: StoreThreads,
        *,
        keep_documents: bool = False,
        candidates: int = 0,
    ) -> None:
        """`candidates`: how many documents `diverse` chooses from, at least a context's."""
        self._contexts = contexts
        self._builder = builder
        self._store = store
        self._threads = threads
        self._builds = Builds(builder, store, threads, keep_documents=keep_documents)
        self._candidates = candidates

    def minicorpus(self, served: ServedModel, selection: Selection) -> Minicorpus:
        """Takes the documents of a context of this model."""
        spec = served.spec
        return Minicorpus(selection, spec.corpus_size, self._candidates, max_characters=spec.max_characters)

    async def plan(
        self, served: ServedModel, creation: Creation, minicorpus: Minicorpus, *, allow_empty: bool = False
    ) -> tuple[NewContext, Plan]:
        """What `create` would make. Raises InvalidRequest and its kin."""
        plan = await self._builder.plan(
            served, minicorpus, param="documents", client=f"namespace {creation.namespace}", allow_empty=allow_empty
        )
        spec = served.spec
        exact = spec.corpus_size_is_exact
        new = NewContext(
            id=plan.id,
            space=Space(served.id, creation.namespace),
            model_revision=spec.revision,
            name=creation.name,
            selection=plan.selection,
            documents=plan.counts,
            corpus_size=spec.corpus_size if exact else min(spec.corpus_size, plan.total),
            dimensions=spec.hidden_size,
            metadata=creation.metadata,
            total=plan.total,
        )
        return new, plan

    async def create(
        self, served: ServedModel, creation: Creation, minicorpus: Minicorpus, *, allow_empty: bool = False
    ) -> tuple[ContextInfo, bool]:
        """A version from documents; False where this content is there already. Raises InvalidRequest and its kin,
        BuildsFull."""
        self._builds.check_room(creation.namespace)  # before any work
        new, plan = await self.plan(served, creation, minicorpus, allow_empty=allow_empty)
        while True:
            info, begun = await self._builds.begin(served, new, plan)
            self._contexts.forget(new.space, name=new.name)
            if begun is Begun.THERE or not creation.wait:
                break
            with suppress(FailedElsewhere):  # then as who asks again: it is begun here
                info = await self._builds.finished(info)
                self._contexts.forget(new.space, name=new.name)
                break
        return info, begun is Begun.OURS

    async def import_arrays(self, served: ServedModel, creation: Creation, arrays: Arrays) -> tuple[ContextInfo, bool]:
        """A version from arrays made elsewhere. Raises InvalidRequest."""
        try:
            await asyncio.to_thread(check_arrays, served.model, arrays)
        except InvalidContext as error:
            raise InvalidRequest(f"These arrays are no context of {served.id}: {error}.", param="body") from error
        new = NewContext(
            id=await asyncio.to_thread(id_of_arrays, served.spec, arrays),
            space=Space(served.id, creation.namespace),
            model_revision=served.spec.revision,
            name=creation.name,
            selection=Selection("import"),
            documents=DocumentCounts(),
            corpus_size=len(arrays[DATASET_EMBEDDINGS]),
            dimensions=served.spec.hidden_size,
            metadata=creation.metadata,
        )
        info, created = await self._threads.write(self._store.put, new, arrays)
        self._contexts.forget(new.space, name=new.name)
        self._contexts.keep(Payload(key_of(creation.namespace, info.id), arrays))
        return info, created

    async def get(self, space: Space, ref: ContextRef) -> ContextInfo:
        """In any state. Raises ContextNotFound."""
        info = await self._threads.read(self._store.get, space, ref)
        if info is None:
            raise ContextNotFound(f"The context '{ref.text}' does not exist for model {space.model}.", param="ref")
        return info

    async def texts(self, space: Space, ref: ContextRef) -> Sequence[str]:
        """The chosen documents. Raises ContextNotFound, also where they were not kept."""
        info = await self.get(space, ref)
        found = await self._threads.read(self._store.texts, info)
        if found is None:
            raise ContextNotFound(
                f"The documents of '{ref.text}' were not kept: the setting contexts.keep_documents decides when a "
                f"context is created.",
                param="ref",
            )
        return found

    async def export(self, space: Space, ref: ContextRef) -> tuple[ContextInfo, Arrays]:
        """Raises ContextNotFound, ContextNotReady."""
        info = await self.get(space, ref)
        check_completed(info, ref)
        arrays = await self._threads.read(self._store.arrays, info.id)
        if arrays is None:
            raise ContextNotFound(f"The context '{ref.text}' was deleted just now.", param="ref")
        return info, arrays

    async def list_current(
        self, namespace: str, served: ServedModel | None, *, after: str | None, limit: int, newest_first: bool
    ) -> Page[ContextInfo]:
        model = served.id if served else None
        page = await self._threads.read(
            self._store.list_current, namespace, model, after=after, limit=limit, newest_first=newest_first
        )
        if page is None:
            raise InvalidRequest(
                f"Invalid 'after': there is no context '{str(after)[:80]}'. Send the last_id of the page before.",
                param="after",
            )
        return page

    async def versions(self, space: Space, name: str) -> Sequence[ContextInfo]:
        found = await self._threads.read(self._store.versions, space, name)
        if not found:
            raise ContextNotFound(f"The context '{name}' does not exist for model {space.model}.", param="name")
        return found

    async def rollback(self, space: Space, name: str, version: int) -> ContextInfo:
        info = await self._threads.write(self._store.move, space, name, version)
        if info is None:
            raise ContextNotFound(f"The context '{name}' has no completed version {version}.", param="version")
        self._contexts.forget(space, name=name)
        return info

    async def delete(self, served: ServedModel, ref: ContextRef, namespace: str) -> None:
        """Raises ContextNotFound, ContextInUse."""
        if await self._contexts.answers(served, ref, namespace):
            raise ContextInUse(
                f"'{ref.text}' answers the requests that name no context, and is not deleted. Give it other documents "
                f"with POST /v1/contexts, or have another one answer: the setting contexts.default.",
                param="ref",
            )
        space = Space(served.id, namespace)
        if ref.name is not None and ref.version is None:
            deleted: bool | None = await self._threads.write(self._store.delete_name, space, ref.name) or None
        else:
            deleted = await self._threads.write(self._store.delete_versions, space, ref)
        self._contexts.forget(space, name=ref.name, context_id=ref.id)
        if deleted is None:
            raise ContextNotFound(f"The context '{ref.text}' does not exist for model {space.model}.", param="ref")
        if deleted is False:
            raise ContextInUse(
                f"'{ref.text}' is the version its name points at. Delete the name, or point it elsewhere first "
                f"(POST /v1/contexts/NAME/rollback).",
                param="ref",
            )

    async def close(self) -> None:
        """Ends what is being built."""
        await self._builds.close()

    async def ensure_default(self, served: ServedModel) -> bool:
        """Builds the model's own fallback where no usable `default` is stored. False: it cannot be built here."""
        spec = served.spec
        info = await self._threads.read(
            self._store.get, Space(served.id), ContextRef(DEFAULT_CONTEXT, name=DEFAULT_CONTEXT)
        )
        completed = info is not None and info.status is ContextStatus.COMPLETED
        if info is not None and completed and info.model_revision == spec.revision:
            return True
        if not spec.has_first_stage:
            return False
        if completed:
            log.warning("the context %r of %s was made with other weights, and is made anew from the model's own "
                        "documents; if it was made from yours, create it again", DEFAULT_CONTEXT,
                        served.id)  # fmt: skip
        documents = neutral_documents() if spec.fallback_documents is None else spec.fallback_documents
        minicorpus = select(documents, Selection("first"), spec.corpus_size)
        await self.create(served, Creation(DEFAULT_CONTEXT, {}), minicorpus, allow_empty=True)
        return True


def neutral_documents() -> list[str]:
    """The list behind the default context of a checkpoint that ships none."""
    return files("app").joinpath("data/neutral_documents.txt").read_text(encoding="utf-8").splitlines()
