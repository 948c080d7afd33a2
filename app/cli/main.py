"""The command line's root. Exit codes: 0 done, 1 failed, 2 wrong usage or settings."""

import atexit
import gc
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from app.corpora import BadCorpus
from app.errors import ConfigError, ServiceError, StartupError, StoreError

# Where each command is, and its line in the help. Most need torch, which takes seconds to import.
COMMANDS = {
    "serve": ("serve:serve", "Serve models over HTTP."),
    "embed": ("embed:embed", "Embed texts. A run that was cut short goes on where it stopped."),
    "eval": ("evaluate:evaluate", "nDCG@10 and Recall@100 without, with its own, and with a foreign context."),
    "verify": ("verify:verify", "Hold vectors against known ones; exit 1 where they differ."),
    "agreement": ("evaluate:agreement", "Exact against frozen context attention on your own texts."),
    "check-config": ("serve:check_config", "Read and check the settings as `serve` would, and print them."),
    "bench": ("bench:bench", "Speed, measured: of the forward, with `gpu` on one, or with `http` of a running server."),
    "contexts": ("contexts:contexts", "Contexts of a running server; check: the store it keeps them in."),
    "keys": ("keys:keys", "API keys."),
}


class _Root(TyperGroup):
    """Imports the command that was asked for, and no other."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else _imported(name), rest


def _imported(name: str) -> Any:
    module, _, attribute = COMMANDS[name][0].partition(":")
    found = getattr(import_module(f"app.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        return typer.main.get_group(found)
    single = typer.Typer(add_completion=False)
    single.command(name)(found)
    return typer.main.get_command(single)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cde-server {version('cde-server')}")
        raise typer.Exit


def _listed() -> None:
    """Stands in the help for a command that is not imported yet."""


app = typer.Typer(
    cls=_Root,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _name, (_, _line) in COMMANDS.items():
    app.command(_name, help=_line)(_listed)


@app.callback()
def _options(
    *, _: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print it.")] = False
) -> None:
    """Contextual document embeddings behind OpenAI's embeddings API."""


def main() -> None:
    """The console script."""
    # At its end the interpreter looks for what is garbage among all that torch has brought: half a second and more.
    atexit.register(gc.freeze)
    try:
        app()
    except ConfigError as error:
        _fail(error, 2)
    except (StartupError, StoreError, ServiceError, BadCorpus, OSError) as error:
        _fail(error, 1)


def _fail(error: Exception, code: int) -> None:
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", style="red", markup=False)
    sys.exit(code)
