"""`embed` where something is in its way: a full disk, a file that changes, a text that is too long."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from app.corpora import Record
from app.domain import FloatArray
from app.embedding_files import PartialVectors
from tests.cli.conftest import Run
from tests.conftest import ANIMALS
from tests.live import GOLDENS, V1, live_server

ROOT = Path(__file__).parents[2]
MODEL = ["--model", str(GOLDENS / V1), "--input-type", "document"]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As a full disk: what is written beyond is an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def read_vectors(path: Path) -> FloatArray:
    readers: dict[str, Callable[[], FloatArray]] = {
        ".npy": lambda: np.load(path),
        ".safetensors": lambda: load_file(path)["embeddings"],
        ".jsonl": lambda: np.array([json.loads(line)["embedding"] for line in path.read_text().splitlines()]),
        ".parquet": lambda: np.array(pq.read_table(path)["embedding"].to_pylist()),
    }
    return readers[path.suffix]()


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".jsonl", ".parquet"])
def test_a_full_disk_is_said_of_the_file_and_costs_no_vector(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out{suffix}"
    vectors = np.random.default_rng(0).standard_normal((1000, 16)).astype(np.float32)
    records = [Record(str(i), "") for i in range(1000)]
    with PartialVectors(output, dimensions=16, made_of="these") as partly:
        with files_of_at_most(10_000), pytest.raises(OSError, match="File too large") as stopped:
            partly.extend(iter([vectors]), lambda _: None)
        assert stopped.value.filename == f"{output}.partial"
    with PartialVectors(output, dimensions=16, made_of="these") as partly:
        assert partly.done == 10_000 // 64
        partly.extend(iter([vectors[partly.done :]]), lambda _: None)
        with files_of_at_most(64_000), pytest.raises(OSError, match="File too large") as stopped:
            partly.finish(iter(records))
        assert stopped.value.filename == str(output)
        assert sorted(p.name for p in tmp_path.iterdir()) == [f"{output.name}.partial", f"{output.name}.partial.json"]
        partly.finish(iter(records))
    assert [p.name for p in tmp_path.iterdir()] == [output.name]
    np.testing.assert_array_equal(read_vectors(output).astype(np.float32), vectors)


def test_a_text_that_is_too_long_is_named_by_its_line(run: Run, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {i}"}) for i in range(300)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "", json.dumps({"text": "word " * 600}), '"behind it"']))
    options = ["embed", *MODEL, "--input", "in.jsonl", "--output", "out.npy"]
    for again in (False, True):
        result = run(*options, code=1)
        assert ("going on behind the first 256 texts" in result.stderr) == again
        message = str(result.exception)
        assert message.startswith("in.jsonl:302: This model's maximum context length is 512 tokens")
        assert "in input[300]" in message
        assert "--truncate end" in message


def test_ctrl_c_ends_in_order(tmp_path: Path) -> None:
    """And not by an abort, under the forwards that run."""
    (tmp_path / "in.txt").write_text("".join(f"text {i} of many\n" for i in range(20_000)))
    # A shell starts what runs behind it with interrupts ignored, and that is inherited.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program = f"{heard}import sys\nfrom app.cli import main\nsys.argv[0] = 'cde-server'\nmain()"
    command = [sys.executable, "-c", program, "embed", *MODEL, "--input", "in.txt", "--output", "out.npy"]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=PIPE) as process:
        partial = tmp_path / "out.npy.partial"
        while process.poll() is None and not (partial.exists() and partial.stat().st_size):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert partial.stat().st_size % (64 * 4) == 0


@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_a_file_that_changes_meanwhile_is_no_output(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Vectors of one version of it beside the rows of another would be wrong without a sign of it."""
    source, output = write_lines(tmp_path / "in.jsonl", ANIMALS), tmp_path / f"out{suffix}"
    options = ["embed", *MODEL, "--input", source, "--output", output]
    extend = PartialVectors.extend

    def slow(self: PartialVectors, chunks: Iterator[FloatArray], advance: Callable[[int], None]) -> None:
        extend(self, chunks, advance)
        write_lines(source, [*ANIMALS[::-1], "one more"])

    with monkeypatch.context() as patched:
        patched.setattr(PartialVectors, "extend", slow)
        assert "has changed while it was embedded" in str(run(*options, code=1).exception)
    assert not output.exists()
    write_lines(source, ANIMALS)  # back to what it was: what the run had left is not taken for its vectors
    assert "going on" not in run(*options).stderr
    assert read_vectors(output).shape == (12, 64)


def test_vectors_of_something_else_are_not_thrown_away_without_a_word(run: Run, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", ANIMALS)
    with PartialVectors(tmp_path / "out.npy", dimensions=64, made_of="something else") as partly:
        partly.extend(iter([np.ones((5, 64), np.float32)]), lambda _: None)
    result = run("embed", *MODEL, "--input", source, "--output", tmp_path / "out.npy")
    assert "beginning anew: the 5 vectors" in result.stderr
    assert np.load(tmp_path / "out.npy").shape == (12, 64)


@pytest.mark.parametrize("served_name", [None, "animals-model"])
def test_a_stored_context_of_a_model_in_a_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served_name: str | None
) -> None:
    """The server calls it by the folder's last part, or as it is told."""
    source = write_lines(tmp_path / "in.jsonl", ANIMALS)
    settings = [{"name": str(GOLDENS / V1), "served_name": served_name}]
    with live_server(tmp_path / "data", settings) as url:
        made = json.loads(run("contexts", "create", "zoo", source, "--url", url).stdout)
    if served_name:
        monkeypatch.setenv("CDE__MODELS", json.dumps(settings))
    result = run("embed", *MODEL, "--input", source, "--context", "zoo", "--output", "out.npy")
    assert made["id"] in result.stderr


def test_a_seed_that_is_none(run: Run, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", ANIMALS)
    options = ["--input", source, "--context", source, "--output", "out.npy", "--seed", str(2**63)]
    assert "--seed" in run("embed", *MODEL, *options, code=2).output
    assert "--seed" in run("contexts", "create", "zoo", source, "--seed", str(2**63), code=2).output


def test_a_context_file_of_an_unknown_kind(run: Run, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", ANIMALS)
    other = source.with_suffix(".csv")
    other.write_text("text\n")
    result = run("embed", *MODEL, "--input", source, "--context", other, "--output", "out.npy", code=1)
    assert "unknown kind of file for a context" in str(result.exception)
