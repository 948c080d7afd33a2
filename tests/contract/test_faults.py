"""What the store says when its database fails, what it goes on doing, and that it works again without a restart."""

import logging
import shutil
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.engine import make_url

from app.context_refs import parse_ref
from app.errors import StoreError
from app.stores import faults, postgresql, sqlite
from app.stores.database import Database
from app.stores.errors import PayloadDamaged, StoreAway, StoreBusy, StoreDamaged, StoreFull, StoreReadOnly
from app.stores.sql import SqlContextStore
from app.stores.tables import payloads
from tests.contract.test_store import M, built, new_context, put
from tests.disks import fill, small_disk, unwritable
from tests.postgres import Postgres, new_database, own_postgres

FIRST = f"ctx_{1:032x}"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that was away is asked again by the next call."""
    monkeypatch.setattr(faults, "AWAY_SECONDS", 0.0)
    monkeypatch.setattr(faults, "LOOK_SECONDS", 0.0)


@contextmanager
def store_at(url: str) -> Iterator[SqlContextStore]:
    """With `legal` in it."""
    store = SqlContextStore(Database(url))
    put(store, "legal", 1)
    try:
        yield store
    finally:
        store.close()


def reads(store: SqlContextStore) -> bool:
    info = store.get(M, parse_ref("legal"))
    assert info is not None
    return store.arrays(info.id) is not None


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "contexts.sqlite3"


@pytest.fixture
def store(file: Path) -> Iterator[SqlContextStore]:
    with store_at(f"sqlite:///{file}") as made:
        yield made


# --- SQLite ---


def test_a_full_disk_reads(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2) as disk, store_at(f"sqlite:///{disk / 'c.sqlite3'}") as store:
        filler = fill(disk)
        with pytest.raises(StoreFull):
            for i in range(2, 2000):  # the log has room for some
                put(store, "more", i)
        assert reads(store)
        written = len(store.versions(M, "more"))
        filler.unlink()
        put(store, "more", 5000)
        assert len(store.versions(M, "more")) == written + 1


def test_a_disk_that_takes_no_writes(store: SqlContextStore, file: Path) -> None:
    with unwritable(file, file.with_name(f"{file.name}-wal")):
        for content in (2, 3):  # with the connections there are, and with new ones
            with pytest.raises(StoreReadOnly):
                put(store, "more", content)
            assert reads(store)
    put(store, "more", 2)


def test_a_lock_of_another_process(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.2)
    with store_at(f"sqlite:///{file}") as store:
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreBusy):
            put(store, "more", 2)
        assert reads(store)
        other.execute("COMMIT")
        other.close()
        put(store, "more", 2)


def test_a_file_that_is_away_for_a_while(store: SqlContextStore, file: Path) -> None:
    """It is not taken for an empty store, and nothing is written to where nobody finds it."""
    away = file.rename(file.with_name("away"))
    for call in (lambda: put(store, "more", 2), lambda: reads(store)):
        with pytest.raises(StoreAway):
            call()
    assert not file.exists()
    away.rename(file)
    assert reads(store)
    put(store, "more", 2)


def test_another_file_in_its_place(store: SqlContextStore, file: Path) -> None:
    """A copy from yesterday: it is used from the next call on."""
    with sqlite3.connect(file) as source, sqlite3.connect(file.with_name("copy")) as copy:
        source.backup(copy)
    source.close()
    copy.close()
    put(store, "more", 2)
    for suffix in ("-wal", "-shm"):
        file.with_name(file.name + suffix).unlink()
    file.with_name("copy").replace(file)
    assert reads(store)
    assert store.get(M, parse_ref("more")) is None


def damage(file: Path, table: str) -> None:
    """The table's first page."""
    connection = sqlite3.connect(file)
    page = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()[0]
    size = connection.execute("PRAGMA page_size").fetchone()[0]
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    with file.open("r+b") as raw:
        raw.seek((page - 1) * size)
        raw.write(b"\xff" * size)


