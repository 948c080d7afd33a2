"""What a context store keeps and promises. One contract suite (`tests/contract`) runs over every store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from app.domain import Arrays, ContextInfo, ContextRef, DocumentCounts, Page, Selection


@dataclass(frozen=True, slots=True)
class NewContext:
    """A built or imported context, before it has a version."""

    id: str
    model: str
    model_revision: str
    name: str
    selection: Selection
    documents: DocumentCounts
    corpus_size: int
    dimensions: int
    metadata: Mapping[str, str] = field(default_factory=dict)


class ContextStore(Protocol):
    """Thread-safe and synchronous; callers use the thread pool. Names belong to a model.

    Every method raises StoreError when the store cannot answer. A method that returns has its effect on disk.
    """

    def put(self, new: NewContext, arrays: Arrays) -> tuple[ContextInfo, bool]:
        """Stores a version and points its name at it, in one transaction. True: it is new.

        The same content under the same name is the version that is there; the name points at it again.
        """

    def get(self, model: str, ref: ContextRef) -> ContextInfo | None:
        """By id (the newest version with it), name (the version it points at) or name.version."""

    def models_of(self, ref: ContextRef) -> Sequence[str]:
        """Which models have a context `ref`."""

    def arrays(self, context_id: str) -> Arrays | None:
        """The payload, checked against its checksum."""

    def list_current(self, model: str | None, *, after: str | None, limit: int, newest_first: bool) -> Page | None:
        """The version each name points at. `after`: the id of the last one seen; None where there is no such context.

        A page may be longer than `limit` where several names hold the same content: they are never parted.
        """

    def versions(self, model: str, name: str) -> Sequence[ContextInfo]:
        """Newest first; empty where there is no such name."""

    def move(self, model: str, name: str, version: int) -> ContextInfo | None:
        """Points a name at one of its versions."""

    def delete_name(self, model: str, name: str) -> bool:
        """A name and all its versions; False where there is none."""

    def delete_versions(self, model: str, ref: ContextRef) -> bool | None:
        """The versions of an id or name.version. None: there is none. False: a name points at one, nothing is done."""

    def close(self) -> None: ...
