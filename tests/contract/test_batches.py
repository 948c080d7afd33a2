"""What the store of batches promises: one owner, one answer a line, files whole or not at all."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import insert, select, update

from app.batches.lines import LineTooLong, checked, numbered
from app.errors import StoreError
from app.stores.batch_base import LEASE_SECONDS, BatchInfo, BatchStatus, Claim, LeaseLost, LineResult, Problem
from app.stores.batch_tables import batch_lines, file_chunks
from app.stores.batch_tables import files as file_table
from app.stores.batches import SqlBatchStore
from app.stores.database import Database
from app.stores.errors import PayloadDamaged
from app.stores.files import CHUNK_BYTES, PARTIAL_SECONDS, SqlFileStore


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    made = Database(url)
    yield made
    made.close()


@pytest.fixture
def store(database: Database) -> SqlBatchStore:
    """With one file, `file-1`."""
    row = {"id": "file-1", "namespace": "", "filename": "f", "purpose": "batch", "bytes": 0, "created_at": 0}
    database.write(lambda connection: connection.execute(insert(file_table).values(row)))
    return SqlBatchStore(database)


@pytest.fixture
def files(database: Database) -> SqlFileStore:
    return SqlFileStore(database)


def add(store: SqlBatchStore, name: str = "batch_1", namespace: str = "") -> BatchInfo:
    batch = BatchInfo(name, namespace, "/v1/embeddings", "file-1", "24h", 7, metadata={"a": "b"})
    assert store.add(batch)
    return batch


def lines(*numbers: int, ok: bool = True) -> list[LineResult]:
    return [LineResult(n, ok, f"answer {n}\n".encode()) for n in numbers]


def test_a_batch_goes_its_way(store: SqlBatchStore, files: SqlFileStore) -> None:
    batch = add(store)
    assert store.get("", batch.id) == batch
    assert store.get("other", batch.id) is None
    assert store.claim("me") == Claim(batch, orphaned=False)
    assert store.claim("you") is None
    assert store.begin(batch.id, "me", 3) is BatchStatus.IN_PROGRESS
    assert store.record(batch.id, "me", lines(3, 1)) is BatchStatus.IN_PROGRESS
    store.record(batch.id, "me", lines(2, ok=False))
    assert store.answered(batch.id) == {1, 2, 3}
    done = store.finish(batch.id, "me")
    assert (done.status, done.total, done.completed, done.failed) == (BatchStatus.COMPLETED, 3, 2, 1)
    assert done.output_file_id is not None
    assert done.error_file_id is not None
    assert b"".join(files.chunks(done.output_file_id)) == b"answer 1\nanswer 3\n"
    assert b"".join(files.chunks(done.error_file_id)) == b"answer 2\n"
    assert set(done.times) == {"in_progress_at", "finalizing_at", "completed_at"}
    assert store.claim("me") is None
    output = files.get("", done.output_file_id)
    assert output is not None
    assert output.bytes == 18
    assert files.delete("", done.output_file_id) is True
    assert list(files.chunks(done.output_file_id)) == []
    assert b"".join(files.chunks(done.error_file_id)) == b"answer 2\n"
    assert store.get("", batch.id) == done


def test_a_line_is_answered_once(store: SqlBatchStore) -> None:
    add(store)
    store.claim("me")
    store.begin("batch_1", "me", 2)
    store.record("batch_1", "me", lines(1))
    with pytest.raises(StoreError):
        store.record("batch_1", "me", lines(2, 1))
    assert store.answered("batch_1") == {1}
    info = store.get("", "batch_1")
    assert info is not None
    assert info.completed == 1


def test_another_takes_over_what_is_abandoned(store: SqlBatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store)
    store.claim("me")
    store.begin("batch_1", "me", 2)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + LEASE_SECONDS + 1)
    assert store.claim("you") is not None
    for late in (lambda: store.beat("batch_1", "me"), lambda: store.record("batch_1", "me", lines(1))):
        with pytest.raises(LeaseLost):
            late()
    with pytest.raises(LeaseLost):
        store.finish("batch_1", "me")
    assert store.record("batch_1", "you", lines(1)) is BatchStatus.IN_PROGRESS
    store.release(["you"])
    assert store.claim("me") is not None


def test_it_is_known_whether_the_last_owner_died(store: SqlBatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store)

    def orphaned(owner: str) -> bool:
        claimed = store.claim(owner)
        assert claimed is not None
        return claimed.orphaned

    assert not orphaned("me")
    assert not orphaned("me"), "its own, after a fault"
    store.release(["me"])
    assert not orphaned("you"), "after an orderly stop"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + LEASE_SECONDS + 1)
    assert orphaned("me")


def test_lines_run_alone_are_counted(store: SqlBatchStore) -> None:
    add(store)
    store.claim("me")
    store.begin("batch_1", "me", 2)
    assert [store.try_alone("batch_1", "me", number) for number in (1, 1, 2, 2, 2, 1)] == [1, 2, 1, 2, 3, 1]
    with pytest.raises(LeaseLost):
        store.try_alone("batch_1", "you", 1)


def test_files_expire(store: SqlBatchStore, files: SqlFileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = files.add("", "kept", "batch", [b"x"])
    brief = files.add("", "brief", "batch", [b"y"], seconds=3600)
    read = files.add("", "read", "batch", [b"z"], seconds=3600)
    assert brief.expires_at == brief.created_at + 3600
    assert store.add(BatchInfo("batch_1", "", "/v1/embeddings", read.id, "24h", 7, output_seconds=7200))
    assert not files.delete_expired()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    assert files.get("", brief.id) is None
    assert files.delete("", brief.id) is None
    listing = files.list("", purpose=None, after=None, limit=10, newest_first=False)
    assert listing is not None
    assert [info.id for info in listing.items] == ["file-1", kept.id]
    assert not store.add(BatchInfo("batch_2", "", "/v1/embeddings", brief.id, "24h", 7))
    assert [files.delete_expired() for _ in range(2)] == [True, False], "one is still read"
    assert b"".join(files.chunks(read.id)) == b"z"
    store.claim("me")
    store.begin("batch_1", "me", 2)
    store.record("batch_1", "me", [*lines(1), *lines(2, ok=False)])
    done = store.finish("batch_1", "me")
    outputs = [files.get("", file_id or "") for file_id in (done.output_file_id, done.error_file_id)]
    assert [info and info.expires_at and info.expires_at - info.created_at for info in outputs] == [7200, 7200]
    assert [files.delete_expired() for _ in range(2)] == [True, False]
    monkeypatch.setattr(time, "time", lambda: now + 3601 + 7201)
    assert [files.delete_expired() for _ in range(3)] == [True, True, False]
    assert store.answered("batch_1") == set()
    assert b"".join(files.chunks(kept.id)) == b"x"


def test_one_of_many_claims_it(store: SqlBatchStore) -> None:
    add(store)
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda i: store.claim(f"owner {i}"), range(16)))
    assert sum(batch is not None for batch in claimed) == 1


def test_namespaces_whose_batches_are_not_run_go_first(store: SqlBatchStore) -> None:
    for name, namespace in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("c1", "c"), ("a4", "a")):
        add(store, name, namespace)
    claimed = [store.claim(f"runner {i}") for i in range(6)]
    assert [claim.batch.id for claim in claimed if claim is not None] == ["a1", "b1", "c1", "a2", "a3", "a4"]


def test_of_namespaces_with_as_many_running_the_one_that_waited_longest_goes_first(
    store: SqlBatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        add(store, name, name)
    now, turns = time.time(), []
    for i in range(6):
        monkeypatch.setattr(time, "time", lambda i=i: now + i)
        claimed = store.claim("me")
        assert claimed is not None
        turns.append(claimed.batch.id)
        store.release(["me"])
    assert turns == ["a", "b", "c"] * 2


def test_a_namespace_that_has_more_than_its_share_is_told(store: SqlBatchStore) -> None:
    for i in range(3):
        add(store, f"a{i}", "a")
        assert store.claim(f"runner {i}") is not None
    add(store, "a3", "a")
    assert not store.is_crowded("runner 0", "a", by=1), "its own may wait"
    add(store, "b0", "b")
    assert store.is_crowded("runner 0", "a", by=2)
    assert store.claim("runner 3") is not None
    assert not store.is_crowded("runner 3", "b", by=1)
    add(store, "b1", "b")
    assert store.is_crowded("runner 0", "a", by=2)
    assert not store.is_crowded("runner 3", "b", by=1)
    store.release(["runner 2"])
    assert store.is_crowded("runner 0", "a", by=1)
    assert not store.is_crowded("runner 0", "a", by=2)


def test_unfinished_batches_are_counted_by_namespace(store: SqlBatchStore) -> None:
    for name, namespace in (("a", "x"), ("b", "x"), ("c", "y")):
        add(store, name, namespace)
    assert [store.unfinished(namespace) for namespace in ("x", "y", "z")] == [2, 1, 0]
    store.cancel("x", "a")
    assert store.unfinished("x") == 1


def test_a_batch_of_a_file_that_is_gone_is_not_taken_in(store: SqlBatchStore, files: SqlFileStore) -> None:
    assert files.delete("", "file-1")
    assert not store.add(BatchInfo("batch_1", "", "/v1/embeddings", "file-1", "24h", 7))
    assert store.get("", "batch_1") is None


def test_cancelled_while_it_runs(store: SqlBatchStore) -> None:
    add(store)
    store.claim("me")
    store.begin("batch_1", "me", 2)
    assert store.cancel("other", "batch_1") is None
    cancelling = store.cancel("", "batch_1")
    assert cancelling is not None
    assert cancelling.status is BatchStatus.CANCELLING
    assert store.record("batch_1", "me", lines(1)) is BatchStatus.CANCELLING
    done = store.finish("batch_1", "me")
    assert (done.status, done.completed, done.output_file_id is None) == (BatchStatus.CANCELLED, 1, False)
    assert store.cancel("", "batch_1") == done


def test_a_refused_input(store: SqlBatchStore) -> None:
    add(store)
    store.claim("me")
    store.refuse("batch_1", "me", [Problem("empty_file", "It is empty.")])
    info = store.get("", "batch_1")
    assert info is not None
    assert (info.status, info.problems) == (BatchStatus.FAILED, (Problem("empty_file", "It is empty."),))
    assert store.claim("me") is None


def test_pages(store: SqlBatchStore, files: SqlFileStore) -> None:
    for i in range(5):
        add(store, f"batch_{i}", "mine")
        files.add("mine", f"f{i}", "batch", [b"x"])
    seen: list[str] = []
    after, more = None, True
    while more:
        page = store.list("mine", after=after, limit=2)
        assert page is not None
        seen += [batch.id for batch in page.items]
        after, more = page.items[-1].id, page.has_more
    assert seen == [f"batch_{i}" for i in (4, 3, 2, 1, 0)]
    assert store.list("yours", after="batch_1", limit=2) is None
    listed = files.list("mine", purpose="batch", after=None, limit=9, newest_first=False)
    assert listed is not None
    assert [file.filename for file in listed.items] == [f"f{i}" for i in range(5)]
    assert files.list("yours", purpose=None, after=listed.items[0].id, limit=9, newest_first=True) is None


def test_files_of_any_size(files: SqlFileStore) -> None:
    for size in (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 5):
        content = bytes(i % 251 for i in range(size))
        info = files.add("", "name", "batch", [content[:7], content[7:]])
        assert info.bytes == size
        assert b"".join(files.chunks(info.id)) == content
        assert files.delete("other", info.id) is None
        assert files.delete("", info.id) is True
        assert files.get("", info.id) is None


def test_a_file_that_breaks_off_is_not_there(files: SqlFileStore) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x"
        raise ValueError("the client has gone")

    with pytest.raises(ValueError, match="gone"):
        files.add("", "name", "batch", broken())
    listed = files.list("", purpose=None, after=None, limit=9, newest_first=True)
    assert listed is not None
    assert listed.items == []


def test_a_file_is_not_there_before_it_is_whole_and_others_write_meanwhile(
    store: SqlBatchStore, files: SqlFileStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content() -> Iterator[bytes]:
        for i in range(3):
            yield b"x" * CHUNK_BYTES
            listed = files.list("mine", purpose=None, after=None, limit=9, newest_first=True)
            assert listed is not None
            assert listed.items == []
            add(store, f"batch_{i}")

    info = files.add("mine", "name", "batch", content())
    assert files.get("mine", info.id) == info

    def killed() -> Iterator[bytes]:
        yield b"x" * CHUNK_BYTES
        monkeypatch.setattr(database, "write", None)  # so that it cannot tidy up
        raise SystemExit

    with pytest.raises(TypeError):
        files.add("mine", "name", "batch", killed())
    monkeypatch.undo()
    assert not files.delete_expired()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + PARTIAL_SECONDS + 1)
    assert [files.delete_expired() for _ in range(2)] == [True, False]
    with database.reading() as connection:
        assert set(connection.scalars(select(file_chunks.c.file_id))) == {info.id}


def test_a_file_in_use_stays(store: SqlBatchStore, files: SqlFileStore) -> None:
    info = files.add("", "name", "batch", [b"x"])
    store.add(BatchInfo("batch_9", "", "/v1/embeddings", info.id, "24h", 7))
    assert files.delete("", info.id) is False


def test_lines_are_numbered_across_chunks() -> None:
    content = b'{"a":1}\n\n  \n{"b":2}\r\nlast'
    for size in range(1, len(content) + 1):
        chunks = [content[i : i + size] for i in range(0, len(content), size)]
        found = [(n, line.strip()) for n, line in numbered(chunks, 100)]
        assert found == [(1, b'{"a":1}'), (4, b'{"b":2}'), (5, b"last")]


@pytest.mark.parametrize(
    ("content", "codes"),
    [
        (b"", [("empty_file", None)]),
        (b"{", [("invalid_json_line", 1)]),
        (b"[1]", [("invalid_json_line", 1)]),
        (b'{"custom_id":"a","method":"POST","url":"/v1/embeddings"}', [("missing_required_parameter", 1)]),
        (b'{"custom_id":1,"method":"POST","url":"/v1/embeddings","body":{}}', [("missing_required_parameter", 1)]),
        (b'{"custom_id":"a","method":"GET","url":"/v1/embeddings","body":{}}', [("invalid_method", 1)]),
        (b'{"custom_id":"a","method":"POST","url":"/v1/chat","body":{}}', [("mismatched_endpoint", 1)]),
        (b'{"custom_id":"a","method":"POST","url":"/v1/embeddings","body":{}}\n' * 2, [("duplicate_custom_id", 2)]),
        (b'{"custom_id":"\\ud83d","method":"POST","url":"/v1/chat","body":{}}', [("missing_required_parameter", 1)]),
        (b'{"custom_id":"%s","method":"POST","url":"/v1/embeddings","body":{}}' % (b"a" * 513),
         [("invalid_custom_id", 1)]),
        (b"{}\n" + b"x" * 1001, [("missing_required_parameter", 1), ("invalid_json_line", 2)]),
        (b"\n".join(b'{"custom_id":"%d","method":"POST","url":"/v1/embeddings","body":{}}' % i for i in range(6)),
         [("too_many_lines", 5)]),
        (b"\n" * 8 + b'{"custom_id":"a","method":"POST","url":"/v1/embeddings","body":{}}', []),
        (b"\n" * 9 + b'{"custom_id":"a","method":"POST","url":"/v1/embeddings","body":{}}', [("too_many_lines", 10)]),
        (b" \n" * 100, [("too_many_lines", 10)]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_input(content: bytes, codes: list[tuple[str, int | None]]) -> None:
    _, problems = checked([content], max_lines=4, max_line_bytes=1000)
    assert [(problem.code, problem.line) for problem in problems] == codes


def test_what_is_missing_is_told_from_what_is_wrong() -> None:
    content = b'{"method":"POST"}\n{"custom_id":1}'
    _, problems = checked([content], max_lines=4, max_line_bytes=1000)
    assert [problem.message for problem in problems] == [
        "Missing required parameter: 'custom_id'.", "Invalid 'custom_id'."
    ]  # fmt: skip


def test_of_an_input_that_is_bad_throughout_a_part_is_told() -> None:
    _, problems = checked([b"{}\n" * 300], max_lines=1000, max_line_bytes=1000)
    assert [problem.line for problem in problems] == list(range(1, 101))


def test_lines_as_clients_write_them() -> None:
    """A byte order mark, Windows' line ends, and half an emoji in a text."""
    line = b'{"custom_id":"%d","method":"POST","url":"/v1/embeddings","body":{"input":"\\ud83d"}}\r\n'
    content = b"\xef\xbb\xbf" + line % 1 + line % 2
    assert checked([content[:2], content[2:]], max_lines=9, max_line_bytes=100) == (2, [])


