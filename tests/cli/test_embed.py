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
from safetensors.numpy import load_file

from app.domain import FloatArray
from tests.live import GOLDENS, V1

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


def test_ctrl_c_ends_in_order(tmp_path: Path) -> None:
    """And not by an abort, under the forwards that run."""
    (tmp_path / "in.txt").write_text("".join(f"text {i} of many\n" for i in range(20_000)))
    program = "import sys\nfrom app.cli import main\nsys.argv[0] = 'cde-server'\nmain()"
    command = [sys.executable, "-c", program, "embed", *MODEL, "--input", "in.txt", "--output", "out.npy"]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=PIPE) as process:
        partial = tmp_path / "out.npy.partial"
        while process.poll() is None and not (partial.exists() and partial.stat().st_size):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert partial.stat().st_size % (64 * 4) == 0
