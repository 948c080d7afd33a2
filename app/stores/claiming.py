"""Whose batch is run next. Each question is one pass over the unfinished ones, however many wait."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, func, or_, select, update

from app.stores.batch_base import LEASE_SECONDS, UNFINISHED
from app.stores.batch_tables import batches


@dataclass(frozen=True, slots=True)
class Waiting:
    """Batches of a namespace that nobody runs: how many others of it are run, when one of these was last, and the
    `seq` of the first."""

    namespace: str
    running: int
    last: float
    oldest: int


def order(connection: Connection, owner: str) -> Sequence[Waiting]:
    """Namespaces that wait, in their order: those of which fewest batches run, then the one that ran longest ago."""
    found = _waiting(connection, owner, _running(connection, owner))
    return sorted(found, key=lambda waiting: (waiting.running, waiting.last, waiting.oldest))


def take(connection: Connection, wanted: Sequence[Waiting], owner: str) -> RowMapping | None:
    """The oldest of the first namespace that still has one; the row is as it was before."""
    for waiting in wanted:
        query = select(batches).where(batches.c.namespace == waiting.namespace, _free(owner))
        query = query.order_by(batches.c.seq).limit(1).with_for_update(skip_locked=True)
        row = connection.execute(query).mappings().first()
        if row is not None:
            connection.execute(
                update(batches).where(batches.c.id == row["id"]).values(owner=owner, beat_at=time.time())
            )
            return row
    return None


def is_crowded(connection: Connection, owner: str, namespace: str, by: int) -> bool:
    """See SqlBatchStore.is_crowded."""
    running = _running(connection, owner)
    own = 1 + running.get(namespace, 0)
    waiting = _waiting(connection, owner, running)
    return any(own - found.running >= by for found in waiting if found.namespace != namespace)


def _waiting(connection: Connection, owner: str, running: Mapping[str, int]) -> list[Waiting]:
    query = select(batches.c.namespace, func.max(batches.c.beat_at), func.min(batches.c.seq))
    rows = connection.execute(query.where(_free(owner)).group_by(batches.c.namespace))
    return [Waiting(namespace, running.get(namespace, 0), last, oldest) for namespace, last, oldest in rows]


def _running(connection: Connection, owner: str) -> Mapping[str, int]:
    """How many batches of each namespace others run."""
    silent = time.time() - LEASE_SECONDS
    alive = and_(batches.c.owner.is_not(None), batches.c.owner != owner, batches.c.beat_at >= silent)
    query = select(batches.c.namespace, func.count()).where(batches.c.status.in_(UNFINISHED), alive)
    return {row[0]: row[1] for row in connection.execute(query.group_by(batches.c.namespace))}


def _free(owner: str) -> ColumnElement[bool]:
    dead = batches.c.beat_at < time.time() - LEASE_SECONDS
    return and_(batches.c.status.in_(UNFINISHED), or_(batches.c.owner.is_(None), batches.c.owner == owner, dead))
