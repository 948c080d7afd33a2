"""curl: the answer everyone else is held to, and how it shows errors."""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.clients.helpers import KEY, MODEL, TEXTS, TOO_LONG, UNKNOWN, curl_vectors, least_cosine, program
from tests.clients.refusing import Refusing
from tests.live import V1


def curl(*arguments: str, body: Any = None) -> subprocess.CompletedProcess[str]:
    command = [program("curl"), "-sS", *arguments]
    if body is not None:
        command += ["-H", "Content-Type: application/json", "-d", "@-"]
    given = json.dumps(body) if body is not None else None
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=60, check=False)


def test_vectors_have_length_one_and_equal_texts_equal_vectors(by_curl: list[list[float]]) -> None:
    assert np.allclose(np.linalg.norm(by_curl, axis=1), 1, atol=1e-5)
    assert by_curl[0] == by_curl[-1]


def test_the_context_matters(live: str, by_curl: list[list[float]]) -> None:
    assert least_cosine(curl_vectors(live, "minilm-context", TEXTS), by_curl) < 0.99


def test_field_and_header_name_the_same_context(base: str, agrees: Callable[[Any], None]) -> None:
    url = f"{base}/embeddings"
    fields = {"model": "minilm-context", "input": TEXTS, "context": "legal", "input_type": "query"}
    header = ("-H", "X-Context: legal", "-H", "X-Input-Type: query")
    for answer in (curl(url, body=fields), curl(*header, url, body={"model": "minilm-context", "input": TEXTS})):
        agrees([item["embedding"] for item in json.loads(answer.stdout)["data"]])


def test_a_body_over_a_mebibyte(base: str, live: str) -> None:
    texts = ["The owl sleeps in the barn." + " " * 6_000] * 200  # curl asks for leave (100-continue) first
    assert len(curl_vectors(live, MODEL, texts)) == len(texts)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": UNKNOWN, "input": "x"}, 404, "model_not_found"),
        ({"model": MODEL, "input": ""}, 400, None),
        ({"model": MODEL, "input": TOO_LONG}, 400, "context_length_exceeded"),
    ],
)
def test_errors(base: str, body: Any, status: int, code: str | None) -> None:
    answer = curl("--fail-with-body", "-w", "\n%{http_code}", f"{base}/embeddings", body=body)
    content, _, found = answer.stdout.rpartition("\n")
    assert (answer.returncode, int(found)) == (22, status)
    assert json.loads(content)["error"]["code"] == code


def test_keys(locked: str) -> None:
    body = {"model": V1, "input": "x"}
    assert "embedding" in curl("-H", f"Authorization: Bearer {KEY}", f"{locked}/embeddings", body=body).stdout
    assert json.loads(curl(f"{locked}/embeddings", body=body).stdout)["error"]["code"] == "invalid_api_key"


def test_retries(refusing: Refusing) -> None:
    answer = curl("--fail", "--retry", "3", f"{refusing.base}/embeddings", body={"model": MODEL, "input": "x"})
    assert answer.returncode == 0
    assert refusing.requests == 2
