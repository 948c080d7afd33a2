"""`python -m tests.load overload|scheduling|disconnects|soak`: a server of its own, load on it, a table at the end.

Exits with 1 where a promise was not kept.
"""

import asyncio
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tests.conftest import BUILTIN
from tests.load import disconnects as leaving
from tests.load import overload as overloading
from tests.load import scheduling as planning
from tests.load import soak as lasting
from tests.load.checkpoints import write_v1
from tests.load.report import show, write
from tests.load.server import LoadServer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Model = Annotated[str, typer.Option(help="A name as in the settings, or v1 for random weights of true size")]
Seconds = Annotated[float, typer.Option(help="Of load")]
Seed = Annotated[int, typer.Option(help="Of arrivals, sizes and texts")]
Json = Annotated[Path | None, typer.Option(help="Where to write the figures")]


@app.command()
def overload(*, model: Model = BUILTIN, seconds: Seconds = 60, seed: Seed = 0, json: Json = None) -> None:
    """Four times as much as the server can compute."""
    with _serving(model, overloading.SETTINGS) as server:
        seen = asyncio.run(overloading.run(server, overloading.Plan(seconds=seconds, seed=seed)))
    write(json, seen.summary())
    raise typer.Exit(not show(f"Overload for {seconds:.0f} s, {model}", seen.lines()))


@app.command()
def scheduling(
    *,
    model: Model = BUILTIN,
    seconds: Seconds = 20,
    rounds: Annotated[int, typer.Option(help="Of three phases")] = 3,
    bulk: Annotated[tuple[int, int], typer.Option(help="Texts of a bulk request, from and to")] = (64, 256),
    clients: Annotated[int, typer.Option(help="With bulk")] = 3,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Few texts beside many."""
    plan = planning.Plan(seconds=seconds, rounds=rounds, bulk_texts=bulk, bulk_clients=clients, seed=seed)
    with _serving(model, planning.SETTINGS) as server:
        seen = asyncio.run(planning.run(server, plan))
    write(json, seen.summary())
    raise typer.Exit(not show(f"{rounds} rounds of three phases of {seconds:.0f} s, {model}", seen.lines()))


@app.command()
def disconnects(
    *,
    model: Model = BUILTIN,
    clients: Annotated[int, typer.Option(help="That leave")] = 1000,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Clients that go away at random moments."""
    with _serving(model, leaving.SETTINGS) as server:
        seen = asyncio.run(leaving.run(server, leaving.Plan(clients=clients, seed=seed)))
    write(json, seen.summary())
    raise typer.Exit(not show(f"{clients} clients that go away, {model}", seen.lines()))


@app.command()
def soak(
    *,
    model: Model = BUILTIN,
    minutes: Annotated[float, typer.Option(help="Of load, behind the warm-up")] = 30,
    load: Annotated[float, typer.Option(help="Of what the server can compute")] = 0.7,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """A long time at a load that it can bear."""
    with _serving(model, lasting.SETTINGS) as server:
        seen = asyncio.run(lasting.run(server, lasting.Plan(seconds=60 * minutes, load=load, seed=seed)))
    write(json, seen.summary())
    raise typer.Exit(not show(f"{minutes:g} minutes at {100 * load:.0f} % of capacity, {model}", seen.lines()))


@contextmanager
def _serving(model: str, settings: dict[str, str]) -> Iterator[LoadServer]:
    with tempfile.TemporaryDirectory() as folder:
        options = []
        if model == "v1":
            model, options = write_v1(Path(folder) / "v1"), ["--dtype", "bfloat16"]
        with LoadServer(Path(folder), model, *options, **settings) as server:
            yield server


if __name__ == "__main__":
    logging.getLogger("httpx").setLevel("WARNING")
    app()
