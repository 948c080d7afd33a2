"""`cde-server keys create`: a new API key, and the lines that let it in."""

import hashlib
import re
import secrets
from typing import Annotated

import typer

from app.api.auth import ALL_SCOPES
from app.cli.options import messages
from app.context_refs import NAME

keys = typer.Typer(help="API keys.", no_args_is_help=True)


@keys.command()
def create(
    name: str,
    *,
    scope: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(ALL_SCOPES)}; absent: all")] = None,
    namespace: Annotated[
        str | None, typer.Option(help="Its contexts are its own; absent: those that all keys without one share")
    ] = None,
) -> None:
    """Print a new key's entry for the keys file on stdout, and the key itself, once, on stderr."""
    unknown = set(scope or ()) - set(ALL_SCOPES)
    if unknown or not re.fullmatch("[A-Za-z0-9_-]+", name):
        raise typer.BadParameter(f"names are letters, digits, '_' and '-'; scopes are {', '.join(ALL_SCOPES)}")
    if namespace is not None and not NAME.fullmatch(namespace):
        raise typer.BadParameter("a namespace is made of a-z, 0-9, '_' and '-', at most 63 of them")
    secret = f"cde-{secrets.token_urlsafe(32)}"
    scopes = ", ".join(f'"{s}"' for s in scope or ALL_SCOPES)
    lines = [
        "[[keys]]",
        f'name = "{name}"',
        f'sha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"',
        f"scopes = [{scopes}]",
    ]
    if namespace is not None:
        lines.append(f'namespace = "{namespace}"')
    typer.echo("\n".join(lines))
    messages.print(f"The key, shown this once: {secret}")