@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_a_line_over_the_limit_is_not_gathered(chunk: int) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += chunk
            yield b"x" * chunk

    with pytest.raises(LineTooLong):
        list(numbered(endless(), 100))
    assert taken <= 100 + chunk


@pytest.mark.parametrize("chunk", [1, 1000])
def test_a_line_may_be_as_long_as_the_limit_and_no_longer(chunk: int) -> None:
    def chunks(length: int) -> list[bytes]:
        content = b"y\r\n" + b"x" * length + b"\ny"
        return [content[start : start + chunk] for start in range(0, len(content), chunk)]

    assert list(numbered(chunks(100), 100)) == [(1, b"y"), (2, b"x" * 100), (3, b"y")]
    with pytest.raises(LineTooLong) as refused:
        list(numbered(chunks(101), 100))
    assert refused.value.number == 2


def test_what_was_not_begun_is_cancelled_at_once(store: SqlBatchStore) -> None:
    add(store)
    done = store.cancel("", "batch_1")
    assert done is not None
    assert done.status is BatchStatus.CANCELLED
    assert set(done.times) == {"cancelling_at", "cancelled_at"}
    assert store.claim("me") is None


def test_cancelled_while_nobody_runs_it_keeps_its_answers(store: SqlBatchStore) -> None:
    add(store)
    store.claim("me")
    store.begin("batch_1", "me", 2)
    store.record("batch_1", "me", lines(1))
    store.release(["me"])
    cancelling = store.cancel("", "batch_1")
    assert cancelling is not None
    assert cancelling.status is BatchStatus.CANCELLING
    assert store.claim("you") is not None
    done = store.finish("batch_1", "you")
    assert (done.status, done.completed, done.output_file_id is None) == (BatchStatus.CANCELLED, 1, False)