def test_a_damaged_file(file: Path) -> None:
    """What the damage does not touch goes on; a file that is whole in its place is used at once."""
    with store_at(f"sqlite:///{file}"):
        pass
    shutil.copy(file, file.with_name("whole"))
    store = SqlContextStore(Database(f"sqlite:///{file}"))
    damage(file, "versions")
    for call in (lambda: put(store, "more", 2), lambda: reads(store)):
        with pytest.raises(StoreDamaged):
            call()
    assert store.arrays(FIRST) is not None
    file.with_name("whole").replace(file)
    assert reads(store)
    put(store, "more", 2)
    store.close()


def test_a_file_that_is_no_database_any_more(store: SqlContextStore, file: Path) -> None:
    file.with_name("junk").write_bytes(b"this is not a database" * 1000)
    file.with_name("junk").replace(file)
    with pytest.raises(StoreDamaged):
        reads(store)


# --- On both ---


def execute(url: str, statement: str) -> None:
    database = Database(url)
    with database.engine.begin() as connection:
        connection.execute(text(statement))
    database.close()


def test_damaged_arrays_are_noticed_and_others_are_not_affected(url: str) -> None:
    with store_at(url) as store:
        put(store, "other", 2)
        execute(
            url, f"UPDATE payloads SET data = (SELECT data FROM payloads WHERE id <> '{FIRST}') WHERE id = '{FIRST}'"
        )
        with pytest.raises(PayloadDamaged, match=f"{FIRST}.*create it again") as damaged:
            store.arrays(FIRST)
        assert not damaged.value.passes
        assert store.arrays(f"ctx_{2:032x}") is not None
        assert store.delete_name(M, "legal")
        put(store, "legal", 1)
        assert store.arrays(FIRST) is not None


def test_damaged_arrays_are_mended_by_creating_them_again(url: str) -> None:
    """Also for the other names that hold the same content."""
    with store_at(url) as store:
        put(store, "twin", 1)
        execute(url, f"UPDATE payloads SET sha256 = 'x' WHERE id = '{FIRST}'")
        assert store.delete_name(M, "legal")
        with pytest.raises(PayloadDamaged):
            store.arrays(FIRST)
        put(store, "legal", 1)
        assert store.arrays(FIRST) is not None
        assert [store.get(M, parse_ref(name)) is not None for name in ("legal", "twin")] == [True, True]


def test_damaged_documents_are_noticed(url: str) -> None:
    with store_at(url) as store:
        info, _ = store.begin(new_context("more", 2))
        store.complete(info, built(2, ["a", "b"]))
        execute(url, f"UPDATE version_texts SET data = (SELECT data FROM payloads WHERE id = '{info.id}')")
        with pytest.raises(PayloadDamaged, match="documents"):
            store.texts(info)


@pytest.mark.parametrize("change", ["status = 'complited'", 'selection = \'{"seed": 1, "sed": 2}\''])
def test_a_row_that_makes_no_sense(url: str, change: str) -> None:
    with store_at(url) as store:
        execute(url, f"UPDATE versions SET {change}")
        for call in (lambda: store.get(M, parse_ref("legal")), lambda: store.versions(M, "legal")):
            with pytest.raises(StoreDamaged):
                call()


def test_built_by_two(url: str) -> None:
    """The first one was silent for so long that it was begun anew; both complete it."""
    with store_at(url) as store:
        info, _ = store.begin(new_context("more", 2))
        first = store.complete(info, built(2))
        assert store.complete(info, built(2)) == first is not None
        assert store.get(M, parse_ref("more")) == first
        assert store.arrays(info.id) is not None


# --- PostgreSQL ---


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with own_postgres() as made:
        yield made


@pytest.fixture
def shared(server: Postgres) -> Iterator[SqlContextStore]:
    with store_at(new_database(server.url)) as made:
        yield made


def administrate(server: Postgres, statement: str) -> None:
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(statement)


def test_a_server_that_is_down_for_a_while(
    shared: SqlContextStore, server: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "app.stores.faults")
    server.stop()
    try:
        for _ in range(3):
            for call in (lambda: put(shared, "more", 2), lambda: reads(shared)):
                with pytest.raises(StoreAway):
                    call()
    finally:
        server.start()
    assert reads(shared)
    put(shared, "more", 2)
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"], "once an outage, not once a call"


