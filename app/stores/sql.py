"""The context store on SQLAlchemy: SQLite in a file (default), or PostgreSQL."""

import hashlib
import zlib
from collections.abc import Sequence

import orjson
from sqlalchemy import Connection, and_, func, select, update

from app.domain import Arrays, ContextInfo, ContextRef, ContextStatus, Page, Space
from app.payloads import from_safetensors, to_safetensors
from app.stores import rows
from app.stores.base import Begun, Built, NewContext
from app.stores.database import Database
from app.stores.errors import PayloadDamaged
from app.stores.tables import names, payloads, texts, versions
from app.stores.writing import begin_version, being_built, complete_version, lock_name, one, point, remove


class SqlContextStore:
    """Implements stores.base.ContextStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, new: NewContext) -> tuple[ContextInfo, Begun]:
        row, begun = self._database.write(lambda connection: begin_version(connection, new))
        return rows.info_of(row), begun

    def beat(self, info: ContextInfo, builder: str, done: int) -> None:
        query = update(versions).where(being_built(info, builder)).values(done=done, beat_at=rows.now())
        self._database.write(lambda connection: connection.execute(query))

    def complete(self, info: ContextInfo, built: Built) -> ContextInfo | None:
        data = to_safetensors(built.arrays)
        documents = None if built.texts is None else zlib.compress(orjson.dumps(list(built.texts)))
        row = self._database.write(lambda connection: complete_version(connection, info, built, data, documents))
        return rows.info_of(row) if row is not None else None

    def fail(self, info: ContextInfo, builder: str, reason: str) -> None:
        failed = {"status": ContextStatus.FAILED.value, "error": reason[:512]}
        query = update(versions).where(being_built(info, builder)).values(failed)
        self._database.write(lambda connection: connection.execute(query))

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

        return self._database.write(work)

    def get(self, space: Space, ref: ContextRef) -> ContextInfo | None:
        with self._database.reading() as connection:
            row = connection.execute(rows.matching(ref).where(rows.in_space(space))).mappings().first()
        return rows.info_of(row) if row else None

    def models_of(self, namespace: str, ref: ContextRef) -> Sequence[str]:
        with self._database.reading() as connection:
            found = connection.execute(rows.matching(ref).where(versions.c.namespace == namespace)).mappings().all()
        return sorted({row["model"] for row in found})

    def arrays(self, context_id: str) -> Arrays | None:
        query = select(payloads.c.data, payloads.c.sha256).where(payloads.c.id == context_id)
        with self._database.reading() as connection:
            row = connection.execute(query).first()
        if row is None or row.data is None:
            return None
        if hashlib.sha256(row.data).hexdigest() != row.sha256:
            raise PayloadDamaged(
                f"The stored arrays of {context_id} are damaged: they fail their checksum. Delete the context and "
                f"create it again."
            )
        return from_safetensors(row.data)

    def texts(self, info: ContextInfo) -> Sequence[str] | None:
        query = select(texts.c.data).join(versions, versions.c.seq == texts.c.version_seq).where(one(info))
        with self._database.reading() as connection:
            data = connection.scalar(query)
        if data is None:
            return None
        try:
            found: list[str] = orjson.loads(zlib.decompress(data))
        except (zlib.error, ValueError) as error:
            raise PayloadDamaged(
                f"The stored documents of {info.name}.{info.version} are damaged. Delete it and create it again."
            ) from error
        return found

    def list_current(
        self, namespace: str, model: str | None, *, after: str | None, limit: int, newest_first: bool
    ) -> Page[ContextInfo] | None:
        # A content has its place by its first version in this namespace: what other namespaces hold does not show.
        first = func.min(versions.c.seq) * (-1 if newest_first else 1)
        own = select(versions.c.id, first.label("place")).where(versions.c.namespace == namespace)
        places = own.group_by(versions.c.id).subquery()
        place = places.c.place
        query = rows.current().where(versions.c.namespace == namespace).join(places, places.c.id == versions.c.id)
        if model is not None:
            query = query.where(versions.c.model == model)
        query = query.order_by(place, versions.c.model, versions.c.name)
        with self._database.reading() as connection:
            if after is not None:
                seen = connection.scalar(select(place).where(places.c.id == after))
                if seen is None:
                    return None
                query = query.where(place > seen)
            size = limit + 1
            while True:
                found = [rows.info_of(row) for row in connection.execute(query.limit(size)).mappings()]
                # `after` is an id, so a page ends with all names of its last content.
                end = next((i for i in range(limit, len(found)) if found[i].id != found[limit - 1].id), None)
                if end is not None or len(found) < size:
                    return Page(found[:end], has_more=end is not None)
                size *= 2

    def versions(self, space: Space, name: str) -> Sequence[ContextInfo]:
        query = select(versions).where(rows.in_space(space), versions.c.name == name)
        with self._database.reading() as connection:
            found = connection.execute(query.order_by(versions.c.version.desc())).mappings()
            return [rows.info_of(row) for row in found]

    def move(self, space: Space, name: str, version: int) -> ContextInfo | None:
        query = rows.matching(ContextRef("", name=name, version=version)).where(
            rows.in_space(space), versions.c.status == ContextStatus.COMPLETED.value
        )

        def work(connection: Connection) -> ContextInfo | None:
            lock_name(connection, space, name)  # so that nobody deletes the version meanwhile
            row = connection.execute(query).mappings().first()
            if row is None:
                return None
            point(connection, space, name, version)
            return rows.info_of(row)

        return self._database.write(work)

    def delete_name(self, space: Space, name: str) -> bool:
        def work(connection: Connection) -> bool:
            gone = update(names).where(rows.named(space, name), names.c.version > 0).values(version=0)
            found = connection.execute(gone).rowcount > 0
            remove(connection, and_(rows.in_space(space), versions.c.name == name))
            return found

        return self._database.write(work)

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

        return self._database.write(work)

    def close(self) -> None:
        self._database.close()
