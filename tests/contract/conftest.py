"""The stores; every test of this folder that takes `store` runs over each of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.stores.base import ContextStore
from app.stores.database import Database
from app.stores.sql import SqlContextStore
from tests.postgres import new_database


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'folder' / 'contexts.sqlite3'}"
    return new_database(request.getfixturevalue("postgres"))


@pytest.fixture
def store(url: str) -> Iterator[ContextStore]:
    made = SqlContextStore(Database(url))
    yield made
    made.close()
