"""SQLite: write-ahead logging, every commit on disk, and the very file that was opened."""

import sqlite3
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DisconnectionError

BUSY_SECONDS = 10.0
"""A writer waits for another one; it may be an upload of many megabytes."""


def file_of(url: URL) -> Path | None:
    """The database's file; None for other databases, and in memory."""
    return Path(url.database).absolute() if url.get_backend_name() == "sqlite" and url.database else None


def opened(file: Path, *, mode: str, **options: Any) -> Engine:
    """`mode`: `rwc` makes the file where there is none; `rw` and `ro` do not, so that a store whose file was moved
    away is no empty one."""
    named = URL.create("sqlite", database=f"file:{quote(str(file))}", query={"mode": mode, "uri": "true"})
    engine = create_engine(
        named,
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
        hide_parameters=True,
        **options,
    )

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's BEGIN below, not the driver's late one
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
        if mode != "ro":
            _write_ahead(connection)
        record.info["file"] = _identity(file)

    @event.listens_for(engine, "checkout")
    def _same_file(_connection: Any, record: Any, _proxy: Any) -> None:
        # A connection goes on with the file it opened, wherever that is by now; what it wrote there would be lost.
        if record.info["file"] != _identity(file):
            raise DisconnectionError

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A writer takes the write lock at once: a read lock that grows in mid-transaction fails when two do it.
        immediate = connection.get_execution_options().get("immediate", True)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


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
