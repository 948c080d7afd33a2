"""The context store beside a model of it: what `ContextStore` promises, in lists and dicts.

Hypothesis makes up histories of what callers do, in two namespaces and two models, until the two differ.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from app.context_refs import parse_ref
from app.domain import ContextInfo, ContextRef, ContextStatus, Page, Space
from app.stores import rows
from app.stores.base import LEASE_SECONDS, Begun, Built, ContextStore
from app.stores.checks.database import check_store
from tests.contract.test_store import COUNTS, arrays_of, new_context

CONTENTS = 2
HISTORIES = count(1)
"""Each history has namespaces and contents of its own, so that one database does for all."""

NAMES = st.integers(0, 5)
"""Two names in each of three spaces."""
WHAT = st.integers(0, 2 * CONTENTS - 1)
"""A content, or from CONTENTS on a choice, of which the first stage makes a content."""
VERSIONS = st.integers(1, 6)


@dataclass(eq=False)
class Version:
    info: ContextInfo
    """As the store gave it when it was begun."""
    begun_id: str
    builder: str
    id: str
    status: ContextStatus = ContextStatus.IN_PROGRESS
    is_silent: bool = False

    @property
    def is_done(self) -> bool:
        return self.status is ContextStatus.COMPLETED

    @property
    def seen_status(self) -> ContextStatus:
        return ContextStatus.FAILED if self.is_silent else self.status

    def has(self, context_id: str) -> bool:
        return context_id in (self.id, self.begun_id)


@dataclass(eq=False)
class Name:
    space: Space
    name: str
    versions: dict[int, Version] = field(default_factory=dict)
    """In the order of their numbers, which is the order they were begun in."""
    last: int = 0
    current: int = 0

    def completed(self) -> list[int]:
        return [number for number, version in self.versions.items() if version.is_done]


class StoreAndModel(RuleBasedStateMachine):
    def __init__(self, store: ContextStore, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.store, self.monkeypatch = store, monkeypatch
        self.history = next(HISTORIES)
        self.namespaces = (f"mine{self.history}", f"yours{self.history}")
        mine, yours = self.namespaces
        self.spaces = [Space("m", mine), Space("n", mine), Space("m", yours)]
        self.names = [Name(space, name) for name in ("legal", "news") for space in self.spaces]
        self.ordered: list[Version] = []  # as they were begun, over all names
        self.being_built: list[tuple[Name, Version, str]] = []
        self.builders = count()
        self.now = datetime.now(UTC)
        self._pass_seconds(0)

    @initialize(names=st.sampled_from([1, 1, 6]), contents=st.integers(1, CONTENTS))
    def begin_history(self, names: int, contents: int) -> None:
        """Of how many it is: few meet more often."""
        self.width, self.contents = names, contents

    # --- What both do ---

    @rule(name=NAMES, what=WHAT)
    def begin(self, name: int, what: int) -> None:
        named, builder = self._name(name), f"builder {next(self.builders)}"
        new = new_context(named.name, self._content(what), named.space, builder)
        info, begun = self.store.begin(new)
        assert begun is self._begin(named, new.id, info, builder)
        version = named.versions[info.version]
        assert info.id == version.id
        if begun is Begun.OURS:
            self.being_built.append((named, version, builder))

    @rule(name=NAMES, content=st.integers(0, CONTENTS - 1))
    def put(self, name: int, content: int) -> None:
        named, content = self._name(name), self._content(content)
        info, created = self.store.put(new_context(named.name, content, named.space), arrays_of(content))
        assert created is (self._begin(named, _id(content), info, "me") is not Begun.THERE)
        if created:
            self._complete(named, named.versions[info.version], _id(content))
        assert info.status is ContextStatus.COMPLETED

    @precondition(lambda self: self.being_built)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        name, version, _ = self._one_build(data)
        content = self._content(int(version.begun_id[4:], 16) % (2 * CONTENTS) % CONTENTS)
        built = Built(_id(content), arrays_of(content), version.info.selection, COUNTS, ["a", "b"])
        found = self.store.complete(version.info, built)
        if version not in name.versions.values():
            assert found is None
        else:
            assert found is not None
            assert found.version == self._complete(name, version, built.id)

    @precondition(lambda self: self.being_built)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        _, version, builder = self._one_build(data)
        self.store.fail(version.info, builder, "for a reason")
        if version.status is ContextStatus.IN_PROGRESS and version.builder == builder:
            version.status, version.is_silent = ContextStatus.FAILED, False

    @precondition(lambda self: self.being_built)
    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        _, version, builder = self._one_build(data)
        self.store.beat(version.info, builder, 1)
        if version.builder == builder:
            version.is_silent = False

    @rule()
    def all_builders_fall_silent(self) -> None:
        self._pass_seconds(LEASE_SECONDS + 1)
        for version in self.ordered:
            version.is_silent = version.status is ContextStatus.IN_PROGRESS

    @rule(name=NAMES, version=VERSIONS)
    def move(self, name: int, version: int) -> None:
        named = self._name(name)
        found = self.store.move(named.space, named.name, version)
        assert (found is not None) is (version in named.completed())
        if found is not None:
            assert found.version == version
            named.current = version

    @rule(name=NAMES)
    def delete_name(self, name: int) -> None:
        named = self._name(name)
        assert self.store.delete_name(named.space, named.name) is bool(named.versions)
        for number in list(named.versions):
            self._remove(named, number)
        named.current = 0

    @rule(name=NAMES, version=VERSIONS)
    def delete_version(self, name: int, version: int) -> None:
        named = self._name(name)
        held = [(named, version)] if version in named.versions else []
        self._delete(named.space, ContextRef("", name=named.name, version=version), held)

    @rule(space=st.integers(0, 2), what=WHAT)
    def delete_id(self, space: int, what: int) -> None:
        where, context_id = self.spaces[space], _id(self._content(what))
        self._delete(where, ContextRef("", id=context_id), self._holders(where, context_id))

    def _delete(self, space: Space, ref: ContextRef, held: list[tuple[Name, int]]) -> None:
        deleted = self.store.delete_versions(space, ref)
        pointed = any(name.current == number for name, number in held)
        assert deleted is (None if not held else not pointed)
        if deleted:
            for name, number in held:
                self._remove(name, number)

    # --- What both say ---

    @rule(
        namespace=st.integers(0, 1), model=st.sampled_from([None, "m"]), limit=st.integers(1, 3), newest=st.booleans()
    )
    def listing(self, namespace: int, model: str | None, limit: int, newest: bool) -> None:
        mine = self.namespaces[namespace]
        begun = [version for version in self.ordered if version.info.space.namespace == mine]
        places: dict[str, int] = {}
        for place, version in enumerate(begun):
            places.setdefault(version.id, -place if newest else place)
        current = [name for name in self.names if name.space.namespace == mine and name.current]
        current = [name for name in current if model in (None, name.space.model)]
        current.sort(key=lambda name: (places[name.versions[name.current].id], name.space.model, name.name))
        found = [info for page in self._pages(mine, model, limit, newest) for info in page.items]
        assert [(info.space, info.name, info.version) for info in found] == [
            (name.space, name.name, name.current) for name in current
        ]

    def _pages(self, namespace: str, model: str | None, limit: int, newest: bool) -> Iterator[Page[ContextInfo]]:
        """As a client walks them."""
        after = None
        while True:
            page = self.store.list_current(namespace, model, after=after, limit=limit, newest_first=newest)
            assert page is not None
            yield page
            if not page.has_more:
                return
            assert len(page.items) >= limit
            after = page.items[-1].id

    def teardown(self) -> None:
        for name in self.names:
            found = self.store.versions(name.space, name.name)
            assert [(info.version, info.id, info.status) for info in found] == [
                (number, version.id, version.seen_status) for number, version in reversed(name.versions.items())
            ]
            current = self.store.get(name.space, parse_ref(name.name))
            assert (current.version if current else 0) == name.current
        for space in self.spaces:
            for what in range(2 * CONTENTS):
                self._look_up(space, _id(self._content(what)))

    def _look_up(self, space: Space, context_id: str) -> None:
        info = self.store.get(space, parse_ref(context_id))
        held = [version for version in self.ordered if version.info.space == space and version.has(context_id)]
        if not held:
            assert info is None
            return
        best = max(held, key=lambda version: (version.is_done, self.ordered.index(version)))
        assert info is not None
        assert (info.name, info.version) == (best.info.name, best.info.version)
        arrays = self.store.arrays(best.id)
        if best.is_done:
            assert arrays is not None
            np.testing.assert_array_equal(
                arrays["dataset_embeddings"], arrays_of(int(best.id[4:], 16))["dataset_embeddings"]
            )

    # --- The model ---

    def _pass_seconds(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.monkeypatch.setattr(rows, "now", lambda: self.now)

    def _content(self, what: int) -> int:
        return 2 * CONTENTS * self.history + what // CONTENTS * CONTENTS + what % self.contents

    def _name(self, name: int) -> Name:
        return self.names[name % self.width]

    def _one_build(self, data: st.DataObject) -> tuple[Name, Version, str]:
        return data.draw(st.sampled_from(self.being_built[-3:]))

    def _holders(self, space: Space, context_id: str) -> list[tuple[Name, int]]:
        names = [name for name in self.names if name.space == space]
        return [
            (name, number) for name in names for number, version in name.versions.items() if version.has(context_id)
        ]

    def _begin(self, named: Name, context_id: str, info: ContextInfo, builder: str) -> Begun:
        """What the store should have found; `info`: what it gave."""
        same = [number for number, version in named.versions.items() if version.has(context_id)]
        done = [number for number in same if named.versions[number].is_done]
        alive = [
            n for n in same if named.versions[n].status is ContextStatus.IN_PROGRESS and not named.versions[n].is_silent
        ]
        if done:
            assert info.version in done
            named.current = info.version
            return Begun.THERE
        if alive:
            assert info.version in alive
            return Begun.THEIRS
        if same:
            assert info.version in same
            version = named.versions[info.version]
            version.status, version.is_silent, version.builder = ContextStatus.IN_PROGRESS, False, builder
            version.id = version.begun_id = context_id
            version.info = info
            return Begun.OURS
        named.last += 1
        assert info.version == named.last, "version numbers are never used twice"
        named.versions[named.last] = version = Version(info, context_id, builder, context_id)
        self.ordered.append(version)
        if not named.completed():
            named.current = named.last
        return Begun.OURS

    def _complete(self, name: Name, version: Version, context_id: str) -> int:
        """Which version has the content then."""
        number = version.info.version
        there = [n for n in name.completed() if name.versions[n].id == context_id]
        if there:
            if there != [number]:
                self._remove(name, number)
            name.current = there[0]
            return there[0]
        version.id, version.status, version.is_silent = context_id, ContextStatus.COMPLETED, False
        if number == max(name.completed()):
            name.current = number
        return number

    def _remove(self, name: Name, number: int) -> None:
        self.ordered.remove(name.versions.pop(number))


def _id(content: int) -> str:
    return f"ctx_{content:032x}"


def test_the_store_does_what_a_simple_model_does(
    store: ContextStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        lambda: StoreAndModel(store, monkeypatch),  # type: ignore[arg-type]  # a factory will do, says its documentation
        settings=settings(max_examples=30, stateful_step_count=40, suppress_health_check=checks),
    )
    assert check_store(url).findings == []
