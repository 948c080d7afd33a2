"""Where settings come from. The only reader of the environment and of `config/`.

Layers, later wins: defaults < a TOML file < environment (`CDE__LIMITS__MAX_INPUTS=64`) < command line.
"""

import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from app.errors import ConfigError
from app.settings import Settings

CONFIG_FILE = Path("config/cde-server.toml")
CONFIG_VARIABLE = "CDE_CONFIG"
PREFIX = "CDE__"
VOCABULARY = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
"""cl100k_base in tiktoken's cache, whose names are SHA-1 of the addresses files come from."""


def load_settings(overrides: Mapping[str, Any] | None = None, config: Path | None = None) -> Settings:
    """The settings of this process. `overrides`: the command line's, nested like the tree.

    `config`: a TOML file; else the one CDE_CONFIG names; else config/cde-server.toml where there is one.
    Raises ConfigError with one line for each thing that is wrong.
    """
    named = config or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    if named and not named.is_file():
        raise ConfigError(f"The settings file {named} {'is not a file' if named.exists() else 'does not exist'}")
    _check_variables()

    class Layered(Settings, BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix=PREFIX, env_nested_delimiter="__", nested_model_default_partial_update=True
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            del dotenv_settings, file_secret_settings
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=named or CONFIG_FILE)

    try:
        return Layered(**(overrides or {}))
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error))) from error
    except SettingsError as error:
        raise ConfigError(_not_json(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"The settings file {named or CONFIG_FILE} cannot be read: {error}") from error


def without_settings() -> dict[str, str]:
    """The environment for a program that is not ours: without settings, and so without the keys and passwords there."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("CDE_")}


def find_vocabulary() -> bool:
    """Whether tiktoken has cl100k_base without a download. Shows it what `make` put beside the interpreter, unless
    another folder is named."""
    named = [os.environ[name] for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR") if name in os.environ]
    beside = Path(sys.prefix) / "share" / "tiktoken"
    if not named and (beside / VOCABULARY).is_file():
        named = [os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(beside))]
    return Path(*named[:1] or (tempfile.gettempdir(), "data-gym-cache"), VOCABULARY).is_file()


def _check_variables() -> None:
    """A group that does not exist would be passed over in silence; a setting in a group would not."""
    for variable in os.environ:
        name = variable.lower()
        path = name.removeprefix("cde_").removeprefix("_")
        group = path.partition("__")[0]
        if name.startswith(PREFIX.lower()) and group not in Settings.model_fields:
            raise ConfigError(
                f"{variable}: there is no setting {group!r}; there are {', '.join(Settings.model_fields)}"
            )
        if name == f"cde_{path}" and group in Settings.model_fields:
            raise ConfigError(f"{variable} is no setting: write {PREFIX}{path.upper()}, with two underscores")


def _not_json(error: SettingsError) -> str:
    group = re.search(r'field "(\w+)"', str(error))
    where = f"{PREFIX}{group[1].upper()}" if group else PREFIX
    return f'{where}, or one that begins so, is not JSON: lists and groups are, like ["a", "b"]'


def _lines(error: ValidationError) -> list[str]:
    """What holds something wrong is not wrong itself: a list that is too short without its wrong items."""
    problems = error.errors()
    places = [problem["loc"] for problem in problems]
    return [
        _line(p) for p in problems if not any(len(x) > len(p["loc"]) and x[: len(p["loc"])] == p["loc"] for x in places)
    ]


def _line(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such setting"
    return f"{where}: {error['msg']}" if where else str(error["msg"]).removeprefix("Value error, ")
