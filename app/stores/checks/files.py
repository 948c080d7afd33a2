"""Files and batches: content of the size and checksum that was put in, and nothing that belongs to nothing."""

from collections.abc import Iterator

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, exists, func, select
from sqlalchemy.exc import SQLAlchemyError

from app.stores.batch_base import UNFINISHED
from app.stores.batch_tables import batch_lines, batches, files
from app.stores.checks.findings import Finding, one_by_one, only_room
from app.stores.errors import PayloadDamaged
from app.stores.faults import words_of
from app.stores.files import content_of

UPLOAD = "Delete it and upload it again."
RERUN = "Delete it; its batch has to be run again."


def check_files(connection: Connection, checked: dict[str, int]) -> Iterator[Finding]:
    """Raises SQLAlchemyError where a table cannot be read at all."""
    for seq, row in one_by_one(connection, files, files.c.seq):
        checked["files"] += 1
        if not isinstance(row, RowMapping):
            yield Finding(f"file {seq}", f"Its row cannot be read: {words_of(row) if row else 'it is gone'}.", UPLOAD)
            continue
        problem = None if row["is_partial"] else _content_problem(connection, row)
        if problem is not None:
            yield Finding(f"file {row['id']}", problem, UPLOAD if row["batch_id"] is None else RERUN)


def _content_problem(connection: Connection, file: RowMapping) -> str | None:
    try:
        with connection.begin_nested():
            size = sum(map(len, content_of(connection, file)))
    except (SQLAlchemyError, PayloadDamaged) as error:
        return f"Its content is damaged: {words_of(error)}"
    return None if size == file["bytes"] else f"Its content has {size} bytes, not the {file['bytes']} it had."


def check_batches(connection: Connection, checked: dict[str, int]) -> Iterator[Finding]:
    """Raises SQLAlchemyError where a table cannot be read at all."""
    for seq, row in one_by_one(connection, batches, batches.c.seq):
        checked["batches"] += 1
        if not isinstance(row, RowMapping):
            problem = f"Its row cannot be read: {words_of(row) if row else 'it is gone'}."
            yield Finding(f"batch {seq}", problem, "Create the batch again from its input file.")
        elif row["status"] in UNFINISHED:
            yield from _unfinished(connection, row)
        elif _belong_to_nothing(connection, row["id"]):
            remedy = only_room(batch_lines, "batch_id", row["id"])
            yield Finding(f"batch {row['id']}", "Its answers belong to no file.", remedy)


def _unfinished(connection: Connection, batch: RowMapping) -> Iterator[Finding]:
    cancel = f"POST /v1/batches/{batch['id']}/cancel, and create it again."
    if not _has(connection, files.c.id == batch["input_file_id"]):
        yield Finding(f"batch {batch['id']}", "Its input file is not there.", cancel)
    of_it = batch_lines.c.batch_id == batch["id"]
    for state, ok in (("completed", True), ("failed", False)):
        there = connection.scalar(select(func.count()).where(and_(of_it, batch_lines.c.ok == ok)))
        if there != batch[state]:
            problem = f"It counts {batch[state]} lines as {state}, and {there} are there."
            yield Finding(f"batch {batch['id']}", problem, cancel)


def _belong_to_nothing(connection: Connection, batch_id: str) -> bool:
    answered = _has(connection, batch_lines.c.batch_id == batch_id)
    return answered and not _has(connection, files.c.batch_id == batch_id)


def _has(connection: Connection, what: ColumnElement[bool]) -> bool:
    return bool(connection.scalar(select(exists().where(what))))
