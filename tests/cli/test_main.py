"""The root of the command line: commands are imported when they are asked for."""

import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from app.cli.main import COMMANDS, app


def _help(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_the_list_of_commands_says_of_it(name: str) -> None:
    line = COMMANDS[name][1].rstrip(".")
    assert line in _help()
    assert line in _help(name)


def test_the_version_is_that_of_the_package() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"cde-server {version('cde-server')}\n"


def test_a_typing_mistake_is_guessed() -> None:
    result = CliRunner().invoke(app, ["embd"])
    assert result.exit_code == 2
    assert "Did you mean 'embed'?" in result.output


@pytest.mark.parametrize("arguments", ["--help", "keys --help", "contexts create --help", "contexts check --help"])
def test_what_needs_no_torch_does_not_wait_for_it(arguments: str) -> None:
    program = (
        "import sys\nfrom app.cli import main\n"
        f"sys.argv[1:] = {arguments.split()}\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
