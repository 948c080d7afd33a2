"""What a run says at its end: a table of what was promised and what was seen, and the same as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

WIDTH = 120


@dataclass(frozen=True, slots=True)
class Line:
    """`kept`: whether the promise was; None where none was made."""

    what: str
    seen: str
    promised: str = ""
    kept: bool | None = None


def show(title: str, lines: Sequence[Line]) -> bool:
    """Prints the table; whether every promise was kept."""
    table = Table("", "seen", "promised", "", title=title, title_justify="left")
    for line in lines:
        verdict = {None: "", True: "kept", False: "[bold]NOT KEPT[/bold]"}[line.kept]
        table.add_row(line.what, line.seen, line.promised, verdict)
    Console(width=WIDTH).print(table)
    return all(line.kept is not False for line in lines)


def write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS))


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def percentile(seconds: Sequence[float], q: float) -> float:
    """NaN of nothing."""
    return float(np.percentile(seconds, q)) if seconds else float("nan")


def p50_p95(seconds: Sequence[float]) -> str:
    return f"{ms(percentile(seconds, 50))}, {ms(percentile(seconds, 95))}"
