"""`cde-server bench`: the forward against a plain one, and load on a running server."""

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import orjson
import torch
import typer
from rich.table import Column, Table

from app.bench.compute import VARIANTS, Comparison, Row
from app.bench.gpu import GPU_VARIANTS, GpuComparison, GpuRow
from app.bench.http import Load, Outcome, closed_loop, open_loop
from app.bench.models import Checkpoint, random_checkpoint, read_checkpoint
from app.cli.client import LOCAL, KeyOption, UrlOption, address, bearer
from app.cli.options import JsonOption, RevisionOption, given_options, messages, wide_console
from app.models.loading import BUILTIN, LoadOptions, check_device

bench = typer.Typer(help="Speed, measured: of the forward, with `gpu` on one, or with `http` of a running server.")

RandomOption = Annotated[
    Literal["v1", "v2"] | None, typer.Option("--random", help="A model of true size with random weights")
]
CheckpointOption = Annotated[str | None, typer.Option("--model", help="A checkpoint instead: Hub id or folder")]
LengthsOption = Annotated[str, typer.Option("--lengths", help="Tokens of a text")]
MixedOption = Annotated[bool, typer.Option("--mixed", help="Also a stream of mixed lengths")]
FirstStageOption = Annotated[bool, typer.Option("--first-stage", help="Also the first stage")]
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="Runs of each variant; the median counts")]

MAX_TOKENS = 512
"""Of a text, as both models take it."""


@bench.callback(invoke_without_command=True)
def compute(
    context: typer.Context,
    *,
    random: RandomOption = None,
    model: CheckpointOption = None,
    revision: RevisionOption = None,
    lengths: LengthsOption = "8,32,128,512",
    variants: Annotated[str, typer.Option(help=f"Of {', '.join(VARIANTS)}")] = "reference,float32,bfloat16",
    mixed: MixedOption = False,
    first_stage: FirstStageOption = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each forward")] = 1,
    rounds: RoundsOption = 5,
    as_json: JsonOption = False,
) -> None:
    """Compare variants of the forward in one process: CPU time, medians, ratios to the reference."""
    if context.invoked_subcommand is not None:
        _nothing_given(context)
        return
    wanted, tokens = _variants(variants, VARIANTS), _numbers(lengths, "--lengths", most=MAX_TOKENS)
    torch.set_num_threads(threads)
    comparison = Comparison(_checkpoint(random, model, revision), wanted, rounds=rounds)
    rows: list[Row] = []
    for n in tokens:
        messages.print(f"measuring texts of {n} tokens")
        rows += comparison.second_stage(n)
    rows += comparison.mixed() if mixed else []
    rows += comparison.first_stage() if first_stage else []
    _show(comparison.machine, rows, _table(rows), as_json=as_json)


@bench.command()
def gpu(
    *,
    random: RandomOption = None,
    model: CheckpointOption = None,
    revision: RevisionOption = None,
    lengths: LengthsOption = "8,32,128,512",
    batches: Annotated[str, typer.Option(help="Texts of a batch")] = "1,4,16,64",
    variants: Annotated[str, typer.Option(help=f"Of {', '.join(GPU_VARIANTS)}")] = "reference,bfloat16",
    mixed: MixedOption = False,
    first_stage: FirstStageOption = False,
    device: Annotated[str, typer.Option(help="cuda, or cuda:1")] = "cuda",
    rounds: RoundsOption = 5,
    as_json: JsonOption = False,
) -> None:
    """Compare variants of the forward on a GPU: time until the device is done, by texts of a batch."""
    wanted, tokens = _variants(variants, GPU_VARIANTS), _numbers(lengths, "--lengths", most=MAX_TOKENS)
    sizes = _numbers(batches, "--batches")
    check_device(device)
    found = LoadOptions(device=device).resolved_device()
    comparison = GpuComparison(_checkpoint(random, model, revision), wanted, device=found, rounds=rounds)
    rows: list[GpuRow] = []
    for batch in sizes:
        for n in tokens:
            messages.print(f"measuring {batch} texts of {n} tokens")
            rows += comparison.second_stage(n, batch)
        rows += comparison.mixed(batch) if mixed else []
        rows += comparison.first_stage(batch) if first_stage else []
    _show(comparison.machine, rows, _gpu_table(rows), as_json=as_json)


def _checkpoint(random: Literal["v1", "v2"] | None, model: str | None, revision: str | None) -> Checkpoint:
    if (random is None) == (model is None):
        raise typer.BadParameter("give one of --random and --model")
    if model == BUILTIN:
        raise typer.BadParameter(f"{BUILTIN} is no checkpoint: name one of a CDE model, as a Hub id or a folder")
    return random_checkpoint(random) if random else read_checkpoint(str(model), revision)


