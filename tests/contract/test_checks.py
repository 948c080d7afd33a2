"""What `contexts check` finds: nothing in a sound store, and each kind of damage."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from app.errors import StoreError
from app.stores.batch_base import BatchInfo
from app.stores.batches import SqlBatchStore
from app.stores.checks.database import check_store
from app.stores.checks.findings import Finding
from app.stores.database import Database
from app.stores.files import CHUNK_BYTES, SqlFileStore
from app.stores.sql import SqlContextStore
from tests.contract.test_batches import lines
from tests.contract.test_faults import damage
from tests.contract.test_store import M, built, new_context, put

LEGAL, OTHER = f"ctx_{1:032x}", f"ctx_{2:032x}"


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """Names with versions in every state, files of both kinds, a batch that is done and one that waits."""
    made = Database(url)
    store = SqlContextStore(made)
    put(store, "legal", 1)
    put(store, "legal", 2)
    put(store, "second", 2)
    store.move(M, "legal", 1)
    store.begin(new_context("legal", 4))
    info, _ = store.begin(new_context("kept", 3))
    store.complete(info, built(3, ["a", "b"]))
    failed, _ = store.begin(new_context("failed", 5))
    store.fail(failed, "me", "for a reason")
    put(store, "gone", 6)
    store.delete_name(M, "gone")
    batches, files = SqlBatchStore(made), SqlFileStore(made)
    file = files.add("", "input", "batch", [b"x" * (CHUNK_BYTES + 1)])
    for name in ("done", "waits"):
        batches.add(BatchInfo(name, "", "/v1/embeddings", file.id, "24h", 7))
    batches.claim("me")
    batches.begin("done", "me", 2)
    batches.record("done", "me", [*lines(1), *lines(2, ok=False)])
    batches.finish("done", "me")
    yield made
    made.close()


def test_a_sound_store(url: str, database: Database) -> None:
    report = check_store(url)
    assert report.findings == []
    assert report.checked == {"versions": 6, "names": 4, "arrays": 5, "files": 3, "batches": 2}


DAMAGES = [
    (f"UPDATE payloads SET sha256 = 'x' WHERE id = '{LEGAL}'", f"context {LEGAL} (legal.1 of m)", "checksum", "again"),
    (f"UPDATE payloads SET data = NULL WHERE id = '{OTHER}'", f"context {OTHER} (legal.2 of m, second.1 of m)",
     "not there", "again"),
    (f"UPDATE version_texts SET data = (SELECT data FROM payloads WHERE id = 'ctx_{3:032x}')",
     "documents of version kept.1", "cannot be read", "again"),
    ("UPDATE versions SET dimensions = 4 WHERE name = 'second'", f"context {OTHER} (legal.2 of m, second.1 of m)",
     "[2, 3], not [2, 4]", "again"),
    ("UPDATE versions SET usage_bytes = 4 WHERE name = 'kept'", f"context ctx_{3:032x} (kept.1 of m)", "not the 4",
     "again"),
    ("UPDATE versions SET status = 'don' WHERE name = 'second'", "version second.1", "cannot be read", "name alone"),
    ("UPDATE versions SET documents = '[1]' WHERE name = 'second'", "version second.1", "cannot be read", "name alone"),
    ("UPDATE names SET version = 7 WHERE name = 'legal'", "name legal of m", "version 7, which is not there",
     "rollback to one of [1, 2]"),
    ("UPDATE names SET version = 3 WHERE name = 'legal'", "name legal of m", "which is in_progress", "rollback"),
    ("UPDATE names SET version = 2 WHERE name = 'second'", "name second of m", "not there", "rollback to one of [1]"),
    ("UPDATE names SET last_version = 1 WHERE name = 'legal'", "name legal of m", "version 3 is there", "Delete"),
    ("DELETE FROM names WHERE name = 'legal'", "name legal of m", "has versions: legal.1, legal.2", "Create"),
    ("DELETE FROM versions WHERE name = 'kept'", f"arrays ctx_{3:032x}", "No version", "DELETE FROM payloads"),
    ("DELETE FROM file_chunks WHERE number = 0", "file file-", "has 0 bytes", "upload"),
    ("UPDATE file_chunks SET crc32 = 1 WHERE number = 1", "file file-", "damaged", "upload"),
    ("UPDATE batch_lines SET data = bytes_of(batch_id)", "file file-", "damaged", "run again"),
    ("DELETE FROM batch_lines WHERE number = 2", "file file-", "has 0 bytes", "run again"),
    ("DELETE FROM files WHERE batch_id = 'done'", "batch done", "belong to no file", "DELETE FROM batch_lines"),
    ("UPDATE batches SET input_file_id = 'x' WHERE id = 'waits'", "batch waits", "not there", "cancel"),
    ("UPDATE batches SET completed = 3 WHERE id = 'waits'", "batch waits", "counts 3", "cancel"),
    ("UPDATE alembic_version SET version_num = '0001'", "the database", "version 0001", "Start"),
]  # fmt: skip


@pytest.mark.parametrize(("damaging", "what", "problem", "remedy"), DAMAGES)
def test_each_damage_is_found(  # noqa: PLR0917
    url: str, database: Database, damaging: str, what: str, problem: str, remedy: str
) -> None:
    cast = "CAST(batch_id AS BLOB)" if url.startswith("sqlite") else "convert_to(batch_id, 'UTF8')"
    damaging = damaging.replace("bytes_of(batch_id)", cast)
    with database.engine.begin() as connection:
        connection.execute(text(damaging))
    found = check_store(url).findings
    assert found, damaging
    assert any(f.what.startswith(what) and problem in f.problem and remedy in f.remedy for f in found), found
    if remedy == "name alone":
        assert not any("DELETE" in f.remedy for f in found), "of a version that cannot be read, the arrays are kept"


def findings_of(file: Path) -> list[Finding]:
    return list(check_store(f"sqlite:///{file}").findings)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "c.sqlite3"
    database = Database(f"sqlite:///{file}")
    put(SqlContextStore(database), "legal", 1)
    put(SqlContextStore(database), "other", 2)
    database.close()
    return file


@pytest.mark.parametrize("table", ["versions", "names", "files"])
def test_damaged_pages(file: Path, table: str) -> None:
    damage(file, table)
    found = findings_of(file)
    assert any(f.what == "the database" and "malformed" in f.problem for f in found)
    assert all(f.remedy for f in found)
    assert any(".recover" in f.remedy for f in found)


def test_a_reference_to_nothing(file: Path) -> None:
    with sqlite3.connect(file) as raw:
        raw.execute("DELETE FROM payloads WHERE id = ?", (LEGAL,))
    raw.close()
    found = {f.what: f.problem for f in findings_of(file)}
    assert "not there" in found[f"context {LEGAL} (legal.1 of m)"]
    assert "payloads" in found["row 1 of versions"]


def test_nothing_is_written_and_nothing_is_made(file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    assert findings_of(file) == []
    assert file.read_bytes() == before
    with pytest.raises(StoreError, match="no context store"):
        check_store(f"sqlite:///{tmp_path / 'none.sqlite3'}")
    assert not (tmp_path / "none.sqlite3").exists()
    (tmp_path / "junk.sqlite3").write_bytes(b"this is no database " * 1000)
    assert "not a database" in findings_of(tmp_path / "junk.sqlite3")[0].problem
