"""Rows of the context tables <-> the domain, and the queries that several operations share."""

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, RowMapping, Select, and_, case, or_, select

from app.domain import ContextInfo, ContextRef, ContextStatus, DocumentCounts, Selection, Space
from app.stores.base import LEASE_SECONDS, NewContext
from app.stores.errors import StoreDamaged
from app.stores.tables import names, versions

ABANDONED = "The server that was building it has stopped. Create it again."


def now() -> datetime:
    return datetime.now(UTC)


def version_fields(new: NewContext, version: int) -> dict[str, Any]:
    """The columns of a version that is begun."""
    moment = now()
    return {
        "namespace": new.space.namespace,
        "model": new.space.model,
        "name": new.name,
        "version": version,
        "id": new.id,
        "begun_id": new.id,
        "model_revision": new.model_revision,
        "created_at": moment.replace(microsecond=0),
        "status": ContextStatus.IN_PROGRESS.value,
        "error": None,
        "done": 0,
        "total": new.total,
        "builder": new.builder,
        "beat_at": moment,
        "selection": asdict(new.selection),
        "documents": asdict(new.documents),
        "corpus_size": new.corpus_size,
        "dimensions": new.dimensions,
        "usage_bytes": 0,
        "metadata": dict(new.metadata),
    }


def info_of(row: RowMapping | dict[str, Any]) -> ContextInfo:
    """One whose builder is gone has failed, whatever the row still says. Raises StoreDamaged."""
    try:
        return _info(row)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreDamaged(f"A context's row cannot be read: {error}") from error


def _info(row: RowMapping | dict[str, Any]) -> ContextInfo:
    status, error = ContextStatus(row["status"]), row["error"]
    if abandoned(row):
        status, error = ContextStatus.FAILED, ABANDONED
    return ContextInfo(
        id=row["id"],
        space=Space(row["model"], row["namespace"]),
        model_revision=row["model_revision"],
        name=row["name"],
        version=row["version"],
        status=status,
        progress=(row["done"], row["total"]),
        created_at=_aware(row["created_at"]),
        selection=Selection(**row["selection"]),
        documents=DocumentCounts(**row["documents"]),
        corpus_size=row["corpus_size"],
        dimensions=row["dimensions"],
        usage_bytes=row["usage_bytes"],
        error=error,
        metadata=row["metadata"],
    )


def abandoned(row: RowMapping | dict[str, Any]) -> bool:
    silent = now() - _aware(row["beat_at"])
    return row["status"] == ContextStatus.IN_PROGRESS.value and silent > timedelta(seconds=LEASE_SECONDS)


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)  # SQLite keeps no zone


def in_space(space: Space) -> ColumnElement[bool]:
    return and_(versions.c.namespace == space.namespace, versions.c.model == space.model)


def named(space: Space, name: str) -> ColumnElement[bool]:
    """The row of `names`."""
    return and_(names.c.namespace == space.namespace, names.c.model == space.model, names.c.name == name)


def current() -> Select[Any]:
    """The version each name points at."""
    same = and_(
        names.c.namespace == versions.c.namespace, names.c.model == versions.c.model, names.c.name == versions.c.name
    )
    return select(versions).join(names, same).where(names.c.version == versions.c.version)


def matching(ref: ContextRef) -> Select[Any]:
    """Versions `ref` means: completed ones first, then the newest."""
    if ref.id is not None:
        query = select(versions).where(or_(versions.c.id == ref.id, versions.c.begun_id == ref.id))
    elif ref.version is not None:
        query = select(versions).where(versions.c.name == ref.name, versions.c.version == ref.version)
    else:
        query = current().where(versions.c.name == ref.name)
    return query.order_by(unfinished(), versions.c.seq.desc())


def unfinished() -> ColumnElement[int]:
    """To sort by: completed versions first."""
    return case((versions.c.status == ContextStatus.COMPLETED.value, 0), else_=1)
