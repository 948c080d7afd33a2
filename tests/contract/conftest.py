"""The stores; every test of this folder runs over each of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.stores.base import ContextStore
from app.stores.sql import SqlContextStore


@pytest.fixture(params=["sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ContextStore]:
    assert request.param == "sqlite"
    made = SqlContextStore(f"sqlite:///{tmp_path / 'folder' / 'contexts.sqlite3'}")
    yield made
    made.close()
