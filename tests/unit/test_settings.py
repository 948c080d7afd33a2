"""Layers: defaults < file < environment < command line; cross-checks; readable complaints."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.errors import ConfigError
from app.settings import Settings
from app.settings_sources import VOCABULARY, find_vocabulary, load_settings


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_later_layers_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('truncate = "end"\n[limits]\nmax_inputs = 10\nmax_body_bytes = 1000\nqueue_tokens = 99\n')
    monkeypatch.setenv("CDE__LIMITS__MAX_BODY_BYTES", "2000")
    monkeypatch.setenv("CDE__LIMITS__QUEUE_TOKENS", "98")
    settings = load_settings({"limits": {"queue_tokens": 97}}, file)
    assert settings.truncate == "end"
    assert settings.limits.max_inputs == 10
    assert settings.limits.max_body_bytes == 2000
    assert settings.limits.queue_tokens == 97
    assert settings.limits.max_line_bytes == Settings().limits.max_line_bytes


def test_the_usual_file_is_read_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "cde-server.toml").write_text('token_ids = "reject"\n')
    assert load_settings().token_ids == "reject"


def test_models_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDE__MODELS", '[{"name": "jxm/cde-small-v2", "semantics": "hub"}]')
    assert load_settings().models[0].semantics == "hub"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"server": {"host": "0.0.0.0"}}, "no keys are set"),
        ({"server": {"keys_file": "nowhere.toml"}}, "does not exist"),
        ({"limits": {"max_inputs": 0}}, "limits.max_inputs"),
        ({"limits": {"max_body_bytes": 1000, "max_line_bytes": 1000, "max_body_bytes_in_flight": 1999}}, "than twice"),
        ({"limit": {}}, "limit: "),
        ({"models": []}, "models"),
        ({"truncate": "middle"}, "truncate"),
    ],
)
def test_what_is_wrong_is_named(overrides: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_settings(overrides)


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("CDE__SERVR__PORT", "there is no setting 'servr'"),
        ("CDE_SERVER__PORT", "CDE_SERVER__PORT is no setting: write CDE__SERVER__PORT"),
        ("CDE_TRUNCATE", "write CDE__TRUNCATE"),
    ],
)
def test_a_variable_that_nearly_is_a_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, words: str
) -> None:
    monkeypatch.setenv("CDE_SERVER_PORT", "tcp://10.0.0.7:8000")  # Kubernetes, for a Service called cde-server
    load_settings()
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigError, match=words):
        load_settings()


def test_the_vocabulary_that_came_with_the_installation_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.prefix", str(tmp_path / "venv"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.environ", {})
    assert not find_vocabulary()
    beside = tmp_path / "venv" / "share" / "tiktoken"
    for folder in (beside, tmp_path / "own"):
        folder.mkdir(parents=True)
        (folder / VOCABULARY).touch()
    assert find_vocabulary()
    assert os.environ == {"TIKTOKEN_CACHE_DIR": str(beside)}
    for folder, there in ((tmp_path / "own", True), (tmp_path / "nowhere", False)):
        os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
        assert find_vocabulary() is there, "another folder that is named is where tiktoken looks"


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_settings(config=tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("truncate = ")
    with pytest.raises(ConfigError, match=r"."):
        load_settings(config=broken)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().truncate = "end"  # type: ignore[misc]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert load_settings({"server": {"host": host}}).server.host == host


def test_allowed_without_keys_when_told() -> None:
    assert load_settings({"server": {"host": "0.0.0.0", "allow_unauthenticated": True}}).server.host == "0.0.0.0"


def test_the_engine_fits_the_device_unless_told() -> None:
    engine = Settings().engine
    assert (engine.workers_on("cuda:0"), engine.batch_tokens_on("cuda:0")) == (2, 16_384)
    assert load_settings({"engine": {"devices": ["cuda:0", "cuda:1", "cuda:2"]}}).engine.workers_on("cuda:0") == 6
    assert engine.workers_on("cpu") >= 1
    told = load_settings({"engine": {"workers": 3, "batch_tokens": 7}}).engine
    assert (told.workers_on("cpu"), told.workers_on("cuda"), told.batch_tokens_on("cpu")) == (3, 3, 7)
