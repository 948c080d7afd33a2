"""The command line's root. Exit codes: 0 done, 1 failed, 2 wrong usage or settings."""

import sys

import typer
from rich.console import Console

from app.cli.bench import bench
from app.cli.contexts import contexts
from app.cli.embed import embed
from app.cli.evaluate import agreement, evaluate
from app.cli.keys import keys
from app.cli.serve import check_config, serve
from app.cli.verify import verify
from app.corpora import BadCorpus
from app.errors import ConfigError, ServiceError, StartupError, StoreError

app = typer.Typer(
    help="Contextual document embeddings behind OpenAI's embeddings API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(serve)
app.command()(embed)
app.command("eval")(evaluate)
app.command()(verify)
app.command()(agreement)
app.command("check-config")(check_config)
app.add_typer(bench, name="bench")
app.add_typer(contexts, name="contexts")
app.add_typer(keys, name="keys")


def main() -> None:
    """The console script."""
    try:
        app()
    except ConfigError as error:
        _fail(error, 2)
    except (StartupError, StoreError, ServiceError, BadCorpus, OSError) as error:
        _fail(error, 1)


def _fail(error: Exception, code: int) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", style="red", markup=False)
    sys.exit(code)
