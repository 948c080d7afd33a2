"""A store is opened beside whatever server runs on it, and looked through. Nothing is written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine, NullPool, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from app.stores import postgresql, sqlite
from app.stores.checks.contexts import check_contexts
from app.stores.checks.files import check_batches, check_files
from app.stores.checks.findings import BACKUP, Finding, Report
from app.stores.database import newest_migration, not_opened, parsed_url
from app.stores.errors import StoreAway, StoreDamaged
from app.stores.faults import words_of

SALVAGE = f"Stop the server and keep a copy of the file. {BACKUP} Or salvage what can be read: sqlite3 FILE .recover"
POSTGRESQL_TOOLS = f"{BACKUP} pg_amcheck and the server's log say more."

Part = Callable[[Connection, dict[str, int]], Iterator[Finding]]


def check_store(url: str) -> Report:
    """Raises StoreError where the store cannot be opened."""
    parsed = parsed_url(url)
    engine = _opened(parsed)
    is_sqlite = engine.dialect.name == "sqlite"
    checked = dict.fromkeys(("versions", "names", "arrays", "files", "batches"), 0)
    try:
        findings = _guarded(engine, _sqlite if is_sqlite else _postgresql, checked)
        unfit = _guarded(engine, _tables, checked)
        findings += unfit
        if not unfit:  # else the columns are not those the other parts read
            for part in (check_contexts, check_files, check_batches):
                findings += _guarded(engine, part, checked)
    finally:
        engine.dispose()
    return Report(checked, list(dict.fromkeys(findings)))


def _opened(url: URL) -> Engine:
    """Raises StoreError."""
    file = sqlite.file_of(url)
    if file is not None and not file.is_file():
        raise StoreAway(f"There is no context store at {file}")
    if file is not None:
        engine = sqlite.opened(file, mode="ro", poolclass=NullPool)
    else:
        engine = create_engine(url, poolclass=NullPool, hide_parameters=True, connect_args=postgresql.options(url))
    try:
        with engine.connect():
            return engine
    except SQLAlchemyError as error:
        fault = not_opened(url, error)
        if isinstance(fault, StoreDamaged):  # which is what is looked for
            return engine
        raise fault from error


@contextmanager
def _snapshot(engine: Engine) -> Iterator[Connection]:
    """What a running server changes meanwhile is not seen."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        else:
            connection.execution_options(immediate=False)
        with connection.begin():
            yield connection


def _guarded(engine: Engine, part: Part, checked: dict[str, int]) -> list[Finding]:
    """What cannot be read at all is a finding too."""
    found: list[Finding] = []
    try:
        with _snapshot(engine) as connection:
            found.extend(part(connection, checked))
    except SQLAlchemyError as error:
        remedy = SALVAGE if engine.dialect.name == "sqlite" else POSTGRESQL_TOOLS
        found.append(Finding("the database", f"It cannot be read: {words_of(error)}.", remedy))
    return found


def _sqlite(connection: Connection, _checked: dict[str, int]) -> Iterator[Finding]:
    for line in connection.scalars(text("PRAGMA integrity_check")):
        if line != "ok":
            yield Finding("the database", " ".join(str(line).split()), SALVAGE)
    for table, row, parent, _ in connection.execute(text("PRAGMA foreign_key_check")):
        yield Finding(f"row {row} of {table}", f"What it refers to in {parent} is not there.", BACKUP)


def _postgresql(connection: Connection, _checked: dict[str, int]) -> Iterator[Finding]:
    failures = text("SELECT checksum_failures FROM pg_stat_database WHERE datname = current_database()")
    if count := connection.scalar(failures):
        yield Finding("the database", f"The server counts {count} pages that failed their checksum.", POSTGRESQL_TOOLS)
    invalid = text(
        "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
        "WHERE NOT i.indisvalid AND c.relnamespace = current_schema()::regnamespace"
    )
    for index in connection.scalars(invalid):
        yield Finding(f"index {index}", "It is not valid.", f"REINDEX INDEX {index}.")


def _tables(connection: Connection, _checked: dict[str, int]) -> Iterator[Finding]:
    found, wanted = MigrationContext.configure(connection).get_current_revision(), newest_migration()
    if found != wanted:
        problem = f"Its tables are of version {found}; this cde-server works with {wanted}."
        remedy = "Start a server of this version once, which brings older tables up to date; for newer ones use theirs."
        yield Finding("the database", problem, remedy)
