"""A corpus through a Ray cluster of several processes: the single process's vectors, each once, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from app.cli.main import app
from tests.compare import assert_same
from tests.live import GOLDENS, V1

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # of Ray about Ray
]

RECIPE = ["--model", GOLDENS / V1, "--input-type", "document", "--truncate", "end"]
WAIT_SECONDS = 120


def run(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["embed", *map(str, (*RECIPE, *arguments))])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def texts(word: str, count: int) -> list[str]:
    return [f"{word} number {i} lies behind number {i * i}." for i in range(count)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Lines with and without ids, blank ones between; rows in groups of 20; plain text in a folder below."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [{"_id": f"a{i}", "text": t, "n": i} for i, t in enumerate(texts("Stone", 70))])
    (folder / "b.jsonl").write_text("".join(f"{json.dumps(t)}\n\n" for t in texts("Tree", 30)))
    table = pa.table({"n": pa.array(range(90), pa.int32()), "text": texts("River", 90), "url": ["u"] * 90})
    pq.write_table(table, folder / "c.parquet", row_group_size=20)
    (folder / "deep").mkdir()
    (folder / "deep" / "d.txt").write_text("\n".join(texts("Cloud", 10)))
    (folder / "README.md").write_text("no texts")
    return folder


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "context.npy"
    np.save(path, np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32))
    return path


def read_output(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """By file and row, each of which is there once."""
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    found = {(row["_path"], row["_row"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def vectors(rows: dict[tuple[str, int], dict[str, Any]], name: str) -> list[list[float]]:
    return [row["embedding"] for (path, _), row in sorted(rows.items()) if path == name]


def test_equal_to_the_single_process(corpus: Path, context: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: list[str | Path] = ["--context", context, "--engine", "ray", "--part-rows", "16", "--keep", "n"]
    result = run("--input", corpus, "--output", out, *options)
    rows = read_output(out)
    assert len(rows) == 200
    for name in ("a.jsonl", "b.jsonl", "c.parquet", "deep/d.txt"):
        alone = tmp_path / "alone.parquet"
        run("--input", corpus / name, "--output", alone, "--context", context, "--overwrite")
        expected = pq.read_table(alone)
        assert_same(vectors(rows, name), np.array(expected["embedding"].to_pylist()))
        ids = [row["_id"] for (path, _), row in sorted(rows.items()) if path == name]
        assert ids == expected["_id"].to_pylist()
    note = json.loads((out / "_run.json").read_text())
    assert (note["status"], note["rows"], note["parts"]) == ("completed", 200, 5 + 2 + 6 + 1)
    assert note["fingerprint"] in result.output
    assert [rows["a.jsonl", i]["n"] for i in (0, 69)] == ["0", "69"]  # JSON's values are strings
    assert [rows["c.parquet", i]["n"] for i in (0, 89)] == [0, 89]
    assert rows["b.jsonl", 0]["n"] is None
    schema = pq.read_schema(next(out.glob("a.jsonl*")))
    assert schema.field("embedding").type == pa.list_(pa.float32(), 64)


def test_a_worker_that_is_killed_costs_nothing(context: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    write_lines(source, [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts("Hill", 3000))])
    there: list[int] = []

    def kill_one() -> None:
        there.append(len(wait_for_parts(out, 3)))
        os.kill(next(embedders()), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    run("--input", source, "--output", out, "--context", context, "--engine", "ray", "--part-rows", "50")
    killer.join(WAIT_SECONDS)
    assert 3 <= there[0] < 60
    assert sorted(row["_id"] for row in read_output(out).values()) == sorted(f"d{i}" for i in range(3000))


def test_a_run_that_was_cut_short_goes_on(context: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    lines = [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts("Lake", 2000))]
    write_lines(source, lines)
    options: list[str | Path] = [
        "--input",
        source,
        "--output",
        out,
        "--context",
        context,
        "--engine",
        "ray",
        "--part-rows",
        "50",
    ]
    command = [sys.executable, "-c", "from app.cli import main; main()", "embed", *map(str, (*RECIPE, *options))]
    process = subprocess.Popen(command)
    try:
        before = wait_for_parts(out, 4)
    finally:
        process.kill()
        process.wait()
    assert json.loads((out / "_run.json").read_text())["status"] == "in_progress"
    left = out / "_writing-by-a-worker-that-was-killed"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    run(*options)
    after = parts_of(out)
    assert 4 <= len(before) < len(after) == 40
    assert before.items() <= after.items()
    assert sorted(row["_id"] for row in read_output(out).values()) == sorted(f"d{i}" for i in range(2000))
    assert not left.exists()

    # More texts of the same file are an addition; other texts, another context, and foreign files are not.
    write_lines(source, [*lines, {"_id": "new", "text": "One more."}])
    run(*options)
    assert after.items() <= parts_of(out).items()
    assert len(parts_of(out)) == 41
    write_lines(source, [{"text": "Something else."}, *lines[1:]])
    assert "their texts have changed" in str(run(*options, code=1).exception)
    assert "input_type is document there and query now" in str(run(*options, "--input-type", "query", code=1).exception)
    assert "is in" in str(run(*options, "--input", tmp_path, code=1).exception)
    assert "not of a run" in str(run(*options, "--output", tmp_path, code=1).exception)


def test_what_is_wrong_with_a_text_is_said_with_its_place(context: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    options: list[str | Path] = [
        "--input",
        source,
        "--output",
        out,
        "--context",
        context,
        "--engine",
        "ray",
        "--truncate",
        "none",
    ]
    write_lines(source, [{"text": "short"}, {"title": "no text"}])
    assert str(run(*options, code=1).exception) == 'in.jsonl:2: neither a string nor an object with a string "text"'
    assert not out.exists()
    source.write_text("\n")
    assert "holds no text" in str(run(*options, code=1).exception)
    assert not out.exists()
    write_lines(source, [{"text": "short"}, {"text": "word " * 600}])
    message = str(run(*options, code=1).exception)
    assert "in.jsonl, the 2 texts from 0 on: This model's maximum context length is 512" in message
    assert not parts_of(out)


def parts_of(out: Path) -> dict[str, int]:
    """When each was written, in ns."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("in.jsonl*")}


def wait_for_parts(out: Path, count: int) -> dict[str, int]:
    deadline = time.monotonic() + WAIT_SECONDS
    while len(found := parts_of(out)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def embedders() -> Iterator[int]:
    """The worker processes of this process's cluster that hold the model."""
    ours = {os.getpid()}
    parents = {int(p.name): p for p in Path("/proc").iterdir() if p.name.isdigit()}
    for _ in range(3):
        ours |= {pid for pid, path in parents.items() if parent_of(path) in ours}
    return (pid for pid in ours if "MapWorker(Map(Embedder))" in (parents[pid] / "cmdline").read_text())


def parent_of(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
