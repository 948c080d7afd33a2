"""Two servers on one database that change the same thing at once."""

import threading
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
from sqlalchemy import func, select

from app.context_refs import parse_ref
from app.domain import DocumentCounts, Selection, Space
from app.stores.base import NewContext
from app.stores.database import Database
from app.stores.sql import SqlContextStore
from app.stores.tables import payloads

ROUNDS = 30


@pytest.fixture
def two(url: str) -> Iterator[tuple[Database, SqlContextStore, SqlContextStore]]:
    databases = [Database(url) for _ in range(2)]
    yield databases[0], SqlContextStore(databases[0]), SqlContextStore(databases[1])
    for database in databases:
        database.close()


def put(store: SqlContextStore, name: str, content: int, namespace: str = "") -> None:
    new = NewContext(
        id=f"ctx_{content:032x}",
        space=Space("m", namespace),
        model_revision="r",
        name=name,
        selection=Selection("import"),
        documents=DocumentCounts(),
        corpus_size=1,
        dimensions=2,
    )
    store.put(new, {"dataset_embeddings": np.ones((1, 2), np.float32)})


def at_once(*calls: Callable[[], object]) -> None:
    together = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> None:
        together.wait(10)
        call()

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


@pytest.mark.parametrize("what", ["a version", "the name"])
def test_a_name_that_is_moved_while_its_version_is_deleted_points_at_something(
    two: tuple[Database, SqlContextStore, SqlContextStore], what: str
) -> None:
    _, here, there = two
    space = Space("m")
    for i in range(ROUNDS):
        name = f"n{i}"
        for content in (2 * i, 2 * i + 1):
            put(here, name, content)
        version = partial(there.delete_versions, space, parse_ref(f"{name}.1"))
        gone = version if what == "a version" else partial(there.delete_name, space, name)
        at_once(partial(here.move, space, name, 1), gone)
        assert (here.get(space, parse_ref(name)) is None) == (here.versions(space, name) == [])


def test_a_content_whose_holders_go_at_once_goes_too(two: tuple[Database, SqlContextStore, SqlContextStore]) -> None:
    database, here, there = two
    for i in range(ROUNDS):
        for namespace in ("red", "blue"):
            put(here, f"n{i}", i, namespace)
        red, blue = (partial(s.delete_name, Space("m", ns), f"n{i}") for s, ns in ((here, "red"), (there, "blue")))
        at_once(red, blue)
    with database.reading() as connection:
        assert connection.scalar(select(func.count()).select_from(payloads)) == 0
