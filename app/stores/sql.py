"""The context store on SQLAlchemy: SQLite in a file (default), or any database URL with these tables."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, delete, insert, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from app.domain import Arrays, ContextInfo, ContextRef, ContextStatus, DocumentCounts, Page, Selection
from app.errors import StoreError
from app.payloads import from_safetensors, to_safetensors
from app.stores.base import NewContext
from app.stores.database import migrate, open_database
from app.stores.tables import names, payloads, versions

ATTEMPTS = 3
"""Two writers that make the same version at once: one of them starts over."""


class SqlContextStore:
    """Implements stores.base.ContextStore."""

    def __init__(self, url: str) -> None:
        """Opens the database and brings its tables up to date. Raises StoreError."""
        try:
            self._engine = open_database(url)
            migrate(self._engine)
        except (SQLAlchemyError, OSError) as error:
            raise StoreError(
                f"The context store {make_url(url).render_as_string()} cannot be opened: {error}"
            ) from error

    def put(self, new: NewContext, arrays: Arrays) -> tuple[ContextInfo, bool]:
        data = to_safetensors(arrays)
        for attempt in range(ATTEMPTS):
            try:
                with self._transaction(write=True) as connection:
                    return _put(connection, new, data)
            except StoreError as error:
                if not isinstance(error.__cause__, IntegrityError) or attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def get(self, model: str, ref: ContextRef) -> ContextInfo | None:
        with self._transaction() as connection:
            row = connection.execute(_matching(ref).where(versions.c.model == model)).mappings().first()
        return _info(row) if row else None

    def models_of(self, ref: ContextRef) -> Sequence[str]:
        with self._transaction() as connection:
            rows = connection.execute(_matching(ref)).mappings().all()
        return sorted({row["model"] for row in rows})

    def arrays(self, context_id: str) -> Arrays | None:
        query = select(payloads.c.data, payloads.c.sha256).where(payloads.c.id == context_id)
        with self._transaction() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        if hashlib.sha256(row.data).hexdigest() != row.sha256:
            raise StoreError(
                f"The stored arrays of {context_id} fail their checksum: delete the context and create it again."
            )
        return from_safetensors(row.data)

    def list_current(self, model: str | None, *, after: str | None, limit: int, newest_first: bool) -> Page | None:
        query = _current()
        if model is not None:
            query = query.where(versions.c.model == model)
        order = payloads.c.seq.desc() if newest_first else payloads.c.seq.asc()
        query = query.order_by(order, versions.c.model, versions.c.name)
        with self._transaction() as connection:
            if after is not None:
                seq = connection.scalar(select(payloads.c.seq).where(payloads.c.id == after))
                if seq is None:
                    return None
                query = query.where(payloads.c.seq < seq if newest_first else payloads.c.seq > seq)
            page = [_info(row) for row in connection.execute(query.limit(limit + 1)).mappings()]
            if len(page) <= limit:
                return Page(page, has_more=False)
            kept, last = page[:limit], page[limit - 1].id
            if page[limit].id == last:  # names of one content stay together: `after` is an id
                rows = connection.execute(query.where(versions.c.id == last)).mappings()
                kept = [info for info in kept if info.id != last] + [_info(row) for row in rows]
            tail = connection.scalar(select(payloads.c.seq).where(payloads.c.id == last))
            beyond = query.where(payloads.c.seq < tail if newest_first else payloads.c.seq > tail)
            return Page(kept, has_more=connection.execute(beyond.limit(1)).first() is not None)

    def versions(self, model: str, name: str) -> Sequence[ContextInfo]:
        query = (
            select(versions)
            .where(versions.c.model == model, versions.c.name == name)
            .order_by(versions.c.version.desc())
        )
        with self._transaction() as connection:
            return [_info(row) for row in connection.execute(query).mappings()]

    def move(self, model: str, name: str, version: int) -> ContextInfo | None:
        query = _matching(ContextRef("", name=name, version=version)).where(versions.c.model == model)
        with self._transaction(write=True) as connection:
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            _point(connection, model, name, version)
            return _info(row)

    def delete_name(self, model: str, name: str) -> bool:
        with self._transaction(write=True) as connection:
            gone = connection.execute(delete(names).where(names.c.model == model, names.c.name == name))
            connection.execute(delete(versions).where(versions.c.model == model, versions.c.name == name))
            _sweep(connection)
            return gone.rowcount > 0

    def delete_versions(self, model: str, ref: ContextRef) -> bool | None:
        with self._transaction(write=True) as connection:
            rows = connection.execute(_matching(ref).where(versions.c.model == model)).mappings().all()
            if not rows:
                return None
            pointed = select(names.c.name, names.c.version).where(names.c.model == model)
            current = {(row.name, row.version) for row in connection.execute(pointed)}
            if any((row["name"], row["version"]) in current for row in rows):
                return False
            connection.execute(delete(versions).where(versions.c.seq.in_([row["seq"] for row in rows])))
            _sweep(connection)
            return True

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection, connection.execution_options(immediate=write).begin():
                yield connection
        except SQLAlchemyError as error:
            raise StoreError(f"The context store does not answer: {type(error).__name__}") from error


def _put(connection: Connection, new: NewContext, data: bytes) -> tuple[ContextInfo, bool]:
    same = select(versions).where(versions.c.model == new.model, versions.c.name == new.name, versions.c.id == new.id)
    row = connection.execute(same.order_by(versions.c.version.desc())).mappings().first()
    if row is not None:
        _point(connection, new.model, new.name, row["version"])
        return _info(row), False
    if connection.scalar(select(payloads.c.seq).where(payloads.c.id == new.id)) is None:
        connection.execute(insert(payloads).values(id=new.id, data=data, sha256=hashlib.sha256(data).hexdigest()))
    last = connection.scalar(
        select(names.c.last_version).where(names.c.model == new.model, names.c.name == new.name).with_for_update()
    )
    values = {
        "model": new.model,
        "name": new.name,
        "version": (last or 0) + 1,
        "id": new.id,
        "model_revision": new.model_revision,
        "created_at": datetime.now(UTC).replace(microsecond=0),
        "selection": asdict(new.selection),
        "documents": asdict(new.documents),
        "corpus_size": new.corpus_size,
        "dimensions": new.dimensions,
        "usage_bytes": len(data),
        "metadata": dict(new.metadata),
    }
    connection.execute(insert(versions).values(values))
    if last is None:
        connection.execute(insert(names).values(model=new.model, name=new.name, version=1, last_version=1))
    else:
        _point(connection, new.model, new.name, last + 1, last_version=last + 1)
    return _info(values), True


def _point(connection: Connection, model: str, name: str, version: int, **more: int) -> None:
    connection.execute(
        update(names).where(names.c.model == model, names.c.name == name).values(version=version, **more)
    )


def _sweep(connection: Connection) -> None:
    """Payloads no version holds any more."""
    connection.execute(delete(payloads).where(payloads.c.id.not_in(select(versions.c.id))))


def _current() -> Select[Any]:
    return (
        select(versions)
        .join(names, (names.c.model == versions.c.model) & (names.c.name == versions.c.name))
        .where(names.c.version == versions.c.version)
        .join(payloads, payloads.c.id == versions.c.id)
    )


def _matching(ref: ContextRef) -> Select[Any]:
    """Versions `ref` means, newest first."""
    if ref.id is not None:
        query = select(versions).where(versions.c.id == ref.id)
    elif ref.version is not None:
        query = select(versions).where(versions.c.name == ref.name, versions.c.version == ref.version)
    else:
        query = _current().where(versions.c.name == ref.name)
    return query.order_by(versions.c.seq.desc())


def _info(row: RowMapping | dict[str, Any]) -> ContextInfo:
    created_at: datetime = row["created_at"]
    return ContextInfo(
        id=row["id"],
        model=row["model"],
        model_revision=row["model_revision"],
        name=row["name"],
        version=row["version"],
        status=ContextStatus.COMPLETED,
        created_at=created_at if created_at.tzinfo else created_at.replace(tzinfo=UTC),
        selection=Selection(**row["selection"]),
        documents=DocumentCounts(**row["documents"]),
        corpus_size=row["corpus_size"],
        dimensions=row["dimensions"],
        usage_bytes=row["usage_bytes"],
        metadata=row["metadata"],
    )
