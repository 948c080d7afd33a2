"""The context store on SQLAlchemy: SQLite in a file (default), PostgreSQL, or any database with these tables."""

import hashlib
import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import orjson
from sqlalchemy import Connection, and_, exists, select, update
from sqlalchemy.exc import SQLAlchemyError

from app.domain import Arrays, ContextInfo, ContextRef, ContextStatus, Page, Space
from app.errors import StoreError
from app.payloads import from_safetensors, to_safetensors
from app.stores import rows
from app.stores.base import Begun, Built, NewContext
from app.stores.database import connect, is_conflict
from app.stores.tables import names, payloads, versions
from app.stores.writing import begin_version, complete_version, one, point, remove

ATTEMPTS = 8
"""Two writers that get in each other's way: one of them starts over."""
PAUSE_SECONDS = 0.02

T = TypeVar("T")


class SqlContextStore:
    """Implements stores.base.ContextStore."""

    def __init__(self, url: str) -> None:
        """Opens the database and brings its tables up to date. Raises StoreError."""
        self._engine = connect(url)

    def begin(self, new: NewContext) -> tuple[ContextInfo, Begun]:
        row, begun = self._write(lambda connection: begin_version(connection, new))
        return rows.info_of(row), begun

    def beat(self, info: ContextInfo, done: int) -> None:
        query = update(versions).where(one(info), versions.c.status == ContextStatus.IN_PROGRESS.value)
        self._write(lambda connection: connection.execute(query.values(done=done, beat_at=rows.now())))

    def complete(self, info: ContextInfo, built: Built) -> ContextInfo | None:
        data = to_safetensors(built.arrays)
        documents = None if built.texts is None else zlib.compress(orjson.dumps(list(built.texts)))
        row = self._write(lambda connection: complete_version(connection, info, built, data, documents))
        return rows.info_of(row) if row is not None else None

    def fail(self, info: ContextInfo, reason: str) -> None:
        query = update(versions).where(one(info), versions.c.status == ContextStatus.IN_PROGRESS.value)
        failed = query.values(status=ContextStatus.FAILED.value, error=reason[:512])
        self._write(lambda connection: connection.execute(failed))

    def put(self, new: NewContext, arrays: Arrays) -> tuple[ContextInfo, bool]:
        data, built = to_safetensors(arrays), Built(new.id, arrays, new.selection, new.documents)

        def work(connection: Connection) -> tuple[ContextInfo, bool]:
            row, begun = begin_version(connection, new)
            if begun is Begun.THERE:
                return rows.info_of(row), False
            completed = complete_version(connection, rows.info_of(row), built, data, None)
            if completed is None:
                raise AssertionError("a version begun in this transaction is there")
            return rows.info_of(completed), True

        return self._write(work)

    def get(self, space: Space, ref: ContextRef) -> ContextInfo | None:
        with self._reading() as connection:
            row = connection.execute(rows.matching(ref).where(rows.in_space(space))).mappings().first()
        return rows.info_of(row) if row else None

    def models_of(self, namespace: str, ref: ContextRef) -> Sequence[str]:
        with self._reading() as connection:
            found = connection.execute(rows.matching(ref).where(versions.c.namespace == namespace)).mappings().all()
        return sorted({row["model"] for row in found})

    def arrays(self, context_id: str) -> Arrays | None:
        query = select(payloads.c.data, payloads.c.sha256).where(payloads.c.id == context_id)
        with self._reading() as connection:
            row = connection.execute(query).first()
        if row is None or row.data is None:
            return None
        if hashlib.sha256(row.data).hexdigest() != row.sha256:
            raise StoreError(
                f"The stored arrays of {context_id} fail their checksum: delete the context and create it again."
            )
        return from_safetensors(row.data)

    def texts(self, context_id: str) -> Sequence[str] | None:
        with self._reading() as connection:
            data = connection.scalar(select(payloads.c.documents).where(payloads.c.id == context_id))
        found: list[str] | None = None if data is None else orjson.loads(zlib.decompress(data))
        return found

    def list_current(
        self, namespace: str, model: str | None, *, after: str | None, limit: int, newest_first: bool
    ) -> Page | None:
        query = rows.current().where(versions.c.namespace == namespace)
        if model is not None:
            query = query.where(versions.c.model == model)
        order = payloads.c.seq.desc() if newest_first else payloads.c.seq.asc()
        query = query.order_by(order, versions.c.model, versions.c.name)
        with self._reading() as connection:
            if after is not None:
                own = exists().where(versions.c.id == payloads.c.id, versions.c.namespace == namespace)
                seq = connection.scalar(select(payloads.c.seq).where(payloads.c.id == after, own))
                if seq is None:
                    return None
                query = query.where(payloads.c.seq < seq if newest_first else payloads.c.seq > seq)
            page = [rows.info_of(row) for row in connection.execute(query.limit(limit + 1)).mappings()]
            if len(page) <= limit:
                return Page(page, has_more=False)
            kept, last = page[:limit], page[limit - 1].id
            if page[limit].id == last:  # names of one content stay together: `after` is an id
                same = connection.execute(query.where(versions.c.id == last)).mappings()
                kept = [info for info in kept if info.id != last] + [rows.info_of(row) for row in same]
            tail = connection.scalar(select(payloads.c.seq).where(payloads.c.id == last))
            beyond = query.where(payloads.c.seq < tail if newest_first else payloads.c.seq > tail)
            return Page(kept, has_more=connection.execute(beyond.limit(1)).first() is not None)

    def versions(self, space: Space, name: str) -> Sequence[ContextInfo]:
        query = select(versions).where(rows.in_space(space), versions.c.name == name)
        with self._reading() as connection:
            found = connection.execute(query.order_by(versions.c.version.desc())).mappings()
            return [rows.info_of(row) for row in found]

    def move(self, space: Space, name: str, version: int) -> ContextInfo | None:
        query = rows.matching(ContextRef("", name=name, version=version)).where(
            rows.in_space(space), versions.c.status == ContextStatus.COMPLETED.value
        )

        def work(connection: Connection) -> ContextInfo | None:
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            point(connection, space, name, version)
            return rows.info_of(row)

        return self._write(work)

    def delete_name(self, space: Space, name: str) -> bool:
        def work(connection: Connection) -> bool:
            gone = update(names).where(rows.named(space, name), names.c.version > 0).values(version=0)
            found = connection.execute(gone).rowcount > 0
            remove(connection, and_(rows.in_space(space), versions.c.name == name))
            return found

        return self._write(work)

    def delete_versions(self, space: Space, ref: ContextRef) -> bool | None:
        def work(connection: Connection) -> bool | None:
            found = connection.execute(rows.matching(ref).where(rows.in_space(space))).mappings().all()
            if not found:
                return None
            for row in found:
                pointed = select(names.c.version).where(rows.named(space, row["name"])).with_for_update()
                if connection.scalar(pointed) == row["version"]:
                    return False
            remove(connection, versions.c.seq.in_([row["seq"] for row in found]))
            return True

        return self._write(work)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection, connection.execution_options(immediate=False).begin():
                yield connection
        except SQLAlchemyError as error:
            raise _silent(error) from error

    def _write(self, work: Callable[[Connection], T]) -> T:
        """One transaction; begun anew where another writer was in the way."""
        for attempt in range(ATTEMPTS):
            try:
                with self._engine.connect() as connection, connection.execution_options(immediate=True).begin():
                    return work(connection)
            except SQLAlchemyError as error:
                if not is_conflict(error) or attempt == ATTEMPTS - 1:
                    raise _silent(error) from error
                time.sleep(PAUSE_SECONDS * attempt * random.random())  # noqa: S311 - not the same ones again at once
        raise AssertionError("the last attempt returns or raises")


def _silent(error: SQLAlchemyError) -> StoreError:
    return StoreError(f"The context store does not answer: {type(error).__name__}")
