"""`cde-server contexts …`: contexts of a running server. `contexts check` is in check.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import orjson
import typer
from rich.console import Console
from rich.table import Table

from app.api.schemas import NPY, SAFETENSORS
from app.cli.check import check
from app.cli.client import LOCAL, KeyOption, Server, UrlOption, no_server_of_ours, parsed
from app.cli.options import SeedOption, messages, progress, wide_console
from app.corpora import read_records

contexts = typer.Typer(help="Contexts of a running server; check: the store it keeps them in.", no_args_is_help=True)
contexts.command()(check)

ForModel = Annotated[str | None, typer.Option("--model", help="Whose context; absent: the server's default model's")]


@contexts.command()
def create(
    name: str,
    file: Annotated[Path, typer.Argument(help="Documents: .txt, .jsonl or .parquet, of any size")],
    *,
    method: Annotated[str, typer.Option(help="random, first or diverse")] = "random",
    seed: SeedOption = 0,
    url: UrlOption = LOCAL,
    api_key: KeyOption = None,
    model: ForModel = None,
) -> None:
    """Make a context, or a new version of one, from a file of documents."""
    with progress() as bar:
        task = bar.add_task("documents", total=None)

        def lines() -> Iterator[bytes]:
            for record in read_records(file):
                bar.advance(task)
                yield orjson.dumps(record.text, option=orjson.OPT_APPEND_NEWLINE)
            bar.update(task, description="first stage")

        response = Server(url, api_key, model).call(
            "POST",
            "/v1/contexts",
            params={"name": name, "method": method, "seed": seed},
            content=lines(),
            headers={"Content-Type": "application/x-ndjson"},
        )
    _show(response)
    if response.status_code == httpx.codes.OK:
        messages.print("this content was there already")


@contexts.command("list")
def list_(*, url: UrlOption = LOCAL, api_key: KeyOption = None, model: ForModel = None) -> None:
    """The version each name points at."""
    found: list[dict[str, Any]] = []
    server, after, more = Server(url, api_key, model), None, True
    while more:
        answer = server.call("GET", "/v1/contexts", params={"limit": 100} | ({"after": after} if after else {}))
        page = parsed(answer, "list")
        found += page["data"]
        after, more = page["last_id"], page["has_more"]
    _print_table(found)


@contexts.command()
def show(ref: str, *, url: UrlOption = LOCAL, api_key: KeyOption = None, model: ForModel = None) -> None:
    """One context, by name, name.version or id."""
    _show(Server(url, api_key, model).call("GET", _path(ref)))


@contexts.command()
def versions(name: str, *, url: UrlOption = LOCAL, api_key: KeyOption = None, model: ForModel = None) -> None:
    """All versions of a name, newest first."""
    _print_table(parsed(Server(url, api_key, model).call("GET", f"{_path(name)}/versions"), "list")["data"])


@contexts.command()
def rollback(
    name: str,
    version: Annotated[int, typer.Argument(min=1, max=10**9 - 1)],
    *,
    url: UrlOption = LOCAL,
    api_key: KeyOption = None,
    model: ForModel = None,
) -> None:
    """Point a name at one of its versions."""
    response = Server(url, api_key, model).call(
        "POST",
        f"{_path(name)}/rollback",
        content=orjson.dumps({"version": version}),
        headers={"Content-Type": "application/json"},
    )
    _show(response)


@contexts.command()
def delete(ref: str, *, url: UrlOption = LOCAL, api_key: KeyOption = None, model: ForModel = None) -> None:
    """By name: the name and all its versions; by name.version or id: that one."""
    parsed(Server(url, api_key, model).call("DELETE", _path(ref)), "context.deleted")
    messages.print(f"{ref} is deleted")


@contexts.command()
def export(
    ref: str,
    file: Path,
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there")] = False,
    url: UrlOption = LOCAL,
    api_key: KeyOption = None,
    model: ForModel = None,
) -> None:
    """Its arrays to a file: .safetensors or .npy."""
    if file.exists() and not overwrite:
        raise typer.BadParameter(f"{file} is there: choose another file, or replace it with --overwrite")
    response = Server(url, api_key, model).call("GET", f"{_path(ref)}/embeddings", headers={"Accept": _kind(file)})
    made = response.headers.get("x-context-id")
    if made is None:
        raise no_server_of_ours(response, "no context came")
    target = file.with_name(file.name + ".writing")
    try:
        target.write_bytes(response.content)
        target.replace(file)
    finally:
        target.unlink(missing_ok=True)
    messages.print(f"{ref} ({made}) is in {file}")


@contexts.command("import")
def import_(
    name: str, file: Path, *, url: UrlOption = LOCAL, api_key: KeyOption = None, model: ForModel = None
) -> None:
    """A context, or a new version of one, from dataset embeddings: .safetensors or .npy."""
    response = Server(url, api_key, model).call(
        "PUT", f"{_path(name)}/embeddings", content=file.read_bytes(), headers={"Content-Type": _kind(file)}
    )
    _show(response)


def _path(ref: str) -> str:
    """Of a context. Quoted: behind a '#' or '?' nothing would be sent, and another context meant. Raises
    typer.BadParameter for what a URL has no room for."""
    if ref in ("", ".", ".."):
        raise typer.BadParameter(f"{ref!r} names no context")
    return f"/v1/contexts/{quote(ref, safe='')}"


def _kind(file: Path) -> str:
    """Its media type. Raises typer.BadParameter."""
    kinds = {".safetensors": SAFETENSORS, ".npy": NPY}
    if file.suffix.lower() not in kinds:
        raise typer.BadParameter(f"{file}: unknown kind of file; known: {', '.join(kinds)}")
    return kinds[file.suffix.lower()]


def _print_table(found: list[dict[str, Any]]) -> None:
    table = Table("name", "version", "model", "status", "id", "documents", "bytes")
    for c in found:
        documents = f"{c['documents']['chosen']} of {c['documents']['received']}"
        row = (c["name"], c["version"], c["model"], c["status"], c["id"] or "", documents, c["usage_bytes"])
        table.add_row(*map(str, row))
    wide_console().print(table)


def _show(response: httpx.Response) -> None:
    Console(soft_wrap=True).print_json(orjson.dumps(parsed(response, "context")).decode())
