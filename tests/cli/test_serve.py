"""`serve` and `check-config`: what keeps the process from starting is one readable message, before the port opens."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.cli.draining import listen
from app.cli.main import main
from app.errors import StartupError
from app.references import write
from app.selfcheck import FIRST, SECOND, key_of
from tests.live import GOLDENS, V1
from tests.models.conftest import load_golden

Told = Callable[..., tuple[int, str]]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Told:
    """Runs a command that must fail: its exit code, and the lines of its message."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["cde-server", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        output = capfd.readouterr().err
        assert "Traceback" not in output
        return int(str(stopped.value.code)), output

    return call


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"models": [{"name": "a/b"}, {"name": "c/d", "aliases": ["b"]}]}, "Several models are called b"),
    ({"models": [{"name": "nowhere"}]}, "models[0]: 'nowhere' is neither a folder nor a Hub id"),
    ({"models": [{"device": "graphics"}]}, "models[0]: device 'graphics' is none"),
    ({"models": [{"device": "meta"}]}, "models[0]: device 'meta' is not supported"),
    ({"models": [{}, {"name": "a/b", "device": "cuda:93"}]}, "models[1]: device 'cuda:93' asked for"),
    ({"engine": {"devices": ["cpu", "cuda:93"]}}, "device 'cuda:93' asked for"),
    ({"models": [{"context_attention": "frozen"}]}, "no context rows to freeze"),
    ({"models": [{"dtype": "int8"}]}, "has no int8"),
    ({"models": [{"dtype": "float16"}]}, "models.0.dtype: Input should be"),
    ({"contexts": {"default": "My Context"}}, "contexts.default 'My Context'"),
    ({"contexts": {"database_url": "hunter2:hunter2"}}, "contexts.database_url cannot be used"),
    ({"contexts": {"database_url": "postgresql://u:hunter2@h:port/d"}}, "contexts.database_url cannot be used"),
    ({"contexts": {"database_url": "mysql://u:hunter2@h/d"}}, "contexts.database_url cannot be used"),
    ({"contexts": {"database_url": "postgresql+asyncpg://u:hunter2@h/d"}}, "contexts.database_url cannot be used"),
    ({"data_dir": "settings.toml/data"}, "data_dir settings.toml/data: settings.toml is no folder"),
    ({"data_dir": "settings.toml"}, "settings.toml is no folder"),
    ({"server": {"keys_file": "settings.toml"}}, "settings.toml: keys: Field required"),
    ({"server": {"keys_file": "/etc"}}, "server.keys_file /etc is not a file"),
    ({"server": {"drain_seconds": -1}}, "server.drain_seconds"),
    ({"server": {"prot": 80}}, "server.prot: there is no such setting"),
]


@pytest.mark.parametrize(("settings", "words"), SETTINGS, ids=[words for _, words in SETTINGS])
def test_wrong_settings(told: Told, tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    (tmp_path / "settings.toml").write_text(_toml(settings))
    code, message = told("check-config", "--config", "settings.toml")
    assert code == 2
    assert message.startswith("error: ")
    assert words in message
    assert "hunter2" not in message
    assert message.count("\n") == 1
    assert told("serve", "--config", "settings.toml", "--port", "0") == (code, message)


def _toml(tree: dict[str, Any]) -> str:
    """Enough of TOML: JSON's values are its own, but for the braces of tables."""
    lines = []
    for name, value in tree.items():
        if isinstance(value, dict):
            lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in value.items())]
        elif name == "models":
            for model in value:
                lines += ["[[models]]", *(f"{k} = {json.dumps(v)}" for k, v in model.items())]
        else:
            lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"truncate = ", "settings.toml cannot be read: Invalid value"),
        (b"truncate = '\xff'", "settings.toml cannot be read: 'utf-8' codec"),
        (b"[server]\nport = 1\nport = 2", "settings.toml cannot be read: Cannot overwrite a value"),
    ],
)
def test_a_settings_file_that_is_no_toml(told: Told, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "settings.toml").write_bytes(content)
    code, message = told("serve", "--config", "settings.toml")
    assert code == 2
    assert words in message


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("CDE__MODELS", "[{hunter2", "CDE__MODELS, or one that begins so, is not JSON"),
        ("CDE__SERVER__CORS_ORIGINS", "hunter2", "CDE__SERVER, or one that begins so, is not JSON"),
        ("CDE__SERVERS__PORT", "1", "CDE__SERVERS__PORT: there is no setting 'servers'"),
        ("cde__port", "1", "cde__port: there is no setting 'port'"),
        ("CDE__SERVER__PROT", "1", "server.prot: there is no such setting"),
        ("CDE__SERVER__PORT", "hunter2", "server.port: Input should be a valid integer"),
    ],
)
def test_wrong_variables(told: Told, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str) -> None:
    monkeypatch.setenv(variable, value)
    code, message = told("check-config")
    assert code == 2
    assert words in message
    assert "hunter2" not in message


def test_check_config_shows_what_came_out_and_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDE__CONTEXTS__DATABASE_URL", "postgresql://me:hunter2@db/contexts")
    monkeypatch.setenv("CDE__MODELS", '[{"name": "jxm/cde-small-v2"}]')
    monkeypatch.setattr("sys.argv", ["cde-server", "check-config"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    out = capfd.readouterr().out
    assert json.loads(out)["models"][0]["name"] == "jxm/cde-small-v2"
    assert "hunter2" not in out
    assert not any(tmp_path.iterdir())  # looked only


def test_a_port_that_is_taken(told: Told, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, message = told("serve", "--model", GOLDENS / V1, "--data-dir", tmp_path / "data", "--port", str(port))
    assert code == 1
    assert message.startswith(f"error: The server cannot listen on 127.0.0.1, port {port}: Address already in use")
    assert not (tmp_path / "data").exists()


def test_a_host_of_another_machine() -> None:
    with pytest.raises(StartupError, match="Cannot assign"):
        listen("203.0.113.1", 0)


def test_a_name_with_several_addresses() -> None:
    """As `localhost`: one socket an address; one whose family is off here is left out."""
    sockets = listen("localhost", 0)
    try:
        assert sockets
        assert {s.getsockname()[0] for s in sockets} <= {"127.0.0.1", "::1"}
    finally:
        for each in sockets:
            each.close()


def test_a_self_check_that_fails_ends_the_process(told: Told, tmp_path: Path) -> None:
    spec = load_golden(V1).model.spec
    path = tmp_path / "data" / "selfcheck" / f"{key_of(spec)}.safetensors"
    shapes = {FIRST: (2, 64), SECOND: (2, 64)}
    write(path, {name: np.ones(shape, np.float32) for name, shape in shapes.items()}, spec)
    code, message = told("serve", "--model", GOLDENS / V1, "--data-dir", tmp_path / "data", "--port", "0")
    assert code == 1
    (line,) = (line for line in message.splitlines() if "self-check" in line)
    assert line.startswith("error: The self-check of v1-tiny-c16 (float32 on cpu) failed")
    assert str(path) in line
