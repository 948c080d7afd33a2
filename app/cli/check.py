"""`cde-server contexts check`: looks through the store itself, beside a running server or without one."""

from dataclasses import asdict
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.table import Table

from app.cli.options import ConfigOption, messages, wide_console
from app.settings_sources import load_settings
from app.stores.checks.database import check_store


def check(
    *,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON on stdout")] = False,
) -> None:
    """Read the whole store of the settings (contexts, files, batches), and say what is damaged and what to do.

    Writes nothing. Exit code 1: something was found.
    """
    with messages.status("reading the store"):
        report = check_store(load_settings({}, config).database_url)
    counts = ", ".join(f"{count} {what}" for what, count in report.checked.items())
    if as_json:
        found = {"ok": not report.findings, "checked": report.checked, "findings": [asdict(f) for f in report.findings]}
        Console(soft_wrap=True).print_json(orjson.dumps(found).decode())
    elif report.findings:
        table = Table("what", "is wrong", "what to do", show_lines=True)
        for finding in report.findings:
            table.add_row(finding.what, finding.problem, finding.remedy)
        wide_console().print(table)
    messages.print(f"{counts} checked: {len(report.findings) or 'nothing'} found")
    if report.findings:
        raise typer.Exit(1)
