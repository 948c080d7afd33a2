"""What a context store keeps and promises. One contract suite (`tests/contract`) runs over every store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from app.domain import Arrays, ContextInfo, ContextRef, DocumentCounts, Page, Selection, Space

LEASE_SECONDS = 10.0
"""A version in progress whose builder gave no sign of life for so long has failed: its process is gone."""


@dataclass(frozen=True, slots=True)
class NewContext:
    """A context before it has a version. `id`: by its content, or, until the first stage has run, by what it is
    chosen from. `total`: documents that go through the first stage. `builder`: who builds it, if it is to be built;
    what they say of it counts until another one has taken over."""

    id: str
    space: Space
    model_revision: str
    name: str
    selection: Selection
    documents: DocumentCounts
    corpus_size: int
    dimensions: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    total: int = 0
    builder: str = ""


class Begun(Enum):
    """What `begin` found."""

    OURS = auto()
    """Nothing: the caller builds the version now."""
    THEIRS = auto()
    """Somebody is building it."""
    THERE = auto()
    """It is completed, and the name points at it."""


@dataclass(frozen=True, slots=True)
class Built:
    """What a build gives: the content's id, its arrays, and the report. `texts`: to be kept with it, or None."""

    id: str
    arrays: Arrays
    selection: Selection
    documents: DocumentCounts
    texts: Sequence[str] | None = None


class ContextStore(Protocol):
    """Thread-safe and synchronous; coroutines call it through StoreThreads.

    Every method raises StoreError when the store cannot answer. A method that returns has its effect on disk.
    A name points at its newest completed version, or at one it was moved to; while there is none, at its newest.
    """

    def begin(self, new: NewContext) -> tuple[ContextInfo, Begun]:
        """Reserves a version in progress, unless this content has one under this name; a failed one begins anew."""

    def beat(self, info: ContextInfo, builder: str, done: int) -> None:
        """The builder lives, and `done` documents are through."""

    def complete(self, info: ContextInfo, built: Built) -> ContextInfo | None:
        """The version is there. Where the name has this content already, that version stays and this one goes.
        None: it was deleted meanwhile."""

    def fail(self, info: ContextInfo, builder: str, reason: str) -> None:
        """The version in progress has failed; its name goes on pointing where it did."""

    def put(self, new: NewContext, arrays: Arrays) -> tuple[ContextInfo, bool]:
        """Stores a version and points its name at it, in one transaction. True: it is new.

        The same content under the same name is the version that is there; the name points at it again.
        """

    def get(self, space: Space, ref: ContextRef) -> ContextInfo | None:
        """By id (the newest completed version with it, else the newest), name (where it points) or name.version."""

    def models_of(self, namespace: str, ref: ContextRef) -> Sequence[str]:
        """Which models have a context `ref` there."""

    def arrays(self, context_id: str) -> Arrays | None:
        """The payload, checked against its checksum."""

    def texts(self, info: ContextInfo) -> Sequence[str] | None:
        """The chosen documents, where they were kept."""

    def list_current(
        self, namespace: str, model: str | None, *, after: str | None, limit: int, newest_first: bool
    ) -> Page[ContextInfo] | None:
        """The version each name points at. `after`: the id of the last one seen; None where there is no such context.

        A page may be longer than `limit` where several names hold the same content: they are never parted.
        """

    def versions(self, space: Space, name: str) -> Sequence[ContextInfo]:
        """Newest first; empty where there is no such name."""

    def move(self, space: Space, name: str, version: int) -> ContextInfo | None:
        """Points a name at one of its completed versions; None where there is none."""

    def delete_name(self, space: Space, name: str) -> bool:
        """A name and all its versions; False where there is none."""

    def delete_versions(self, space: Space, ref: ContextRef) -> bool | None:
        """The versions of an id or name.version. None: there is none. False: a name points at one, nothing is done."""

    def close(self) -> None: ...
