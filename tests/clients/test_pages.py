"""The examples of docs/clients run as printed, and their vectors are curl's."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients import pages
from tests.clients.helpers import LEAST_COSINE, curl_vectors, least_cosine, optional, program, run_node

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's packages warn as they like

ADDRESS = "http://127.0.0.1:8000"
# page -> what it needs beside the page's language
PYTHON = {
    "chroma": "chromadb",
    "haystack": "haystack",
    "langchain": "langchain_openai",
    "litellm": "litellm",
    "llama-index": "llama_index.embeddings.openai_like",
    "openai-python": "openai",
}
NODE = ["ai-sdk", "langchain-js", "openai-node"]


def in_python(code: str) -> Any:
    program = f"{code}\nimport json\nprint(json.dumps([model, texts, vectors]))\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def in_node(code: str) -> Any:
    return run_node(f"{code}\nconsole.log(JSON.stringify([model, texts, vectors]));\n")


def blocks(page: str, language: str, live: str) -> str:
    """All of the page's blocks in a language, as one program for the live server."""
    found = pages.examples(page, language)
    assert found
    return "".join(found).replace(ADDRESS, live)


def holds(live: str, printed: Any, request: pytest.FixtureRequest) -> None:
    model, texts, vectors = printed
    least = least_cosine(vectors, curl_vectors(live, model, texts))
    request.node.user_properties.append(("min_cosine", least))
    assert least > LEAST_COSINE


@pytest.mark.parametrize("page", PYTHON)
def test_python_pages(page: str, live: str, request: pytest.FixtureRequest) -> None:
    optional(PYTHON[page])
    holds(live, in_python(blocks(page, "python", live)), request)


@pytest.mark.parametrize("page", NODE)
def test_node_pages(page: str, live: str, request: pytest.FixtureRequest) -> None:
    holds(live, in_node(blocks(page, "js", live)), request)


def test_the_curl_page(live: str) -> None:
    found = [_data(command, live) for command in pages.examples("curl", "sh")]
    assert len(found) == 3
    for other in found[1:]:
        assert least_cosine(other, found[0]) > LEAST_COSINE


def _data(command: str, live: str) -> list[list[float]]:
    program("curl")
    shell = ["bash", "-c", command.replace(ADDRESS, live)]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=60, check=True)
    return [item["embedding"] for item in json.loads(done.stdout)["data"]]


def test_the_index_makes_the_context_and_lists_every_page(live: str) -> None:
    program("curl")
    command = pages.example("README", "sh").replace(ADDRESS, live).replace('"legal"', '"legal-of-the-page"')
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["status"] == "completed"
    assert httpx.get(f"{live}/v1/contexts/legal-of-the-page").is_success
    assert sorted(re.findall(r"\]\(([a-z-]+)\.md\)", pages.text("README"))) == pages.PAGES
    assert sorted([*PYTHON, *NODE, "curl"]) == pages.PAGES


def test_links_lead_somewhere() -> None:
    for page in [*pages.PAGES, "README"]:
        for link in re.findall(r"\]\(([^)#]+)", pages.text(page)):
            assert (pages.FOLDER / Path(link)).exists(), f"{page}: {link}"
