"""`cde-server serve` and `check-config`."""

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from app.cli.draining import DrainingServer, listen
from app.cli.options import ConfigOption
from app.lifecycle import Server
from app.main import application
from app.preflight import check
from app.serving import allow_files
from app.settings import Settings
from app.settings_sources import find_vocabulary, load_settings
from app.telemetry.logs import configure_logging

log = logging.getLogger(__name__)


def serve(
    *,
    model: Annotated[
        list[str] | None, typer.Option(help="Hub id, folder, or builtin/minilm-context; once for each model")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch on the Hub")] = None,
    semantics: Annotated[str | None, typer.Option(help="training or hub")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, or int8 on a CPU")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on")] = None,
    port: Annotated[int | None, typer.Option(help="0: any free port")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder for everything that is kept")] = None,
    keys_file: Annotated[Path | None, typer.Option(help="TOML file of API keys")] = None,
    allow_unauthenticated: Annotated[
        bool | None, typer.Option("--allow-unauthenticated", help="Listen beyond loopback without keys")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error")] = None,
    config: ConfigOption = None,
) -> None:
    """Serve models over HTTP."""
    options = _given(revision=revision, semantics=semantics, dtype=dtype, device=device)
    if options and not model:
        raise typer.BadParameter(f"--{next(iter(options))} is about --model: name it too, or use the settings file")
    models = [{"name": name, **options} for name in model or []]
    server = _given(
        host=host,
        port=port,
        keys_file=keys_file,
        allow_unauthenticated=allow_unauthenticated,
        log_level=log_level,
    )
    overrides = _given(models=models or None, server=server or None, data_dir=data_dir)
    run(load_settings(overrides, config))


def check_config(config: ConfigOption = None) -> None:
    """Read and check the settings as `serve` would, and print them; no password is in what is printed."""
    settings = load_settings({}, config)
    check(settings)
    Console(soft_wrap=True).print_json(settings.model_dump_json())


def run(settings: Settings) -> None:
    """Serves until a signal comes. Raises what kept it from starting, or from going on."""
    configure_logging(settings.server.log_level, settings.server.log_format)
    failures: list[Exception] = []

    def failed(error: Exception) -> None:
        failures.append(error)
        server.end()

    if settings.token_ids == "cl100k_base" and not find_vocabulary():  # noqa: S105 - no password
        log.warning(
            "tiktoken's cl100k_base is not on this machine: clients that send token ids, as LangChain does, get a 400 "
            "unless it can be fetched when they do. `make` and the image bring it; else put it into TIKTOKEN_CACHE_DIR"
        )
    allow_files(settings.limits)
    lifecycle = Server(settings, failed)
    server = DrainingServer(application(lifecycle), lifecycle)
    server.run(listen(settings.server.host, settings.server.port))
    if failures:
        raise failures[0]
    if lifecycle.is_hanging:  # the interpreter would wait for that thread, or fall over it
        logging.shutdown()
        os._exit(0)


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}
