"""A running server, as the commands that need one reach it."""

from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer

from app.cli.options import messages

UrlOption = Annotated[str, typer.Option(envvar="CDE_URL", help="The server")]
KeyOption = Annotated[str | None, typer.Option(envvar="CDE_API_KEY", help="API key, where the server wants one")]

LOCAL = "http://127.0.0.1:8000"
CONNECT_SECONDS = 10.0


def address(url: str) -> str:
    """Of the server; the base URL that OpenAI clients take is one, too. Raises typer.BadParameter."""
    try:
        parts = httpx.URL(url)
        whole = parts.scheme in ("http", "https") and bool(parts.host)
    except httpx.InvalidURL:
        whole = False
    if not whole:
        raise typer.BadParameter(f"{url!r} is no address of a server: give --url or CDE_URL one like {LOCAL}")
    return url.rstrip("/").removesuffix("/v1")


def bearer(key: str | None) -> dict[str, str]:
    """The header. Raises typer.BadParameter, which does not repeat the key."""
    if not key:
        return {}
    if not key.isascii() or not key.isprintable():
        raise typer.BadParameter(
            "the API key holds characters that no header carries: give --api-key or CDE_API_KEY the key alone, as "
            "`cde-server keys create` printed it"
        )
    return {"Authorization": f"Bearer {key}"}


class Server:
    """The server's API; a refusal ends the command with its message."""

    def __init__(self, url: str, key: str | None, model: str | None) -> None:
        """Raises typer.BadParameter for a URL or a key that is none."""
        self._url = address(url)
        self._headers = bearer(key)
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
            messages.print(f"error: {self._url} does not answer: {error}", style="red")
            raise typer.Exit(1) from error
        if not response.is_success:
            messages.print(f"error: {_message(response)}", style="red")
            raise typer.Exit(1)
        return response


def parsed(response: httpx.Response, kind: str | None = None) -> Any:
    """The JSON in an answer; `kind`: of which object. Raises typer.Exit."""
    try:
        found = response.json()
    except ValueError as error:
        raise no_server_of_ours(response, "no JSON came") from error
    if kind is not None and not (isinstance(found, dict) and found.get("object") == kind):
        raise no_server_of_ours(response, f"no {kind} came")
    return found


def no_server_of_ours(response: httpx.Response, why: str) -> typer.Exit:
    messages.print(f"error: what answers at {response.url} is no cde-server: {why}", style="red")
    return typer.Exit(1)


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        where = response.headers.get("location")
        return f"HTTP {response.status_code} from {response.url}" + (f", which sends to {where}" if where else "")
