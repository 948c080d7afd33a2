"""The store of batches and files beside a model of it: histories of everything that runners and callers do, made up by
Hypothesis, with runners that fall silent, until the two differ."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from app.errors import StoreError
from app.stores.batch_base import LEASE_SECONDS, UNFINISHED, BatchInfo, BatchStatus, LeaseLost, LineResult, Problem
from app.stores.batches import SqlBatchStore
from app.stores.checks.database import check_store
from app.stores.database import Database
from app.stores.files import SqlFileStore

LINES = 4
HISTORIES = count(1)
OWNERS = st.sampled_from(["me", "you", "they"])
WHO = st.one_of(st.none(), st.none(), OWNERS)
"""None: whose the batch is."""
NAMESPACES = st.integers(0, 1)


@dataclass(eq=False)
class Batch:
    id: str
    namespace: str
    input_file_id: str
    status: BatchStatus = BatchStatus.VALIDATING
    owner: str | None = None
    beat_at: float = 0.0
    total: int = 0
    answers: dict[int, LineResult] = field(default_factory=dict)

    @property
    def is_unfinished(self) -> bool:
        return self.status in UNFINISHED

    def answered(self, *, ok: bool) -> list[LineResult]:
        return [self.answers[number] for number in sorted(self.answers) if self.answers[number].ok is ok]


class StoreAndModel(RuleBasedStateMachine):
    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.store, self.files = SqlBatchStore(database), SqlFileStore(database)
        self.history = next(HISTORIES)
        self.now = 1e9 + 1e5 * self.history
        monkeypatch.setattr(time, "time", lambda: self.now)
        self.batches: list[Batch] = []
        self.inputs: dict[str, str] = {}
        self.deleted: set[str] = set()

    @initialize()
    def upload(self) -> None:
        for number in (0, 1):
            namespace = self._namespace(number)
            self.inputs[namespace] = self.files.add(namespace, "input", "batch", [b"x"]).id

    @rule(namespace=NAMESPACES)
    def add(self, namespace: int) -> None:
        where = self._namespace(namespace)
        made = Batch(f"batch_{self.history}_{len(self.batches)}", where, self.inputs[where])
        info = BatchInfo(made.id, where, "/v1/embeddings", made.input_file_id, "24h", 7)
        assert self.store.add(info) is (where not in self.deleted)
        if where not in self.deleted:
            self.batches.append(made)

    @rule(owner=OWNERS)
    def claim(self, owner: str) -> None:
        claim = self.store.claim(self._owner(owner))
        free = [batch for batch in self.batches if self._is_free(batch, owner)]
        if claim is None:
            assert free == []
            return
        [batch] = [batch for batch in self.batches if batch.id == claim.batch.id]
        assert batch is next(other for other in free if other.namespace == batch.namespace), "the oldest of its own"
        assert self._running(batch, owner) == min(self._running(other, owner) for other in free)
        assert claim.orphaned is (batch.owner not in (None, owner))
        batch.owner, batch.beat_at = owner, self.now

    @rule(owner=OWNERS)
    def release(self, owner: str) -> None:
        self.store.release([self._owner(owner)])
        for batch in self.batches:
            if batch.owner == owner:
                batch.owner = None

    @rule()
    def all_fall_silent(self) -> None:
        self.now += LEASE_SECONDS + 1

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), who=WHO)
    def beat(self, data: st.DataObject, who: str | None) -> None:
        batch = self._one(data)
        if self._may(batch, who, lambda owner: self.store.beat(batch.id, owner)):
            batch.beat_at = self.now

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), who=WHO)
    def begin(self, data: st.DataObject, who: str | None) -> None:
        batch = self._one(data)
        if self._may(batch, who, lambda owner: self.store.begin(batch.id, owner, LINES)):
            batch.total = LINES
            if batch.status is BatchStatus.VALIDATING:
                batch.status = BatchStatus.IN_PROGRESS

    @precondition(lambda self: self._begun())
    @rule(data=st.data(), who=WHO, numbers=st.sets(st.integers(1, LINES), min_size=1), ok=st.booleans())
    def record(self, data: st.DataObject, who: str | None, numbers: set[int], ok: bool) -> None:
        batch = data.draw(st.sampled_from(self._begun()))
        results = [LineResult(n, ok and n > 1, f"answer {n}, one of {len(numbers)}\n".encode()) for n in numbers]

        again = bool(batch.answers.keys() & numbers)

        def record(owner: str) -> None:
            if again and batch.owner == self._actor(batch, who):
                with pytest.raises(StoreError):  # all or none
                    self.store.record(batch.id, owner, results)
            else:
                self.store.record(batch.id, owner, results)

        if self._may(batch, who, record) and not again:
            batch.answers |= {result.number: result for result in results}
            batch.beat_at = self.now

    @precondition(lambda self: self._begun())
    @rule(data=st.data(), who=WHO)
    def finish(self, data: st.DataObject, who: str | None) -> None:
        batch = data.draw(st.sampled_from(self._begun()))
        if self._may(batch, who, lambda owner: self.store.finish(batch.id, owner)):
            if batch.status is BatchStatus.CANCELLING:
                batch.status = BatchStatus.CANCELLED
            else:
                whole = len(batch.answers) == batch.total
                batch.status = BatchStatus.COMPLETED if whole else BatchStatus.FAILED
            batch.owner = None

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), who=WHO)
    def refuse(self, data: st.DataObject, who: str | None) -> None:
        batch = self._one(data)
        problems = [Problem("code", "for a reason")]
        if self._may(batch, who, lambda owner: self.store.refuse(batch.id, owner, problems)):
            batch.status, batch.owner = BatchStatus.FAILED, None

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        batch = self._one(data)
        if batch.status in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS):
            at_once = batch.owner is None and not batch.answers
            batch.status = BatchStatus.CANCELLED if at_once else BatchStatus.CANCELLING
        found = self.store.cancel(batch.namespace, batch.id)
        assert found is not None
        assert found.status is batch.status

    @rule(namespace=NAMESPACES)
    def delete_input(self, namespace: int) -> None:
        where = self._namespace(namespace)
        was_there = where not in self.deleted
        is_read = any(batch.is_unfinished for batch in self.batches if batch.namespace == where)
        assert self.files.delete(where, self.inputs[where]) is (not is_read if was_there else None)
        if not is_read:
            self.deleted.add(where)
        assert (self.files.get(where, self.inputs[where]) is None) is (where in self.deleted)

    def teardown(self) -> None:
        try:
            self._compare_all()
        finally:
            self._end_all()

    def _end_all(self) -> None:
        """For the next history, to whose runners they would go."""
        self.now += LEASE_SECONDS + 1
        for batch in self.batches:
            self.store.cancel(batch.namespace, batch.id)
        while (claim := self.store.claim("the last")) is not None:
            self.store.finish(claim.batch.id, "the last")

    def _compare_all(self) -> None:
        for number in (0, 1):
            where = self._namespace(number)
            mine = [batch for batch in self.batches if batch.namespace == where]
            assert self.store.unfinished(where) == sum(batch.is_unfinished for batch in mine)
            page = self.store.list(where, after=None, limit=100)
            assert page is not None
            assert [info.id for info in page.items] == [batch.id for batch in reversed(mine)]
            for info, batch in zip(page.items, reversed(mine), strict=True):
                self._compare(info, batch)

    def _compare(self, info: BatchInfo, batch: Batch) -> None:
        good, bad = batch.answered(ok=True), batch.answered(ok=False)
        assert (info.status, info.total) == (batch.status, batch.total)
        assert (info.completed, info.failed) == (len(good), len(bad))
        assert self.store.answered(batch.id) == set(batch.answers)
        for file_id, results in ((info.output_file_id, good), (info.error_file_id, bad)):
            assert (file_id is not None) is (bool(results) and not batch.is_unfinished)
            if file_id is not None:
                file = self.files.get(batch.namespace, file_id)
                content = b"".join(result.data for result in results)
                assert file is not None
                assert (file.bytes, b"".join(self.files.chunks(file_id))) == (len(content), content)

    def _namespace(self, number: int) -> str:
        return f"{self.history}-{number}"

    def _owner(self, owner: str) -> str:
        return f"{owner}-{self.history}"

    def _one(self, data: st.DataObject) -> Batch:
        return data.draw(st.sampled_from(self.batches))

    def _begun(self) -> list[Batch]:
        return [batch for batch in self.batches if batch.total]

    def _is_silent(self, batch: Batch) -> bool:
        return batch.beat_at < self.now - LEASE_SECONDS

    def _is_free(self, batch: Batch, owner: str) -> bool:
        return batch.is_unfinished and (batch.owner in (None, owner) or self._is_silent(batch))

    def _running(self, batch: Batch, owner: str) -> int:
        """How many batches of its namespace others run."""
        return sum(
            other.namespace == batch.namespace
            and other.is_unfinished
            and other.owner not in (None, owner)
            and not self._is_silent(other)
            for other in self.batches
        )

    def _actor(self, batch: Batch, who: str | None) -> str:
        return who or batch.owner or "me"

    def _may(self, batch: Batch, who: str | None, act: Callable[[str], object]) -> bool:
        """Only whose the batch is may act."""
        owner = self._actor(batch, who)
        if batch.owner == owner:
            act(self._owner(owner))
            return True
        with pytest.raises(LeaseLost):
            act(self._owner(owner))
        return False


def test_the_store_does_what_a_simple_model_does(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(url)
    run_state_machine_as_test(
        lambda: StoreAndModel(database, monkeypatch),  # type: ignore[arg-type]  # a factory will do, says its documentation
        settings=settings(max_examples=30, stateful_step_count=40),
    )
    database.close()
    assert check_store(url).findings == []
