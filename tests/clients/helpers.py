"""What every client is asked, and what is held to curl's answer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MODEL = "minilm-context@legal:query"
UNKNOWN = "no-such-model"
KEY = "k-clients"
# No newlines: some clients replace them by spaces before they send anything.
TEXTS = [
    "Where does the owl sleep?",
    "How long does rice boil,  roughly?",
    "Crème brûlée à la carte",
    "東京の狐 и медведь",
    "🦊👩‍👩‍👧 <|endoftext|>",
    "Where does the owl sleep?",
]
TOO_LONG = "one more word " * 400
LEAST_COSINE = 0.9999
NODE = Path(__file__).parent / "node"
INSTALLS = "`make test-clients` installs it"


def optional(package: str) -> Any:
    """The package; skips where it is not installed."""
    return pytest.importorskip(package, reason=f"{package} is not installed: {INSTALLS}", exc_type=ImportError)


def program(name: str) -> str:
    """The path of a command, the virtual environment's own first; skips where there is none."""
    own = Path(sys.executable).with_name(name)
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not on this machine")
    return found


def curl_vectors(url: str, model: str, texts: list[str]) -> list[list[float]]:
    """What curl gets as lists of floats."""
    command = [program("curl"), "-sS", "--fail-with-body", f"{url}/v1/embeddings", "--json", "@-"]
    body = json.dumps({"model": model, "input": texts})
    answer = subprocess.run(command, input=body, capture_output=True, text=True, timeout=60, check=True)
    return [item["embedding"] for item in json.loads(answer.stdout)["data"]]


def least_cosine(vectors: Any, expected: Any) -> float:
    found, wanted = np.asarray(vectors, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == wanted.shape
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    return float(((found * wanted).sum(axis=1) / norms).min())


def run_node(code: str, **given: Any) -> Any:
    """Runs an ES module among the packages of tests/clients/node; it finds `given` in GIVEN, and prints JSON last."""
    if not (NODE / "node_modules").is_dir():
        pytest.skip(f"tests/clients/node has no node_modules: {INSTALLS}")
    done = subprocess.run(
        [program("node"), "--input-type=module", "-"],
        input=code,
        cwd=NODE,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "GIVEN": json.dumps(given)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_script(name: str, **given: Any) -> Any:
    return run_node((NODE / name).read_text(encoding="utf-8"), **given)
