"""Options several commands share."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ModelOption = Annotated[str, typer.Option("--model", help="Hub id, folder, or builtin/minilm-context")]
RevisionOption = Annotated[str | None, typer.Option(help="Commit, tag or branch on the Hub")]
SemanticsOption = Annotated[
    Literal["training", "hub"], typer.Option(help="What the weights were trained with, or the Hub's code")
]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "int8"],
    typer.Option(help="auto: bfloat16 on GPUs that have it, else float32"),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")]
SeedOption = Annotated[
    int,
    typer.Option(
        min=-(2**63), max=2**63 - 1, help="Which documents make the context, where there are more than it takes"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of a table")]
ConfigOption = Annotated[Path | None, typer.Option(help="Settings file (TOML); default config/cde-server.toml")]


def given_options(context: typer.Context) -> dict[str, str]:
    """What stands on the command line itself: parameter -> option."""
    options = {p.name: p.opts[0] for p in context.command.params if p.name}
    sources = {name: context.get_parameter_source(name) for name in options}
    return {name: options[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


messages = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
"""Without markup, here and below: names may hold brackets."""

WIDE = 240


def wide_console() -> Console:
    """stdout. A pipe has no width: nothing is cut there."""
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False, markup=False)


def progress() -> Progress:
    """A bar on stderr: what is piped from stdout stays clean."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=messages)
