"""Whose batch is run next. Each question is one pass over the unfinished ones, however many wait."""

import time
from collections.abc import Sequence
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
    """Of the namespaces of which fewest are run first the one that has not been run for longest."""
    now = time.time()
    running = _running(connection, owner, now)
    query = select(batches.c.namespace, func.max(batches.c.beat_at), func.min(batches.c.seq))
    rows = connection.execute(query.where(_free(owner, now)).group_by(batches.c.namespace))
    found = [Waiting(namespace, running.get(namespace, 0), last, oldest) for namespace, last, oldest in rows]
    return sorted(found, key=lambda waiting: (waiting.running, waiting.last, waiting.oldest))


def take(connection: Connection, wanted: Sequence[Waiting], owner: str) -> RowMapping | None:
    """The oldest of the first namespace that still has one; the row is as it was before."""
    now = time.time()
    for waiting in wanted:
        query = select(batches).where(batches.c.namespace == waiting.namespace, _free(owner, now))
        query = query.order_by(batches.c.seq).limit(1).with_for_update(skip_locked=True)
        row = connection.execute(query).mappings().first()
        if row is not None:
            connection.execute(update(batches).where(batches.c.id == row["id"]).values(owner=owner, beat_at=now))
            return row
    return None


def is_crowded(connection: Connection, owner: str, namespace: str, by: int) -> bool:
    """See SqlBatchStore.is_crowded."""
    own = 1 + _running(connection, owner, time.time()).get(namespace, 0)
    return any(own - found.running >= by for found in order(connection, owner) if found.namespace != namespace)


def _running(connection: Connection, owner: str, now: float) -> dict[str, int]:
    """How many batches of each namespace others run."""
    alive = and_(batches.c.owner.is_not(None), batches.c.owner != owner, batches.c.beat_at >= now - LEASE_SECONDS)
    query = select(batches.c.namespace, func.count()).where(batches.c.status.in_(UNFINISHED), alive)
    return {row[0]: row[1] for row in connection.execute(query.group_by(batches.c.namespace))}


def _free(owner: str, now: float) -> ColumnElement[bool]:
    dead = batches.c.beat_at < now - LEASE_SECONDS
    return and_(batches.c.status.in_(UNFINISHED), or_(batches.c.owner.is_(None), batches.c.owner == owner, dead))
