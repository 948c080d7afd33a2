"""`cde-server contexts …`: contexts of a running server. `contexts check` is in check.py."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import orjson
import typer
from rich.console import Console
from rich.table import Table

from app.api.schemas import NPY, SAFETENSORS
from app.cli.check import check
from app.cli.options import messages, progress
from app.corpora import read_records

contexts = typer.Typer(help="Contexts of a running server; check: the store it keeps them in.", no_args_is_help=True)
contexts.command()(check)

UrlOption = Annotated[str, typer.Option(envvar="CDE_URL", help="The server")]
KeyOption = Annotated[str | None, typer.Option(envvar="CDE_API_KEY", help="API key, where the server wants one")]
ForModel = Annotated[str | None, typer.Option("--model", help="Whose context; absent: the server's default model's")]

LOCAL = "http://127.0.0.1:8000"
CONNECT_SECONDS = 10.0
WIDE = 240


class Server:
    """The server's API; a refusal ends the command with its message."""

    def __init__(self, url: str, key: str | None, model: str | None) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._params = {"model": model} if model else {}

    def call(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        content: bytes | Iterator[bytes] | None = None,
    ) -> httpx.Response:
        """Raises typer.Exit."""
        try:
            response = httpx.request(
                method,
                self._url + path,
                params=self._params | (params or {}),
                headers=self._headers | (headers or {}),
                content=content,
                timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),  # a build takes as long as it takes
            )
        except httpx.HTTPError as error:
            messages.print(f"error: {self._url} does not answer: {error}", style="red", markup=False)
            raise typer.Exit(1) from error
        if response.is_error:
            messages.print(f"error: {_message(response)}", style="red", markup=False)
            raise typer.Exit(1)
        return response


@contexts.command()
def create(
    name: str,
    file: Annotated[Path, typer.Argument(help="Documents: .txt, .jsonl or .parquet, of any size")],
    *,
    method: Annotated[str, typer.Option(help="random, first or diverse")] = "random",
    seed: int = 0,
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
    _show(response.json())
    if response.status_code == httpx.codes.OK:
        messages.print("this content was there already")


@contexts.command("list")
def list_(*, url: UrlOption = LOCAL, api_key: KeyOption = None, model: ForModel = None) -> None:
    """The version each name points at."""
    table = Table("name", "version", "model", "id", "documents", "bytes")
    server, after, more = Server(url, api_key, model), None, True
    while more:
        page = server.call("GET", "/v1/contexts", params={"limit": 100} | ({"after": after} if after else {})).json()
        for c in page["data"]:
            chosen, received = c["documents"]["chosen"], c["documents"]["received"]
            table.add_row(
                c["name"], str(c["version"]), c["model"], c["id"], f"{chosen} of {received}", str(c["usage_bytes"])
            )
        after, more = page["last_id"], page["has_more"]
    # A pipe has no width: nothing is cut there.
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


@contexts.command()
def show(ref: str, *, url: UrlOption = LOCAL, api_key: KeyOption = None, model: ForModel = None) -> None:
    """One context, by name, name.version or id."""
    _show(Server(url, api_key, model).call("GET", f"/v1/contexts/{ref}").json())


@contexts.command()
def delete(ref: str, *, url: UrlOption = LOCAL, api_key: KeyOption = None, model: ForModel = None) -> None:
    """By name: the name and all its versions; by name.version or id: that one."""
    Server(url, api_key, model).call("DELETE", f"/v1/contexts/{ref}")
    messages.print(f"{ref} is deleted")


@contexts.command()
def export(ref: str, file: Path, *, url: UrlOption = LOCAL, api_key: KeyOption = None, model: ForModel = None) -> None:
    """Its arrays to a file: .safetensors or .npy."""
    accept = NPY if file.suffix.lower() == ".npy" else SAFETENSORS
    response = Server(url, api_key, model).call("GET", f"/v1/contexts/{ref}/embeddings", headers={"Accept": accept})
    file.write_bytes(response.content)
    messages.print(f"{ref} ({response.headers['x-context-id']}) is in {file}")


@contexts.command("import")
def import_(
    name: str, file: Path, *, url: UrlOption = LOCAL, api_key: KeyOption = None, model: ForModel = None
) -> None:
    """A context, or a new version of one, from dataset embeddings: .safetensors or .npy."""
    kind = NPY if file.suffix.lower() == ".npy" else SAFETENSORS
    response = Server(url, api_key, model).call(
        "PUT", f"/v1/contexts/{name}/embeddings", content=file.read_bytes(), headers={"Content-Type": kind}
    )
    _show(response.json())


def _show(context: dict[str, Any]) -> None:
    Console(soft_wrap=True).print_json(orjson.dumps(context).decode())


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"
