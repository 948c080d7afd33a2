"""`python -m tests.fuzz --requests 100000`: a real server process against all kinds of bad input, and a table of it."""

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tests.fuzz.bombs import half_requests, one_by_one, together, unread_answers
from tests.fuzz.runs import KINDS, Tally, run
from tests.fuzz.target import Target, running

BODY = 64 * 2**20
WARM_UP = 0.2
"""Of all requests; memory is expected to stay where it is from then on."""


def main(
    requests: Annotated[int, typer.Option(help="Of all kinds together")] = 100_000,
    seed: Annotated[int, typer.Option(help="Another one, other requests")] = 0,
    bombs: Annotated[bool, typer.Option(help="Also the greatest bodies, with the memory each takes")] = True,
) -> None:
    warnings.simplefilter("ignore")  # hypothesis's and schemathesis's own
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        with running(Path(folder)) as target:
            _fuzz(console, target, requests, seed)
        if bombs:
            with running(Path(folder), LIMITS__STALL_SECONDS=2) as target:
                _bombs(console, target)


def _fuzz(console: Console, target: Target, requests: int, seed: int) -> None:
    files, memory = target.files(), [target.resident()]
    tallies = []
    for kind, (_, share) in KINDS.items():  # a first round of each kind warms up, the others are measured
        tallies.append(run(target.url, kind, round(WARM_UP * share * requests), seed, lambda: None))
    memory.append(target.resident())
    for kind, (_, share) in KINDS.items():
        rest = round((1 - WARM_UP) * share * requests)
        tallies.append(run(target.url, kind, rest, seed + 10**6, lambda: memory.append(target.resident())))
    console.print(_tallies(tallies))
    start, warm, *later = memory
    console.print(
        f"Resident MiB: {start:.0f} at start, {warm:.0f} after {WARM_UP:.0%} of the requests, from then on at most "
        f"{max(later):.0f}, {later[-1]:.0f} in the end. Open files: {files} at start, {target.files()} in the end."
    )
    _no_faults(target)


def _bombs(console: Console, target: Target) -> None:
    rows: list[Sequence[Any]] = []
    reports = [
        *one_by_one(target, BODY),
        together(target, BODY - 100, 16),
        half_requests(target, 1000),
        unread_answers(target, 50),
    ]
    for report in reports:
        statuses = ", ".join(f"{n} x {status}" for status, n in sorted(Counter(report.statuses).items()))
        rows.append((report.name, statuses, f"{report.growth:.0f}", f"{report.seconds:.1f}"))
    console.print(_table(("request", "answers", "MiB at most", "seconds"), rows))
    _no_faults(target)


def _tallies(tallies: Sequence[Tally]) -> Table:
    rows: list[Sequence[Any]] = []
    for kind in KINDS:
        mine = [tally for tally in tallies if tally.kind == kind]
        statuses = sum((tally.statuses for tally in mine), Counter[int]())
        shown = ", ".join(f"{status}: {n}" for status, n in sorted(statuses.items()))
        seconds = sum(tally.seconds for tally in mine)
        rows.append((kind, sum(t.requests for t in mine), sum(t.unanswered for t in mine), shown, f"{seconds:.0f}"))
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows), "", ""))
    return _table(("kind", "requests", "unanswered", "answers by status", "seconds"), rows)


def _table(columns: Iterable[str], rows: Iterable[Sequence[Any]]) -> Table:
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(str, row))
    return table


def _no_faults(target: Target) -> None:
    faults = target.faults()
    if faults:
        raise SystemExit("The server's log holds faults:\n" + "\n".join(faults[:20]))


if __name__ == "__main__":
    typer.run(main)
