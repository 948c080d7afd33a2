"""What is SQLite's alone: it opens again, its migrations fit its tables, and damage is noticed."""

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from app.errors import StoreError
from app.registry import parse_ref
from app.stores.sql import SqlContextStore
from app.stores.tables import metadata
from tests.contract.test_store import M, put


def test_it_opens_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'c.sqlite3'}"
    store = SqlContextStore(url)
    info, _ = put(store, "legal", 1)
    store.close()
    again = SqlContextStore(url)
    assert again.get(M, parse_ref("legal")) == info
    again.close()


def test_migrations_make_the_tables_the_code_expects(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'c.sqlite3'}"
    SqlContextStore(url).close()
    engine = create_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_damaged_arrays_are_noticed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'c.sqlite3'}"
    store = SqlContextStore(url)
    info, _ = put(store, "legal", 1)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE payloads SET data = x'00'"))
    engine.dispose()
    with pytest.raises(StoreError, match="checksum"):
        store.arrays(info.id)
    store.close()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite3"
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(StoreError, match="cannot be opened"):
        SqlContextStore(f"sqlite:///{path}")