def test_nobody_waits_for_a_server_that_was_away_a_moment_ago(
    shared: SqlContextStore, server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "AWAY_SECONDS", 30.0)
    server.stop()
    try:
        with pytest.raises(StoreAway) as first:
            reads(shared)
    finally:
        server.start()
    with pytest.raises(StoreAway) as second:
        reads(shared)
    assert first.value.__cause__ is not None
    assert second.value.__cause__ is None, "the server was not asked"
    assert 1 < second.value.retry_after <= 30


def test_sessions_that_are_killed(shared: SqlContextStore, server: Postgres) -> None:
    server.kill_sessions()
    assert reads(shared)
    server.kill_sessions()
    put(shared, "more", 2)


def test_a_session_that_is_killed_in_a_transaction(server: Postgres) -> None:
    """Nothing of it is there, and it can be done again."""
    database = Database(new_database(server.url))

    def work(connection: Connection) -> None:
        connection.execute(insert(payloads).values(id=FIRST))
        server.kill_sessions()
        connection.execute(insert(payloads).values(id="another"))

    with pytest.raises(StoreAway):
        database.write(work)
    with database.reading() as connection:
        assert connection.execute(select(payloads.c.id)).all() == []
    put(SqlContextStore(database), "legal", 1)
    database.close()


def test_a_server_that_is_frozen(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "CONNECT_SECONDS", 2)
    monkeypatch.setattr(postgresql, "ANSWER_SECONDS", 0.5)
    with store_at(new_database(server.url)) as store:
        with server.frozen(), pytest.raises(StoreAway):
            reads(store)
        assert reads(store)


def test_a_port_that_takes_connections_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "CONNECT_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://me:hunter2@127.0.0.1:{silent.getsockname()[1]}/none"
        with pytest.raises(StoreAway, match="cannot be opened") as raised:
            Database(url)
    assert "hunter2" not in str(raised.value)


def test_a_lock_on_the_server(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "LOCK_SECONDS", 1)
    url = new_database(server.url)
    with store_at(url) as store:
        with psycopg.connect(url) as other:
            other.execute("LOCK TABLE names")
            with pytest.raises(StoreBusy):
                put(store, "more", 2)
            assert store.arrays(FIRST) is not None
        put(store, "more", 2)


def test_a_database_that_takes_no_writes(server: Postgres) -> None:
    """As on a standby that is not promoted yet."""
    url = new_database(server.url)
    name = make_url(url).database
    with store_at(url) as store:
        administrate(server, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        server.kill_sessions()
        with pytest.raises(StoreReadOnly):
            put(store, "more", 2)
        assert reads(store)
        administrate(server, f"ALTER DATABASE {name} RESET default_transaction_read_only")
        put(store, "more", 2)


def test_the_servers_disk_is_full(server: Postgres) -> None:
    with small_disk(server.folder.parent / "disk", 24, owner=server.folder.stat().st_uid) as disk:
        administrate(server, f"CREATE TABLESPACE small LOCATION '{disk}'")
        url = new_database(server.url, "TABLESPACE small")
        with store_at(url) as store:
            filler = fill(disk)
            with pytest.raises(StoreFull):
                for i in range(2, 2000):
                    put(store, "more", i)
            assert reads(store)
            filler.unlink()
            put(store, "more", 5000)
        administrate(server, f"DROP DATABASE {make_url(url).database}")
        administrate(server, "DROP TABLESPACE small")


def test_a_damaged_page_on_the_server(server: Postgres) -> None:
    url = new_database(server.url)
    with store_at(url) as store:
        with psycopg.connect(url, autocommit=True) as other:
            row = other.execute("SELECT pg_relation_filepath('versions')").fetchone()
        assert row is not None
        server.stop()
        with (server.folder / row[0]).open("r+b") as raw:
            raw.seek(4096)
            raw.write(b"\xff" * 512)
        server.start()
        with pytest.raises(StoreDamaged):
            reads(store)
        assert store.arrays(FIRST) is not None


def test_every_fault_tells_a_caller_what_it_is() -> None:
    answers = {fault.answer for fault in StoreError.__subclasses__()}
    assert len(answers) == len(StoreError.__subclasses__())
    assert "contexts check" in StoreDamaged.answer
