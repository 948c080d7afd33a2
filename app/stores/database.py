"""A database URL -> a database with its tables up to date, and transactions on it."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, NullPool, create_engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from app.errors import StoreError
from app.stores import postgresql, sqlite
from app.stores.errors import StoreAway, StoreBusy, StoreDamaged, StoreFull, StoreReadOnly, StoreRefuses
from app.stores.faults import Faults, fault_of, words_of
from app.stores.threads import StoreThreads
from app.telemetry.metrics import STORE_FAILURES, STORE_RETRIES, STORE_SECONDS

T = TypeVar("T")

POSTGRESQL = "postgresql+psycopg"
MIGRATION_LOCK = 4_201_002_525
"""PostgreSQL's advisory lock for the migrations: processes that start together run them one after the other."""
ATTEMPTS = 8
"""Of a write: one of two writers that get in each other's way starts over."""
PAUSE_SECONDS = 0.02
POOL_SECONDS = 5
"""To wait for a connection: there are enough for all of the store's threads, and for some downloads beside them."""
CONFLICTS = ("40001", "40P01")
"""SQLSTATE: serialisation failure, deadlock."""


class Database:
    """What all stores share. Thread-safe and synchronous; `threads`: where coroutines call it."""

    def __init__(self, url: str) -> None:
        """Opens the database and brings its tables up to date. Raises StoreError."""
        self.engine = connect(url)
        self.threads = StoreThreads()
        self._file = sqlite.file_of(parsed_url(url))
        self._faults = Faults()

    def close(self) -> None:
        self.threads.close()
        self.engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One transaction that writes nothing. Raises StoreError."""
        self._faults.check()
        try:
            with (
                STORE_SECONDS.labels("read").time(),
                self.engine.connect() as connection,
                connection.execution_options(immediate=False).begin(),
            ):
                self._faults.reached()
                yield connection
        except SQLAlchemyError as error:
            raise self._fault(error, "read") from error
        except ValueError as error:  # a column holds no JSON, no time, no text
            raise self._noted(StoreDamaged(f"The context store holds a row that cannot be read: {error}")) from error

    def write(self, work: Callable[[Connection], T]) -> T:
        """One transaction; begun anew where another writer was in the way. Raises StoreError."""
        self._faults.check()
        if self._faults.has(StoreReadOnly):
            self.engine.dispose()
        with STORE_SECONDS.labels("write").time():
            return self._write(work)

    def _write(self, work: Callable[[Connection], T]) -> T:
        for attempt in range(ATTEMPTS):
            try:
                with self.engine.connect() as connection, connection.execution_options(immediate=True).begin():
                    self._faults.reached()
                    result = work(connection)
            except SQLAlchemyError as error:
                if not is_conflict(error) or attempt == ATTEMPTS - 1:
                    raise self._fault(error, "write") from error
                STORE_RETRIES.inc()
                time.sleep(PAUSE_SECONDS * attempt * random.random())  # noqa: S311 - not the same ones again at once
            else:
                self._faults.written()
                return result
        raise AssertionError("the last attempt returns or raises")

    def _fault(self, error: SQLAlchemyError, operation: str) -> StoreError:
        STORE_FAILURES.labels(operation).inc()
        if isinstance(error, IntegrityError):  # the caller's, not the database's
            return StoreRefuses(f"The context store refuses a row: {_rule(error)}")
        fault = fault_of(error, self._file)
        if not isinstance(fault, StoreBusy | StoreFull):
            # A connection keeps what it found: a server that is gone, a standby, a file without the right to write.
            self.engine.dispose()
        return self._noted(fault)

    def _noted(self, fault: StoreError) -> StoreError:
        self._faults.begin(fault)
        return fault


def _rule(error: IntegrityError) -> str:
    """Which one was broken, without the row: PostgreSQL's details would show it."""
    primary: str | None = getattr(getattr(error.orig, "diag", None), "message_primary", None)
    return primary or str(error.orig)


def parsed_url(url: str) -> URL:
    """Raises StoreError, which never shows a password."""
    try:
        parsed = _with_driver(make_url(url))
    except (ArgumentError, ValueError):  # a port that is no number is a plain ValueError
        parsed = None
    if parsed is None or (parsed.drivername != POSTGRESQL and sqlite.file_of(parsed) is None):
        raise StoreError("The context store's URL cannot be used; it is like postgresql://USER@HOST/DATABASE")
    return parsed


def connect(url: str) -> Engine:
    """Opens the database and brings its tables up to date. Raises StoreError, which never shows a password."""
    parsed = parsed_url(url)
    try:
        _migrate(parsed)
        return _opened(parsed)
    except CommandError as error:  # alembic does not know the version they are of
        raise StoreError(
            f"The context store's tables are not of a version that this cde-server, which works with "
            f"{newest_migration()}, can bring up to date ({error}): a newer one has been here. Start that one, or put "
            f"back the backup from before the upgrade."
        ) from error
    except (SQLAlchemyError, OSError, ImportError) as error:
        raise not_opened(parsed, error) from error


def not_opened(url: URL, error: Exception) -> StoreError:
    """For the operator; never shows the password."""
    kind = type(fault_of(error, sqlite.file_of(url))) if isinstance(error, SQLAlchemyError) else StoreAway
    reason = words_of(error)
    secrets = [url.password, *(value for name, value in url.query.items() if "pass" in name)]
    for secret in filter(None, secrets):
        reason = reason.replace(str(secret), "***")
    shown = url.set(query={}).render_as_string()  # libpq takes passwords there too
    return kind(f"The context store {shown} cannot be opened ({kind.kind}): {reason}")


def is_conflict(error: SQLAlchemyError) -> bool:
    """Whether the transaction met another one and may simply be run again."""
    if isinstance(error, IntegrityError):
        return True
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in CONFLICTS


def _migrate(url: URL) -> None:
    """Makes the database where it is a file, and runs the migrations that are still to run. Raises SQLAlchemyError,
    OSError, ImportError, CommandError."""
    file = sqlite.file_of(url)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        engine = sqlite.opened(file, mode="rwc", poolclass=NullPool)
    else:  # a migration, or waiting for another process's, may take its time
        engine = create_engine(url, poolclass=NullPool, hide_parameters=True, connect_args=postgresql.options(url))
    config = _alembic()
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def newest_migration() -> str | None:
    """The version of the tables this code works with."""
    return ScriptDirectory.from_config(_alembic()).get_current_head()


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def _with_driver(url: URL) -> URL:
    """postgres:// and postgresql:// mean psycopg 3, the driver of the extra `postgres`."""
    return url.set(drivername=POSTGRESQL) if url.drivername in ("postgres", "postgresql") else url


def _opened(url: URL) -> Engine:
    file = sqlite.file_of(url)
    pool = {"pool_size": 5, "max_overflow": 20, "pool_timeout": POOL_SECONDS}
    return postgresql.opened(url, **pool) if file is None else sqlite.opened(file, mode="rw", **pool)
