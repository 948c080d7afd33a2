"""Files in the database, in chunks."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, TypeVar
from zlib import crc32

from sqlalchemy import (
    ColumnElement,
    Connection,
    Insert,
    Row,
    RowMapping,
    Table,
    Update,
    and_,
    delete,
    exists,
    insert,
    select,
    update,
)

from app.domain import Page
from app.errors import StoreError
from app.stores.batch_base import UNFINISHED, FileInfo
from app.stores.batch_tables import batch_lines, batches, file_chunks, files
from app.stores.database import Database
from app.stores.errors import PayloadDamaged

T = TypeVar("T")

CHUNK_BYTES = 2**20
LOOK_AHEAD = 500
"""Lines whose sizes are looked at to make a piece of about CHUNK_BYTES."""
DELETED_TOGETHER = 500
PARTIAL_SECONDS = 3600
"""A file that takes longer to be written is given up."""


class SqlFileStore:
    """Thread-safe and synchronous; every method raises StoreError when the store cannot answer, PayloadDamaged among
    them where a file's content is read."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self, namespace: str, filename: str, purpose: str, content: Iterable[bytes], *, seconds: int | None = None
    ) -> FileInfo:
        """A file, whole or not at all. `seconds`: that it is kept. Pieces are written one by one, so that others write
        between them; until the last one is, nobody sees it, and what a process that died leaves is deleted in time."""
        info = self._database.write(
            lambda connection: add_file(
                connection, namespace, filename, purpose, size=0, seconds=PARTIAL_SECONDS, is_partial=True
            )
        )
        size = 0
        try:
            for number, data in enumerate(_resized(content)):
                self._run(insert(file_chunks).values(file_id=info.id, number=number, data=data, crc32=crc32(data)))
                size += len(data)
            end = None if seconds is None else info.created_at + seconds
            self._run(update(files).where(files.c.id == info.id).values(bytes=size, expires_at=end, is_partial=None))
        except BaseException:
            with suppress(StoreError):
                self._database.write(lambda connection: _delete(connection, info.id))
            raise
        return replace(info, bytes=size, expires_at=end)

    def _run(self, statement: Insert | Update) -> None:
        self._database.write(lambda connection: connection.execute(statement))

    def get(self, namespace: str, file_id: str) -> FileInfo | None:
        query = select(files).where(files.c.namespace == namespace, files.c.id == file_id, is_there())
        with self._database.reading() as connection:
            row = connection.execute(query).mappings().first()
        return _info(row) if row else None

    def list(
        self, namespace: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> Page[FileInfo] | None:
        """None where there is no file `after`."""
        with self._database.reading() as connection:
            query = select(files).where(files.c.namespace == namespace, is_there())
            if purpose is not None:
                query = query.where(files.c.purpose == purpose)
            return page(connection, files, query, _info, after=after, limit=limit, newest_first=newest_first)

    def chunks(self, file_id: str) -> Iterator[bytes]:
        """The content, piece by piece, each read in a transaction of its own."""
        with self._database.reading() as connection:
            row = connection.execute(select(files).where(files.c.id == file_id)).mappings().first()
        position: int | None = -1
        while row is not None and position is not None:
            with self._database.reading() as connection:
                position, data = _piece(connection, row, position)
            if data:
                yield data

    def delete(self, namespace: str, file_id: str) -> bool | None:
        """None: there is none. False: an unfinished batch reads it, nothing is done."""

        def work(connection: Connection) -> bool | None:
            query = select(files).where(files.c.namespace == namespace, files.c.id == file_id, is_there())
            row = connection.execute(query.with_for_update()).mappings().first()
            return None if row is None else _deleted(connection, row)

        return self._database.write(work)

    def delete_expired(self) -> bool:
        """One of those that no unfinished batch reads. False: there is none."""
        over = select(files).where(_has_expired(), ~_is_read(files.c.id)).order_by(files.c.expires_at).limit(1)

        def work(connection: Connection) -> bool:
            row = connection.execute(over.with_for_update(skip_locked=True)).mappings().first()
            return row is not None and _deleted(connection, row)

        return self._database.write(work)


def content_of(connection: Connection, file: RowMapping) -> Iterator[bytes]:
    """A file's content, piece by piece, all in one transaction. Raises PayloadDamaged."""
    position: int | None = -1
    while position is not None:
        position, data = _piece(connection, file, position)
        yield data


def add_file(
    connection: Connection, namespace: str, filename: str, purpose: str, *, size: int, seconds: int | None, **more: Any
) -> FileInfo:
    """`seconds`: that it is kept; None: until it is deleted. `more`: other columns of its row."""
    now = int(time.time())
    end = None if seconds is None else now + seconds
    info = FileInfo(f"file-{uuid.uuid4().hex[:24]}", namespace, filename[:255], purpose, size, now, end)
    connection.execute(insert(files).values(**asdict(info), **more))
    return info


def is_there() -> ColumnElement[bool]:
    return and_(files.c.is_partial.is_(None), ~_has_expired())


def _has_expired() -> ColumnElement[bool]:
    return and_(files.c.expires_at.is_not(None), files.c.expires_at <= time.time())


def _is_read(file_id: Any) -> ColumnElement[bool]:
    """By a batch that is not finished."""
    return exists().where(batches.c.input_file_id == file_id, batches.c.status.in_(UNFINISHED))


def _deleted(connection: Connection, row: RowMapping) -> bool:
    """False: it is read. The row is locked, so that no batch is added for it from now on."""
    if connection.scalar(select(_is_read(row["id"]))):
        return False
    if row["batch_id"] is not None:
        _delete_lines(connection, row)
    _delete(connection, row["id"])
    return True


def _delete(connection: Connection, file_id: str) -> None:
    connection.execute(delete(file_chunks).where(file_chunks.c.file_id == file_id))
    connection.execute(delete(files).where(files.c.id == file_id))


def _piece(connection: Connection, file: RowMapping, after: int) -> tuple[int | None, bytes]:
    """What follows position `after`, and the position it ends at; None: nothing follows."""
    if file["batch_id"] is None:
        chunks = select(file_chunks).where(file_chunks.c.file_id == file["id"], file_chunks.c.number == after + 1)
        chunk = connection.execute(chunks).first()
        return (None, b"") if chunk is None else (after + 1, _whole(file, chunk))
    beyond = and_(_of(file), batch_lines.c.number > after)
    sizes = select(batch_lines.c.number, batch_lines.c.bytes).where(beyond).order_by(batch_lines.c.number)
    last, total = None, 0
    for row in connection.execute(sizes.limit(LOOK_AHEAD)):
        if last is not None and total + row.bytes > CHUNK_BYTES:
            break
        last, total = row.number, total + row.bytes
    if last is None:
        return None, b""
    lines = select(batch_lines).where(beyond, batch_lines.c.number <= last).order_by(batch_lines.c.number)
    return last, b"".join(_whole(file, line) for line in connection.execute(lines))


def _whole(file: RowMapping, row: Row[Any]) -> bytes:
    """Raises PayloadDamaged. What was stored before there were checksums has none."""
    data: bytes = row.data
    if row.crc32 not in (None, crc32(data)):
        raise PayloadDamaged(
            f"The stored content of {file['id']} is damaged: it fails its checksum. Delete the file and upload or "
            f"compute it again."
        )
    return data


def _delete_lines(connection: Connection, file: RowMapping) -> None:
    """Some at a time: no statement takes longer than the database lets one."""
    some = select(batch_lines.c.number).where(_of(file)).limit(DELETED_TOGETHER)
    while numbers := connection.scalars(some).all():
        connection.execute(delete(batch_lines).where(_of(file), batch_lines.c.number.in_(numbers)))


def _of(file: RowMapping) -> ColumnElement[bool]:
    return and_(batch_lines.c.batch_id == file["batch_id"], batch_lines.c.ok == file["ok"])


def page(
    connection: Connection,
    table: Table,
    query: Any,
    info: Callable[[RowMapping], T],
    *,
    after: str | None,
    limit: int,
    newest_first: bool,
) -> Page[T] | None:
    """`limit` rows of `query` after the one with id `after`, in order of creation; None where there is no such row."""
    if after is not None:
        seq = connection.scalar(query.with_only_columns(table.c.seq).where(table.c.id == after))
        if seq is None:
            return None
        query = query.where(table.c.seq < seq if newest_first else table.c.seq > seq)
    order = table.c.seq.desc() if newest_first else table.c.seq.asc()
    rows = connection.execute(query.order_by(order).limit(limit + 1)).mappings().all()
    return Page([info(row) for row in rows[:limit]], has_more=len(rows) > limit)


def _resized(content: Iterable[bytes]) -> Iterator[bytes]:
    buffer = bytearray()
    for piece in content:
        buffer += piece
        while len(buffer) >= CHUNK_BYTES:
            yield bytes(buffer[:CHUNK_BYTES])
            del buffer[:CHUNK_BYTES]
    if buffer:
        yield bytes(buffer)


def _info(row: RowMapping) -> FileInfo:
    return FileInfo(**{name: row[name] for name in FileInfo.__dataclass_fields__})
