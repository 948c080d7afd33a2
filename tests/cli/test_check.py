"""`cde-server contexts check`, beside a running server and over a damaged store."""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from app.cli.main import app
from tests.conftest import ANIMALS, BUILTIN, COOKING
from tests.live import V1, live_server


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data folder of a server that runs: contexts of two families, chosen in each way."""
    folder = tmp_path_factory.mktemp("check")
    with live_server(folder, (BUILTIN, V1), contexts={"keep_documents": True}) as url:
        for model in (BUILTIN, V1):
            for name, method in (("a", "random"), ("b", "diverse")):
                body = {
                    "name": name,
                    "documents": [*ANIMALS, *COOKING],
                    "model": model,
                    "selection": {"method": method},
                }
                httpx.post(f"{url}/v1/contexts", json=body).raise_for_status()
        yield folder


def check(folder: Path, *options: str) -> Result:
    config = folder / "settings.toml"
    config.write_text(f'data_dir = "{folder}"\n')
    return CliRunner().invoke(app, ["contexts", "check", "--config", str(config), *options])


def test_nothing_is_wrong(store: Path) -> None:
    result = check(store, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == {
        "ok": True,
        "checked": {"versions": 6, "names": 6, "arrays": 5, "files": 0, "batches": 0},
        "findings": [],
    }
    assert "nothing found" in check(store).stderr


def test_what_is_wrong_is_said_with_what_to_do(store: Path) -> None:
    with sqlite3.connect(store / "contexts.sqlite3") as raw:
        (hurt,) = raw.execute("SELECT id FROM versions WHERE name = 'a' AND model = ?", (V1,)).fetchone()
        raw.execute("UPDATE payloads SET data = zeroblob(length(data)) WHERE id = ?", (hurt,))
    raw.close()
    result = check(store)
    assert result.exit_code == 1
    for words in (hurt, f"a.1 of {V1}", "checksum", "create it again"):
        assert words in result.stdout
    found = json.loads(check(store, "--json").stdout)
    assert (found["ok"], len(found["findings"])) == (False, 1)


def test_where_there_is_no_store(tmp_path: Path) -> None:
    result = check(tmp_path)
    assert result.exit_code == 1
    assert "no context store" in str(result.exception)
    assert not (tmp_path / "contexts.sqlite3").exists()
