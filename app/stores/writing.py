"""What happens inside the transactions that begin and complete a version."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, delete, exists, func, insert, or_, select, update

from app.domain import ContextInfo, ContextStatus, Space
from app.stores import rows
from app.stores.base import Begun, Built, NewContext
from app.stores.tables import names, payloads, texts, versions

DONE = ContextStatus.COMPLETED.value


def begin_version(connection: Connection, new: NewContext) -> tuple[RowMapping | dict[str, Any], Begun]:
    """See ContextStore.begin. The name's row is locked first: two that begin the same see each other."""
    space, name = new.space, new.name
    last = lock_name(connection, space, name)
    same = select(versions).where(
        rows.in_space(space), versions.c.name == name, or_(versions.c.id == new.id, versions.c.begun_id == new.id)
    )
    row = connection.execute(same.order_by(rows.unfinished(), versions.c.version.desc())).mappings().first()
    if row is not None and row["status"] == DONE:
        point(connection, space, name, row["version"])
        return row, Begun.THERE
    if row is not None and row["status"] == ContextStatus.IN_PROGRESS.value and not rows.abandoned(row):
        return row, Begun.THEIRS
    fields = rows.version_fields(new, row["version"] if row is not None else (last or 0) + 1)
    if row is not None:
        connection.execute(update(versions).where(versions.c.seq == row["seq"]).values(fields))
        return fields, Begun.OURS
    # Locked before a version refers to it: two that share a lock and then both want it alone would wait for ever.
    if connection.scalar(select(payloads.c.seq).where(payloads.c.id == new.id).with_for_update()) is None:
        connection.execute(insert(payloads).values(id=new.id))
    connection.execute(insert(versions).values(fields))
    if last is None:
        key = {"namespace": space.namespace, "model": space.model, "name": name}
        connection.execute(insert(names).values(**key, version=1, last_version=1))
    else:
        connection.execute(update(names).where(rows.named(space, name)).values(last_version=last + 1))
        if _pointed_status(connection, space, name) != DONE:
            point(connection, space, name, last + 1)
    return fields, Begun.OURS


def complete_version(
    connection: Connection, info: ContextInfo, built: Built, data: bytes, documents: bytes | None
) -> RowMapping | None:
    """See ContextStore.complete."""
    space, name = info.space, info.name
    lock_name(connection, space, name)
    seq = connection.scalar(select(versions.c.seq).where(one(info)))
    if seq is None:
        return None
    _keep(connection, built.id, data)
    siblings = select(versions).where(rows.in_space(space), versions.c.name == name, versions.c.status == DONE)
    there = connection.execute(siblings.where(versions.c.id == built.id)).mappings().first()
    if there is not None:
        if there["version"] != info.version:  # else it was completed before: by another builder, or by this one
            remove(connection, one(info))
        point(connection, space, name, there["version"])
        return there
    fields = {
        "id": built.id,
        "status": DONE,
        "error": None,
        "done": info.progress[1],
        "selection": asdict(built.selection),
        "documents": asdict(built.documents),
        "usage_bytes": len(data),
    }
    connection.execute(update(versions).where(one(info)).values(fields))
    if documents is not None:
        connection.execute(insert(texts).values(version_seq=seq, data=documents))
    if built.id != info.id:
        sweep(connection, [info.id])
    newest = connection.scalar(siblings.with_only_columns(func.max(versions.c.version)))
    if newest == info.version:
        point(connection, space, name, info.version)
    return connection.execute(select(versions).where(one(info))).mappings().one()


def lock_name(connection: Connection, space: Space, name: str) -> int | None:
    """Locks a name until the transaction ends. Its last version; None: it was never used."""
    return connection.scalar(select(names.c.last_version).where(rows.named(space, name)).with_for_update())


def one(info: ContextInfo) -> ColumnElement[bool]:
    """The row of this version, however its state has changed."""
    return and_(rows.in_space(info.space), versions.c.name == info.name, versions.c.version == info.version)


def being_built(info: ContextInfo, builder: str) -> ColumnElement[bool]:
    """The row of this version while this builder is at it."""
    return and_(one(info), versions.c.status == ContextStatus.IN_PROGRESS.value, versions.c.builder == builder)


def point(connection: Connection, space: Space, name: str, version: int) -> None:
    """The name means this version from now on."""
    connection.execute(update(names).where(rows.named(space, name)).values(version=version))


def remove(connection: Connection, gone: ColumnElement[bool]) -> None:
    """Deletes these versions, and the payloads that none holds any more."""
    ids = sorted(set(connection.scalars(select(versions.c.id).where(gone))))
    connection.execute(delete(versions).where(gone))
    sweep(connection, ids)


def sweep(connection: Connection, ids: Sequence[str]) -> None:
    """Deletes the payloads that no version holds any more; one by one in order, so that two sweeps cannot deadlock."""
    for context_id in ids:
        held = exists().where(versions.c.id == context_id)
        # Locked by a statement of its own: the next one sees what another holder has deleted meanwhile.
        connection.execute(select(payloads.c.seq).where(payloads.c.id == context_id).with_for_update())
        connection.execute(delete(payloads).where(payloads.c.id == context_id, ~held))


def _pointed_status(connection: Connection, space: Space, name: str) -> str | None:
    query = rows.current().where(rows.in_space(space), versions.c.name == name).with_only_columns(versions.c.status)
    return connection.scalar(query)


def _keep(connection: Connection, context_id: str, data: bytes) -> None:
    """Stores the payload, unless it is there and whole."""
    row = connection.execute(select(payloads).where(payloads.c.id == context_id).with_for_update()).mappings().first()
    if row is None:
        connection.execute(insert(payloads).values(id=context_id))
    if row is None or row["data"] is None or hashlib.sha256(row["data"]).hexdigest() != row["sha256"]:
        content = {"data": data, "sha256": hashlib.sha256(data).hexdigest()}
        connection.execute(update(payloads).where(payloads.c.id == context_id).values(content))