def test_an_output_of_any_size(store: SqlBatchStore, files: SqlFileStore) -> None:
    add(store)
    store.claim("me")
    store.begin("batch_1", "me", 1203)
    sizes = [1] * 1200 + [CHUNK_BYTES // 2, CHUNK_BYTES, 3 * CHUNK_BYTES]
    store.record("batch_1", "me", [LineResult(n, True, bytes([n % 251]) * s) for n, s in enumerate(sizes, start=1)])
    done = store.finish("batch_1", "me")
    assert done.output_file_id is not None
    pieces = list(files.chunks(done.output_file_id))
    assert b"".join(pieces) == b"".join(bytes([n % 251]) * s for n, s in enumerate(sizes, start=1))
    assert max(map(len, pieces)) == 3 * CHUNK_BYTES
    info = files.get("", done.output_file_id)
    assert info is not None
    assert info.bytes == sum(sizes)


def test_a_damaged_piece_of_a_file_is_noticed(store: SqlBatchStore, files: SqlFileStore, database: Database) -> None:
    """Where it is read; what is in front of it, and other files, are read."""
    info = files.add("", "name", "batch", [b"x" * (CHUNK_BYTES + 1)])
    other = files.add("", "other", "batch", [b"y"])
    add(store)
    store.claim("me")
    store.record("batch_1", "me", lines(1, 2))
    output = store.finish("batch_1", "me").output_file_id
    assert output is not None
    hurt = update(file_chunks).where(file_chunks.c.file_id == info.id, file_chunks.c.number == 1)
    database.write(lambda connection: connection.execute(hurt.values(data=b"z")))
    changed = update(batch_lines).where(batch_lines.c.number == 2).values(data=b"answer 3\n")
    database.write(lambda connection: connection.execute(changed))
    pieces = files.chunks(info.id)
    assert next(pieces) == b"x" * CHUNK_BYTES
    with pytest.raises(PayloadDamaged, match=info.id):
        next(pieces)
    with pytest.raises(PayloadDamaged, match=output):
        list(files.chunks(output))
    assert list(files.chunks(other.id)) == [b"y"]
    before = update(file_chunks).values(crc32=None)
    database.write(lambda connection: connection.execute(before))
    assert b"".join(files.chunks(info.id))[-1:] == b"z", "stored before there were checksums"
