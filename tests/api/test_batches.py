"""OpenAI's Batch API with OpenAI's own client, and what survives the server's death."""

import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch
from sqlalchemy import update

from app.stores.batch_tables import batches
from app.stores.batches import SqlBatchStore
from app.stores.database import Database
from tests.api.test_auth import auth
from tests.api.test_auth import entry as key_entry
from tests.compare import assert_same
from tests.conftest import ANIMALS
from tests.live import V1, live_server
from tests.processes import ForkedServer


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": {"model": V1} | body}


def upload(client: openai.OpenAI, lines: list[dict[str, Any]]) -> str:
    content = "".join(json.dumps(entry) + "\n" for entry in lines).encode()
    return client.files.create(file=("lines.jsonl", io.BytesIO(content)), purpose="batch").id


def create(client: openai.OpenAI, file_id: str, **more: Any) -> Batch:
    return client.batches.create(input_file_id=file_id, endpoint="/v1/embeddings", completion_window="24h", **more)


def finished(client: openai.OpenAI, batch_id: str, seconds: float = 120) -> Batch:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "cancelled"):
            return batch
        time.sleep(0.05)
    raise AssertionError(batch)


def answers(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(entry) for entry in client.files.content(file_id).text.splitlines()]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with (
        live_server(tmp_path_factory.mktemp("batches"), limits={"max_batch_lines": 500}) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made,
    ):
        httpx.post(f"{url}/v1/contexts", json={"name": "animals", "documents": ANIMALS}).raise_for_status()
        yield made


def test_a_batch_from_end_to_end(client: openai.OpenAI) -> None:
    """Lines that are answered and lines that are not, each as the endpoint itself answers."""
    lines = [
        line("one", input="The fox sleeps."),
        line("two", input=["An owl.", "A bear."], model=f"{V1}@animals:query", encoding_format="base64"),
        line("three", input=""),
        line("four", input="x", model="nothing"),
        line("five", input="x", surprise=1),
        line("six", input="x", context={"documents": ["Boil the rice."]}),
    ]
    file_id = upload(client, lines)
    batch = create(client, file_id, metadata={"team": "zoo"})
    assert (batch.status, batch.object, batch.metadata) == ("validating", "batch", {"team": "zoo"})
    done = finished(client, batch.id)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 6, "completed": 3, "failed": 3}
    assert done.in_progress_at
    assert done.completed_at
    output = answers(client, done.output_file_id)
    assert [entry["custom_id"] for entry in output] == ["one", "two", "six"]
    for entry in output:
        body = next(sent["body"] for sent in lines if sent["custom_id"] == entry["custom_id"])
        live = client.post("/embeddings", body=body, cast_to=httpx.Response).json()
        found = entry["response"]["body"]
        assert {k: v for k, v in found.items() if k != "data"} == {k: v for k, v in live.items() if k != "data"}
        if entry["custom_id"] != "two":
            assert_same(found["data"][0]["embedding"], live["data"][0]["embedding"])
        assert entry["response"]["status_code"] == 200
        assert entry["error"] is None
    errors = answers(client, done.error_file_id)
    assert {entry["custom_id"]: entry["response"]["status_code"] for entry in errors} == {
        "three": 400, "four": 404, "five": 400,
    }  # fmt: skip
    codes = [entry["response"]["body"]["error"]["code"] for entry in errors]
    assert codes == [None, "model_not_found", "unknown_parameter"]
    assert client.files.retrieve(str(done.output_file_id)).purpose == "batch_output"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"nonsense", "invalid_json_line"),
        ((json.dumps(line("a", input="x")) + "\n").encode() * 2, "duplicate_custom_id"),
        ("".join(json.dumps(line(str(i), input="x")) + "\n" for i in range(501)).encode(), "too_many_lines"),
    ],
)
def test_an_input_that_cannot_run(client: openai.OpenAI, content: bytes, code: str) -> None:
    file = client.files.create(file=("bad.jsonl", io.BytesIO(content)), purpose="batch")
    done = finished(client, create(client, file.id).id)
    assert done.status == "failed"
    assert done.errors is not None
    assert done.errors.data is not None
    assert done.errors.data[0].code == code
    assert done.output_file_id is None


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_file_id": "file-nothing"}, "input_file_id"),
        ({"endpoint": "/v1/chat/completions"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"colour": "red"}, "colour"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor"),
    ],
)
def test_a_batch_that_is_refused(client: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    body = {"input_file_id": upload(client, [line("a", input="x")]), "endpoint": "/v1/embeddings"}
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/batches", body=body | {"completion_window": "24h"} | change, cast_to=httpx.Response)
    assert refused.value.param == param


def test_files(client: openai.OpenAI) -> None:
    ids = [upload(client, [line(str(i), input="x")]) for i in range(3)]
    listed = [file.id for file in client.files.list(limit=2)]  # the client turns the pages
    assert [file_id for file_id in listed if file_id in ids] == ids[::-1]
    assert client.files.delete(ids[0]).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as missing:
            call(ids[0])
        assert missing.value.param == "id"
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("a", b"x"), purpose="vision")
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_nothing")