def _variants(given: str, known: Sequence[str]) -> list[str]:
    wanted = given.split(",")
    if not set(wanted) <= set(known):
        raise typer.BadParameter(f"variants are {', '.join(known)}")
    return wanted


def _numbers(given: str, option: str, *, most: int = sys.maxsize) -> list[int]:
    try:
        numbers = [int(number) for number in given.split(",")]
    except ValueError:
        numbers = [0]
    if not all(1 <= number <= most for number in numbers):
        upwards = "1 upwards" if most == sys.maxsize else f"1 to {most}"
        raise typer.BadParameter(f"{given!r}: whole numbers from {upwards} are expected, like 8,32", param_hint=option)
    return numbers


def _nothing_given(context: typer.Context) -> None:
    """Options before `gpu` or `http` would be passed over. Raises typer.BadParameter."""
    if given_options(context):
        raise typer.BadParameter(f"options of {context.invoked_subcommand} stand behind its name")


def _show(machine: dict[str, Any], rows: Sequence[Row | GpuRow], table: Table, *, as_json: bool) -> None:
    if as_json:
        typer.echo(orjson.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}).decode())
    else:
        console = wide_console()
        console.print(machine)
        console.print(table)


def _table(rows: list[Row]) -> Table:
    table = Table("model", "n", "variant", "CPU ms/text", "ratio", "max |d|", "1 - cos", "of the bound")
    for row in rows:
        table.add_row(
            row.model,
            str(row.n),
            row.variant,
            f"{row.cpu_ms_per_text:.1f}",
            _shown(row.ratio, ".2f"),
            _shown(row.max_abs_diff, ".1e"),
            _shown(row.one_minus_cos, ".1e"),
            _shown(row.bound_fraction, ".0%"),
        )
    return table


def _gpu_table(rows: list[GpuRow]) -> Table:
    columns = ("model", "n", "texts", Column("variant", no_wrap=True), "ms/text", "ratio", "1 - cos", "bound")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(
            row.model,
            str(row.n),
            str(row.batch),
            row.variant,
            f"{row.ms_per_text:.3f}",
            _shown(row.ratio, ".2f"),
            _shown(row.one_minus_cos, ".1e"),
            _shown(row.bound_fraction, ".0%"),
        )
    return table


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


@bench.command()
def http(
    context: typer.Context,
    *,
    url: UrlOption = LOCAL,
    api_key: KeyOption = None,
    model: Annotated[str, typer.Option(help="MODEL[@CONTEXT][:INPUT_TYPE]")] = "minilm-context",
    seconds: Annotated[float, typer.Option(min=0.1, help="How long")] = 20.0,
    clients: Annotated[int, typer.Option(min=1, help="Closed loop: how many ask at once")] = 8,
    rate: Annotated[float | None, typer.Option(min=0.01, help="Open loop instead: requests a second")] = None,
    texts: Annotated[int, typer.Option(min=1, help="Texts of a request")] = 1,
    words: Annotated[int, typer.Option(min=1, help="Words of a text, about")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Load on a running server: texts a second and latencies. Exit code 1: nothing was answered."""
    if rate is not None and "clients" in given_options(context):
        raise typer.BadParameter("--clients ask as fast as they are answered, --rate does not wait: name one")
    load = Load(address(url), model, bearer(api_key), texts, words)
    run = (
        closed_loop(load, clients=clients, seconds=seconds)
        if rate is None
        else open_loop(load, rate=rate, seconds=seconds)
    )
    outcome = asyncio.run(run)
    report = _report(outcome)
    if as_json:
        typer.echo(orjson.dumps(report).decode())
    else:
        table = Table("", "")
        for name, value in report.items():
            table.add_row(name, str(value))
        wide_console().print(table)
    if not outcome.latencies:
        messages.print(f"error: nothing was answered by {load.url}: {outcome.said}", style="red")
        raise typer.Exit(1)


def _report(outcome: Outcome) -> dict[str, float | dict[str, int]]:
    return {
        "answered": len(outcome.latencies),
        "refused": {str(status): number for status, number in outcome.refused.items()},
        "texts_per_second": round(outcome.texts_per_second, 2),
        "p50_ms": round(outcome.percentile(50), 1),
        "p95_ms": round(outcome.percentile(95), 1),
        "p99_ms": round(outcome.percentile(99), 1),
    }
