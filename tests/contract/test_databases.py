"""What a database does besides answering: it opens again, its migrations fit its tables, and damage is noticed."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from app.context_refs import parse_ref
from app.errors import StoreError
from app.stores import batch_tables  # noqa: F401 - its tables are on the metadata
from app.stores.checks.database import check_store
from app.stores.database import Database, connect
from app.stores.sql import SqlContextStore
from app.stores.tables import metadata
from tests.contract.test_store import M, put
from tests.postgres import new_database, over_tcp


def test_it_opens_again(url: str) -> None:
    store = SqlContextStore(Database(url))
    info, _ = put(store, "legal", 1)
    store.close()
    again = SqlContextStore(Database(url))
    assert again.get(M, parse_ref("legal")) == info
    again.close()


def test_migrations_make_the_tables_the_code_expects(url: str) -> None:
    engine = connect(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_processes_that_start_together_migrate_once(url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        for engine in pool.map(lambda _: connect(url), range(6)):
            engine.dispose()


def test_postgresql_over_tcp(postgres: str) -> None:
    with over_tcp(new_database(postgres)) as url:
        store = SqlContextStore(Database(url))
        info, _ = put(store, "legal", 1)
        assert store.get(M, parse_ref("legal")) == info
        store.close()
        assert check_store(url).checked["versions"] == 1


def test_tables_of_a_newer_version_say_so(url: str) -> None:
    """As whoever goes back to the version before meets them."""
    engine = connect(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(StoreError, match=r"9999[^9]*backup"):
        connect(url)


def test_damaged_arrays_are_noticed(url: str) -> None:
    store = SqlContextStore(Database(url))
    info, _ = put(store, "legal", 1)
    engine = connect(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE payloads SET sha256 = 'other'"))
    engine.dispose()
    with pytest.raises(StoreError, match="checksum"):
        store.arrays(info.id)
    store.close()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite3"
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(StoreError, match="cannot be opened"):
        Database(f"sqlite:///{path}")


@pytest.mark.parametrize(
    "given",
    [
        "postgresql://me:hunter2@127.0.0.1:1/none",
        "postgres://me:hunter2@127.0.0.1:1/x",
        "postgresql://127.0.0.1:1/x?user=me&password=hunter2",
        "postgresql://127.0.0.1:1/x?sslpassword=hunter2",
    ],
)
def test_no_password_in_the_message(given: str) -> None:
    with pytest.raises(StoreError, match="cannot be opened") as raised:
        Database(given)
    assert "hunter2" not in str(raised.value)


def test_a_url_that_is_none() -> None:
    with pytest.raises(StoreError, match="cannot be used"):
        Database("hunter2")