def test_files_expire_when_they_are_told_to(client: openai.OpenAI) -> None:
    """What becomes of them then: tests/contract."""
    content = json.dumps(line("a", input="x")).encode()
    file = client.files.create(
        file=("in.jsonl", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600
    assert client.files.retrieve(file.id).expires_at == file.expires_at
    batch = finished(client, create(client, file.id, output_expires_after={"anchor": "created_at", "seconds": 7200}).id)
    output = client.files.retrieve(batch.output_file_id or "")
    assert output.expires_at == output.created_at + 7200


def test_what_is_no_upload(client: openai.OpenAI) -> None:
    url = str(client.base_url)
    assert httpx.post(f"{url}files", json={}).status_code == 415
    assert httpx.post(f"{url}files", data={"purpose": "batch"}, files={"other": b"x"}).status_code == 400
    for more, param in (
        ({"colour": "red"}, "colour"),
        ({"purpose[a]": "batch"}, "purpose"),
        ({"expires_after": "3600"}, "expires_after"),
        ({"expires_after[anchor]": "created_at"}, "expires_after.seconds"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "1e4"}, "expires_after.seconds"),
    ):
        response = httpx.post(f"{url}files", data={"purpose": "batch"} | more, files={"file": b"x"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    for content in (b"--y", b"--x\r\nnonsense"):
        response = httpx.post(f"{url}files", content=content, headers=broken)
        assert response.status_code == 400
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("what", ["files", "batches"])
def test_a_page_behind_nothing_is_a_400(client: openai.OpenAI, what: str) -> None:
    with pytest.raises(openai.BadRequestError, match="there is no ") as refused:
        getattr(client, what).list(after="long" * 100)
    assert refused.value.param == "after"
    assert len(refused.value.message) < 300


def test_a_file_over_the_limit(tmp_path: Path) -> None:
    with live_server(tmp_path, limits={"max_file_bytes": 1000}) as url:
        for size in (1000, 1001, 70_000, 200_000):
            response = httpx.post(f"{url}/v1/files", data={"purpose": "batch"}, files={"file": b"x" * size})
            if size == 1000:
                assert response.json()["bytes"] == size
            else:
                assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def test_unfinished_batches_are_bounded(tmp_path: Path) -> None:
    with (
        live_server(tmp_path, limits={"max_unfinished_batches": 2}) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        file_id = upload(client, [line(str(i), input=["x"] * 500) for i in range(100)])
        made = [create(client, file_id) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="2 batches are not finished") as refused:
            create(client, file_id)
        assert float(refused.value.response.headers["retry-after"]) > 0
        client.batches.cancel(made[0].id)
        finished(client, made[0].id)
        create(client, file_id)


def test_cancel_keeps_what_is_answered(client: openai.OpenAI) -> None:
    file_id = upload(client, [line(str(i), input=[f"text {i} {j}" for j in range(40)]) for i in range(400)])
    batch = create(client, file_id)
    while not (client.batches.retrieve(batch.id).request_counts or batch.request_counts).completed:  # type: ignore[union-attr]
        time.sleep(0.02)
    with pytest.raises(openai.BadRequestError, match="not finished"):
        client.files.delete(file_id)
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = finished(client, batch.id)
    assert done.status == "cancelled"
    assert done.request_counts is not None
    assert 0 < done.request_counts.completed < 400
    assert len(answers(client, done.output_file_id)) == done.request_counts.completed
    assert [other.id for other in client.batches.list(limit=1).data] == [batch.id]
    assert client.files.delete(file_id).deleted


def test_requests_go_first(client: openai.OpenAI) -> None:
    """Beside a batch of thousands of texts a query waits for about one batch of the engine."""
    file_id = upload(client, [line(str(i), input=[f"word {i} {j} " * 30 for j in range(60)]) for i in range(300)])
    batch = create(client, file_id)
    while client.batches.retrieve(batch.id).status == "validating":
        time.sleep(0.02)
    for i in range(5):
        client.embeddings.create(model=V1, input=f"a query {i}")
    assert client.batches.retrieve(batch.id).status == "in_progress", "the queries overtook it"
    client.batches.cancel(batch.id)
    finished(client, batch.id)


def test_another_namespace_sees_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(key_entry("red", "red", "embed") + 'namespace = "red"\n' + key_entry("blue", "blue", "embed"))
    with live_server(tmp_path / "data", server={"keys_file": file}) as url:
        red, blue = (openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in ("red", "blue"))
        file_id = upload(red, [line("a", input="x")])
        batch = create(red, file_id)
        assert finished(red, batch.id).status == "completed"
        with pytest.raises(openai.NotFoundError):
            blue.files.retrieve(file_id)
        with pytest.raises(openai.NotFoundError):
            blue.batches.retrieve(batch.id)
        with pytest.raises(openai.BadRequestError, match="no such file"):
            create(blue, file_id)
        assert list(blue.files.list()) == []
        assert list(blue.batches.list()) == []
        assert httpx.get(f"{url}/v1/batches", headers=auth("nobody")).status_code == 401


def test_kill_9_in_the_middle(tmp_path: Path) -> None:
    """The next start completes it: every line has one answer, and what was stored is not computed again."""
    count = 600
    with (
        ForkedServer(tmp_path) as server,  # is killed at the end
        openai.OpenAI(base_url=f"{server.when_ready().url}/v1", api_key="none") as client,
    ):
        batch = create(client, upload(client, [line(f"id {i}", input=f"text {i}") for i in range(count)]))
        while (counts := client.batches.retrieve(batch.id).request_counts) is None or counts.completed < 60:
            time.sleep(0.01)
    database = Database(f"sqlite:///{tmp_path / 'data' / 'contexts.sqlite3'}")
    before = SqlBatchStore(database).get("", batch.id)
    # The dead server's lease, which the next one would wait for.
    database.write(lambda connection: connection.execute(update(batches).values(beat_at=0.0)))
    database.close()
    assert before is not None
    assert 60 <= before.completed < count
    with (
        ForkedServer(tmp_path) as server,
        openai.OpenAI(base_url=f"{server.when_ready().url}/v1", api_key="none") as client,
    ):
        done = finished(client, batch.id)
        assert done.request_counts is not None
        assert done.request_counts.model_dump() == {"total": count, "completed": count, "failed": 0}
        output = answers(client, done.output_file_id)
        assert [entry["custom_id"] for entry in output] == [f"id {i}" for i in range(count)]
        metrics = httpx.get(f"{server.url}/metrics").text
        here = float(metrics.split('cde_batch_lines_total{outcome="completed"} ')[1].split()[0])
        assert here == count - before.completed
        server.stop()


def test_a_clean_stop_hands_the_batch_on_at_once(tmp_path: Path) -> None:
    lines = [line(f"id {i}", input=[f"text {i} {j} " * 20 for j in range(20)]) for i in range(50)]
    with live_server(tmp_path) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        batch = create(client, upload(client, lines))
        while not (counts := client.batches.retrieve(batch.id).request_counts) or not counts.completed:
            time.sleep(0.01)
    with live_server(tmp_path) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        done = finished(client, batch.id)
        assert len({entry["custom_id"] for entry in answers(client, done.output_file_id)}) == 50


def test_two_servers_share_the_work(tmp_path: Path, postgres: str) -> None:
    """One database: each batch is run by one of them, and all are done."""
    from tests.postgres import new_database  # noqa: PLC0415

    contexts = {"database_url": new_database(postgres)}
    with (
        live_server(tmp_path / "a", contexts=contexts) as one,
        live_server(tmp_path / "b", contexts=contexts) as two,
        openai.OpenAI(base_url=f"{one}/v1", api_key="none") as first,
        openai.OpenAI(base_url=f"{two}/v1", api_key="none") as second,
    ):
        made: list[str] = []

        def work(client: openai.OpenAI, name: str) -> None:
            for i in range(3):
                file_id = upload(client, [line(f"{name} {i} {j}", input=f"{name} {i} {j}") for j in range(50)])
                made.append(create(client, file_id).id)

        threads = [threading.Thread(target=work, args=pair) for pair in ((first, "a"), (second, "b"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(made) == 6
        for batch_id in made:
            done = finished(second, batch_id)
            assert len(answers(first, done.output_file_id)) == 50
