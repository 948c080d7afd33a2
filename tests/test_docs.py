"""README, changelog and CI say what the code does; README's own commands work as printed."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from app.settings_sources import load_settings
from tests.docs import error_rows, settings_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_lists_every_setting() -> None:
    assert "\n".join(settings_rows()) in README


def test_readme_lists_every_error() -> None:
    assert "\n".join(error_rows()) in README


def test_changelog_and_package_agree_on_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version
    assert f"cde-server:{version}" in (ROOT / "docker-compose.yml").read_text()


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in README
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec make test")


def test_the_example_settings_are_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = ROOT / "config" / "cde-server.example.toml"
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "keys.toml").touch()
    assert load_settings(config=example).models[0].name == "jxm/cde-small-v2"


def test_every_room_named_in_readme_is_there() -> None:
    rooms = re.findall(r"`(app/[a-z_/.]+)`", README)
    assert len(rooms) > 15
    assert [room for room in rooms if not (ROOT / room).exists()] == []


def _block(language: str, marker: str) -> str:
    found = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if marker in b]
    assert len(found) == 1
    return str(found[0])


def test_the_readmes_curl_works_as_printed(server: str) -> None:
    command = _block("sh", "/v1/embeddings").replace("http://127.0.0.1:8000", server)
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert '"embedding":[' in answer.stdout


def test_the_readmes_search_finds_the_right_pages(server: str) -> None:
    program = _block("python", "python-help").replace("http://127.0.0.1:8000", server)
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=True)
    assert answer.stdout.splitlines() == [
        "How do I slice a list? -> slicings",
        "What does the with statement do? -> with",
    ]


@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("contexts", "412 fingerprint_mismatch\n"),
        ("batches", "doc-0 384\ndoc-1 384\ndoc-2 384\n"),
    ],
)
def test_the_pages_examples_work_as_printed(server: str, page: str, printed: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program = code.replace("http://127.0.0.1:8000", server)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed
