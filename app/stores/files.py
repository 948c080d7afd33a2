"""Files in the database, in chunks."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sqlalchemy import Connection, RowMapping, Table, delete, insert, select, update

from app.stores.batch_base import UNFINISHED, FileInfo, Listing
from app.stores.batch_tables import batches, file_chunks, files
from app.stores.database import Database

CHUNK_BYTES = 2**20


class SqlFileStore:
    """Thread-safe and synchronous; every method raises StoreError when the store cannot answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, namespace: str, filename: str, purpose: str, content: Callable[[], Iterable[bytes]]) -> FileInfo:
        """A file, whole or not at all. `content` is called for each attempt."""
        return self._database.write(lambda connection: write_file(connection, namespace, filename, purpose, content()))

    def get(self, namespace: str, file_id: str) -> FileInfo | None:
        query = select(files).where(files.c.namespace == namespace, files.c.id == file_id)
        with self._database.reading() as connection:
            row = connection.execute(query).mappings().first()
        return _info(row) if row else None

    def list(
        self, namespace: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> Listing[FileInfo] | None:
        """None where there is no file `after`."""
        with self._database.reading() as connection:
            query = select(files).where(files.c.namespace == namespace)
            if purpose is not None:
                query = query.where(files.c.purpose == purpose)
            rows = page(connection, files, query, after=after, limit=limit, newest_first=newest_first)
        return None if rows is None else Listing([_info(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def chunks(self, file_id: str) -> Iterator[bytes]:
        """The content, piece by piece, each read in a transaction of its own."""
        number = 0
        while True:
            query = select(file_chunks.c.data).where(file_chunks.c.file_id == file_id, file_chunks.c.number == number)
            with self._database.reading() as connection:
                data: bytes | None = connection.scalar(query)
            if data is None:
                return
            yield data
            number += 1

    def delete(self, namespace: str, file_id: str) -> bool | None:
        """None: there is none. False: an unfinished batch reads it, nothing is done."""

        def work(connection: Connection) -> bool | None:
            query = select(files.c.seq).where(files.c.namespace == namespace, files.c.id == file_id)
            if connection.scalar(query) is None:
                return None
            reads = select(batches.c.seq).where(batches.c.input_file_id == file_id, batches.c.status.in_(UNFINISHED))
            if connection.scalar(reads.limit(1)) is not None:
                return False
            connection.execute(delete(file_chunks).where(file_chunks.c.file_id == file_id))
            connection.execute(delete(files).where(files.c.id == file_id))
            return True

        return self._database.write(work)


def write_file(
    connection: Connection, namespace: str, filename: str, purpose: str, content: Iterable[bytes]
) -> FileInfo:
    """Inside a transaction."""
    file_id, size = f"file-{uuid.uuid4().hex[:24]}", 0
    values = {"id": file_id, "namespace": namespace, "filename": filename[:255], "purpose": purpose, "bytes": 0}
    connection.execute(insert(files).values(**values, created_at=int(time.time())))
    for number, data in enumerate(_resized(content)):
        connection.execute(insert(file_chunks).values(file_id=file_id, number=number, data=data))
        size += len(data)
    connection.execute(update(files).where(files.c.id == file_id).values(bytes=size))
    return _info(connection.execute(select(files).where(files.c.id == file_id)).mappings().one())


def page(
    connection: Connection, table: Table, query: Any, *, after: str | None, limit: int, newest_first: bool
) -> list[RowMapping] | None:
    """`limit` + 1 rows behind the one with id `after`, in order of creation; None where there is no such row."""
    if after is not None:
        seq = connection.scalar(query.with_only_columns(table.c.seq).where(table.c.id == after))
        if seq is None:
            return None
        query = query.where(table.c.seq < seq if newest_first else table.c.seq > seq)
    order = table.c.seq.desc() if newest_first else table.c.seq.asc()
    return list(connection.execute(query.order_by(order).limit(limit + 1)).mappings())


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
