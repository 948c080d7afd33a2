"""Batches in the database: their states, who runs them, and the answer to each line, once."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from zlib import crc32

from sqlalchemy import Connection, RowMapping, and_, func, insert, select, update

from app.domain import Page
from app.stores import claiming
from app.stores.batch_base import UNFINISHED, BatchInfo, BatchStatus, Claim, LeaseLost, LineResult, Problem
from app.stores.batch_tables import batch_lines, batches, files
from app.stores.database import Database
from app.stores.files import add_file, is_there, page


class SqlBatchStore:
    """Thread-safe and synchronous; every method raises StoreError when the store cannot answer.

    What takes an `owner` raises LeaseLost where the batch has another one by now.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, batch: BatchInfo) -> bool:
        """False where its input file is gone; from then on that is not deleted."""
        values = asdict(batch) | {"status": batch.status.value, "owner": None, "beat_at": 0.0}
        values["problems"] = [asdict(problem) for problem in batch.problems]
        file = select(files.c.seq).where(files.c.id == batch.input_file_id, is_there()).with_for_update(read=True)

        def work(connection: Connection) -> bool:
            if connection.scalar(file) is None:
                return False
            connection.execute(insert(batches).values(values))
            return True

        return self._database.write(work)

    def get(self, namespace: str, batch_id: str) -> BatchInfo | None:
        query = select(batches).where(batches.c.namespace == namespace, batches.c.id == batch_id)
        with self._database.reading() as connection:
            row = connection.execute(query).mappings().first()
        return _info(row) if row else None

    def unfinished(self, namespace: str) -> int:
        """How many there are."""
        query = select(func.count()).where(batches.c.status.in_(UNFINISHED), batches.c.namespace == namespace)
        with self._database.reading() as connection:
            return connection.scalar(query) or 0

    def list(self, namespace: str, *, after: str | None, limit: int) -> Page[BatchInfo] | None:
        """Newest first; None where there is no batch `after`."""
        with self._database.reading() as connection:
            query = select(batches).where(batches.c.namespace == namespace)
            return page(connection, batches, query, _info, after=after, limit=limit, newest_first=True)

    def cancel(self, namespace: str, batch_id: str) -> BatchInfo | None:
        """`cancelling`, or `cancelled` where it was not begun, unless it is finished; None where there is none."""

        def work(connection: Connection) -> BatchInfo | None:
            query = select(batches).where(batches.c.namespace == namespace, batches.c.id == batch_id)
            row = connection.execute(query.with_for_update()).mappings().first()
            if row is None:
                return None
            if row["status"] in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS):
                row = _moved(connection, row, BatchStatus.CANCELLING)
                if row["owner"] is None and not row["completed"] + row["failed"]:  # nobody to wait for, nothing to keep
                    row = _moved(connection, row, BatchStatus.CANCELLED)
            return _info(row)

        return self._database.write(work)

    def claim(self, owner: str) -> Claim | None:
        """An unfinished batch that no living process runs: the oldest of the first namespace in claiming.order. None:
        there is none."""
        with self._database.reading() as connection:
            order = claiming.order(connection, owner)
        row = self._database.write(lambda connection: claiming.take(connection, order, owner)) if order else None
        return None if row is None else Claim(_info(row), orphaned=row["owner"] not in (None, owner))

    def is_crowded(self, owner: str, namespace: str, *, by: int) -> bool:
        """Whether another namespace has a batch that waits, and at least `by` fewer that run than this one, whose batch
        `owner` runs."""
        with self._database.reading() as connection:
            return claiming.is_crowded(connection, owner, namespace, by)

    def beat(self, batch_id: str, owner: str) -> BatchStatus:
        """The owner lives; gives the state, which others may have changed."""

        def work(connection: Connection) -> BatchStatus:
            row = _owned(connection, batch_id, owner)
            connection.execute(update(batches).where(batches.c.id == batch_id).values(beat_at=time.time()))
            return BatchStatus(row["status"])

        return self._database.write(work)

    def release(self, owners: Sequence[str]) -> None:
        """Whatever the owners run may be taken over at once."""
        query = update(batches).where(batches.c.owner.in_(owners)).values(owner=None)
        self._database.write(lambda connection: connection.execute(query))

    def try_alone(self, batch_id: str, owner: str, number: int) -> int:
        """The owner is about to run this line and no other; how often that was so in a row, this time counted."""

        def work(connection: Connection) -> int:
            row = _owned(connection, batch_id, owner)
            tries: int = 1 + (row["alone_tries"] if row["alone_line"] == number else 0)
            values = {"alone_line": number, "alone_tries": tries}
            connection.execute(update(batches).where(batches.c.id == batch_id).values(values))
            return tries

        return self._database.write(work)

    def begin(self, batch_id: str, owner: str, total: int) -> BatchStatus:
        """The input is right and has `total` lines. A batch that is being cancelled stays so."""

        def work(connection: Connection) -> BatchStatus:
            row = _owned(connection, batch_id, owner)
            connection.execute(update(batches).where(batches.c.id == batch_id).values(total=total))
            if row["status"] == BatchStatus.VALIDATING:
                row = _moved(connection, row, BatchStatus.IN_PROGRESS)
            return BatchStatus(row["status"])

        return self._database.write(work)

    def refuse(self, batch_id: str, owner: str, problems: Sequence[Problem]) -> None:
        """The input cannot be run, or not to its end; the answers there are become files."""

        def work(connection: Connection) -> None:
            row = _owned(connection, batch_id, owner)
            told, made = [asdict(problem) for problem in problems], _outputs(connection, row)
            _moved(connection, row, BatchStatus.FAILED, problems=told, **made, owner=None)

        self._database.write(work)

    def answered(self, batch_id: str) -> set[int]:
        """The numbers of the lines that need no other answer."""
        with self._database.reading() as connection:
            return set(connection.scalars(select(batch_lines.c.number).where(batch_lines.c.batch_id == batch_id)))

    def record(self, batch_id: str, owner: str, results: Sequence[LineResult]) -> BatchStatus:
        """The answers to some lines, all or none; a line has one answer for ever."""

        def work(connection: Connection) -> BatchStatus:
            row = _owned(connection, batch_id, owner)
            values = [
                {"batch_id": batch_id, **asdict(r), "bytes": len(r.data), "crc32": crc32(r.data)} for r in results
            ]
            connection.execute(insert(batch_lines), values)
            good = sum(r.ok for r in results)
            counts = {"completed": row["completed"] + good, "failed": row["failed"] + len(results) - good}
            connection.execute(update(batches).where(batches.c.id == batch_id).values(**counts, beat_at=time.time()))
            return BatchStatus(row["status"])

        return self._database.write(work)

    def finish(self, batch_id: str, owner: str) -> BatchInfo:
        """The answers become files, which copies nothing, and the batch ends; it has failed where lines are missing."""

        def work(connection: Connection) -> BatchInfo:
            row = _owned(connection, batch_id, owner)
            cancelled = row["status"] == BatchStatus.CANCELLING
            made: dict[str, Any] = {**_outputs(connection, row)}
            if not cancelled:
                row = _moved(connection, row, BatchStatus.FINALIZING)
            last = BatchStatus.CANCELLED if cancelled else BatchStatus.COMPLETED
            missing = row["total"] - row["completed"] - row["failed"]
            if missing and not cancelled:
                told = f"{missing} of its {row['total']} lines are not in the input file any more."
                made["problems"] = [asdict(Problem("damaged_input_file", told, param="input_file_id"))]
                last = BatchStatus.FAILED
            return _info(_moved(connection, row, last, **made, owner=None))

        return self._database.write(work)


