"""What a check finds, and reading rows of which some may be damaged."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Connection, RowMapping, Select, Table, select
from sqlalchemy.exc import SQLAlchemyError

BACKUP = "Restore the database from a backup."


@dataclass(frozen=True, slots=True)
class Finding:
    """`what` is wrong in which way, and what to do about it."""

    what: str
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Report:
    """`checked`: how many of what were looked at."""

    checked: Mapping[str, int]
    findings: Sequence[Finding]


def only_room(table: Table, column: str, value: str) -> str:
    """The remedy for what belongs to nothing."""
    statement = f"DELETE FROM {table.name} WHERE {column} = '{value}'"  # noqa: S608 - to be read
    return f"Where nothing else is wrong, it only takes up room: {statement}."


def one(connection: Connection, query: Select[Any]) -> RowMapping | Exception | None:
    """A row; what kept it from being read; None where it is gone."""
    try:
        with connection.begin_nested():  # PostgreSQL reads on behind an error only outside of it
            return connection.execute(query).mappings().first()
    except (SQLAlchemyError, ValueError, TypeError) as error:
        return error


def one_by_one(
    connection: Connection, table: Table, key: Column[Any]
) -> Iterator[tuple[Any, RowMapping | Exception | None]]:
    """Each row by its key, so that one that cannot be read hides no other. Raises SQLAlchemyError where the keys
    cannot be read."""
    for value in connection.scalars(select(key).order_by(key)).all():
        yield value, one(connection, select(table).where(key == value))
