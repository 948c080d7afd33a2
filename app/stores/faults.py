"""A database's error -> what is wrong with the store; and the memory of what is wrong at the moment."""

import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.errors import StoreError
from app.stores.errors import StoreAway, StoreBusy, StoreDamaged, StoreFull, StoreReadOnly
from app.telemetry.metrics import STORE_FAULT

log = logging.getLogger(__name__)

# SQLite's primary result codes, https://sqlite.org/rescode.html.
SQLITE: Mapping[int, type[StoreError]] = {
    5: StoreBusy,  # BUSY
    6: StoreBusy,  # LOCKED
    8: StoreReadOnly,  # READONLY
    11: StoreDamaged,  # CORRUPT
    13: StoreFull,  # FULL
    26: StoreDamaged,  # NOTADB
}
SQLITE_OF_THE_DISK = (3, 10, 14)
"""PERM, IOERR, CANTOPEN: they do not say why; the disk does."""

# PostgreSQL's SQLSTATEs, or their first two characters, https://www.postgresql.org/docs/current/errcodes-appendix.html.
POSTGRESQL: Mapping[str, type[StoreError]] = {
    "08": StoreAway,  # connection exception
    "25006": StoreReadOnly,  # read-only transaction: a standby, or default_transaction_read_only
    "28": StoreAway,  # the account is refused
    "3D": StoreAway,  # no such database
    "40": StoreBusy,  # serialisation failure, deadlock
    "53": StoreBusy,  # out of connections or memory
    "53100": StoreFull,
    "55P03": StoreBusy,  # lock_timeout
    "57014": StoreBusy,  # statement_timeout
    "57P": StoreAway,  # shutting down, starting
    "XX001": StoreDamaged,
    "XX002": StoreDamaged,
}

AWAY_SECONDS = 1.0
"""Between two attempts to reach a database that is away; whoever asks meanwhile is told so at once."""
LOOK_SECONDS = 5.0
"""So long one caller looks whether it is back, and the others are still told that it is away."""
LITTLE_ROOM = 64 * 2**10


def fault_of(error: SQLAlchemyError, file: Path | None = None) -> StoreError:
    """`file`: SQLite's."""
    kind = _kind(error, error.orig if isinstance(error, DBAPIError) else None, file)
    return kind(f"The context store fails ({kind.kind}): {words_of(error)}")


def words_of(error: Exception) -> str:
    """The database's own words on one line, without SQL and what was to be written."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    return " ".join(str(cause or error).split())


def _kind(error: SQLAlchemyError, cause: BaseException | None, file: Path | None) -> type[StoreError]:
    if isinstance(error, PoolTimeout):
        return StoreBusy
    code: int | None = getattr(cause, "sqlite_errorcode", None)
    if code is not None:
        primary = code & 0xFF
        return _of_the_disk(file) if primary in SQLITE_OF_THE_DISK else SQLITE.get(primary, StoreError)
    if cause is None or not hasattr(cause, "sqlstate"):
        return StoreError
    state: str | None = cause.sqlstate
    if state is None:  # the driver's own: there is no connection, or no longer one
        return StoreAway if isinstance(error, OperationalError | InterfaceError) else StoreError
    return next((POSTGRESQL[state[:n]] for n in (5, 3, 2) if state[:n] in POSTGRESQL), StoreError)


def _of_the_disk(file: Path | None) -> type[StoreError]:
    if file is None or not file.exists():
        return StoreAway
    try:
        disk = os.statvfs(file.parent)
    except OSError:
        return StoreAway
    if disk.f_flag & os.ST_RDONLY or not os.access(file, os.W_OK) or not os.access(file.parent, os.W_OK):
        return StoreReadOnly
    return StoreFull if disk.f_bavail * disk.f_frsize < LITTLE_ROOM else StoreAway


class Faults:
    """What is wrong with a database now: logged when it begins and when it ends, not once a request. Thread-safe."""

    def __init__(self) -> None:
        self._since: dict[type[StoreError], float] = {}
        self._look_at = 0.0
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises StoreAway while the database is known to be away, so that only one caller waits for it."""
        with self._lock:
            if StoreAway not in self._since:
                return
            now = time.monotonic()
            if now < self._look_at:
                away = StoreAway("The context store was away a moment ago")
                away.retry_after = self._look_at - now
                raise away
            self._look_at = now + LOOK_SECONDS

    def has(self, kind: type[StoreError]) -> bool:
        return kind in self._since

    def begin(self, fault: StoreError) -> None:
        kind = type(fault)
        with self._lock:
            if kind is StoreAway:
                self._look_at = time.monotonic() + AWAY_SECONDS
            if kind in self._since:
                return
            self._since[kind] = time.monotonic()
        STORE_FAULT.labels(fault.kind).set(1)
        log.error("%s", fault)

    def reached(self) -> None:
        """The database takes transactions."""
        self._end(StoreAway)

    def written(self) -> None:
        """A transaction that wrote went well. Damage is elsewhere, and stays."""
        self._end(StoreError, StoreAway, StoreBusy, StoreFull, StoreReadOnly)

    def _end(self, *kinds: type[StoreError]) -> None:
        if not self._since:
            return
        with self._lock:
            since = {kind: self._since.pop(kind) for kind in kinds if kind in self._since}
        for kind, begun in since.items():
            STORE_FAULT.labels(kind.kind).set(0)
            log.info("The context store works again (%s), after %.0f s", kind.kind, time.monotonic() - begun)