def _owned(connection: Connection, batch_id: str, owner: str) -> RowMapping:
    query = select(batches).where(batches.c.id == batch_id, batches.c.owner == owner).with_for_update()
    row = connection.execute(query).mappings().first()
    if row is None:
        raise LeaseLost
    return row


def _moved(connection: Connection, row: RowMapping, status: BatchStatus, **more: Any) -> RowMapping:
    times = dict(row["times"]) | {f"{status.value}_at": int(time.time())}
    same = batches.c.id == row["id"]
    connection.execute(update(batches).where(same).values(status=status.value, times=times, **more))
    return connection.execute(select(batches).where(same)).mappings().one()


def _outputs(connection: Connection, row: RowMapping) -> dict[str, str | None]:
    return {
        "output_file_id": _output(connection, row, ok=True) if row["completed"] else None,
        "error_file_id": _output(connection, row, ok=False) if row["failed"] else None,
    }


def _output(connection: Connection, row: RowMapping, *, ok: bool) -> str:
    """A file of the lines' answers, in the order of the input."""
    mine = and_(batch_lines.c.batch_id == row["id"], batch_lines.c.ok == ok)
    size = connection.scalar(select(func.sum(batch_lines.c.bytes)).where(mine)) or 0
    name = f"{row['id']}_{'output' if ok else 'error'}.jsonl"
    of = {"batch_id": row["id"], "ok": ok}
    kept = {"size": int(size), "seconds": row["output_seconds"]}
    return add_file(connection, row["namespace"], name, "batch_output", **kept, **of).id


def _info(row: RowMapping) -> BatchInfo:
    fields = {name: row[name] for name in BatchInfo.__dataclass_fields__}
    fields |= {"status": BatchStatus(row["status"]), "problems": tuple(Problem(**p) for p in row["problems"])}
    return BatchInfo(**fields)
