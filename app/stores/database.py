"""A database URL -> a database with its tables up to date, and transactions on it."""

import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from app.errors import StoreError
from app.telemetry.metrics import STORE_FAILURES, STORE_RETRIES, STORE_SECONDS

T = TypeVar("T")

MIGRATION_LOCK = 4_201_002_525
"""PostgreSQL's advisory lock for the migrations: processes that start together run them one after the other."""
ATTEMPTS = 8
"""Two writers that get in each other's way: one of them starts over."""
PAUSE_SECONDS = 0.02
CONFLICTS = ("40001", "40P01")
"""SQLSTATE: serialisation failure, deadlock."""


class Database:
    """What all stores share. Thread-safe and synchronous."""

    def __init__(self, url: str) -> None:
        """Opens the database and brings its tables up to date. Raises StoreError."""
        self.engine = connect(url)

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One transaction that writes nothing. Raises StoreError."""
        with STORE_SECONDS.labels("read").time():
            try:
                with self.engine.connect() as connection, connection.execution_options(immediate=False).begin():
                    yield connection
            except SQLAlchemyError as error:
                raise _silent(error, "read") from error

    def write(self, work: Callable[[Connection], T]) -> T:
        """One transaction; begun anew where another writer was in the way. Raises StoreError."""
        with STORE_SECONDS.labels("write").time():
            return self._write(work)

    def _write(self, work: Callable[[Connection], T]) -> T:
        for attempt in range(ATTEMPTS):
            try:
                with self.engine.connect() as connection, connection.execution_options(immediate=True).begin():
                    return work(connection)
            except SQLAlchemyError as error:
                if not is_conflict(error) or attempt == ATTEMPTS - 1:
                    raise _silent(error, "write") from error
                STORE_RETRIES.inc()
                time.sleep(PAUSE_SECONDS * attempt * random.random())  # noqa: S311 - not the same ones again at once
        raise AssertionError("the last attempt returns or raises")


def _silent(error: SQLAlchemyError, operation: str) -> StoreError:
    STORE_FAILURES.labels(operation).inc()
    return StoreError(f"The store does not answer: {type(error).__name__}")


def connect(url: str) -> Engine:
    """Opens the database and brings its tables up to date. Raises StoreError, which never shows a password."""
    try:
        parsed = _with_driver(make_url(url))
    except ArgumentError:
        raise StoreError("The context store's URL cannot be read; it is like postgresql://USER@HOST/DATABASE") from None
    try:
        engine = _opened(parsed)
        migrate(engine)
    except (SQLAlchemyError, OSError, ImportError) as error:
        reason = str(error).replace(parsed.password or "\0", "***")
        raise StoreError(f"The context store {parsed.render_as_string()} cannot be opened: {reason}") from error
    return engine


def _write_ahead(connection: sqlite3.Connection) -> None:
    """SQLite's own patience does not cover this change, which another process may be making as well."""
    for _ in range(100):
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            time.sleep(0.02)
        else:
            return
    raise sqlite3.OperationalError("database is locked")


def is_conflict(error: SQLAlchemyError) -> bool:
    """Whether the transaction met another one and may simply be run again."""
    if isinstance(error, IntegrityError):
        return True
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in CONFLICTS


def migrate(engine: Engine) -> None:
    """Runs the migrations that are still to run. Raises SQLAlchemyError."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _with_driver(url: URL) -> URL:
    """postgres:// and postgresql:// mean psycopg 3, the driver of the extra `postgres`."""
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgres", "postgresql") else url


def _opened(url: URL) -> Engine:
    """SQLite in write-ahead mode, every commit on disk; other databases as they are. Errors do not show what was being
    written: documents, and lines of batches."""
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True, hide_parameters=True)
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, hide_parameters=True, connect_args={"timeout": 30, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's BEGIN below, not the driver's late one
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
        _write_ahead(connection)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A writer takes the write lock at once: a read lock that grows in mid-transaction fails when two do it.
        immediate = connection.get_execution_options().get("immediate", True)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine
