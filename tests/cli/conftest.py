"""Commands run in the test's own process: what they change of it is put back."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from app.cli.main import app
from tests.own_logging import own_logging

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def logging_of_the_process() -> Iterator[None]:
    """A command logs to the stream that was its stderr, which is closed behind it."""
    with own_logging():
        yield


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return call
