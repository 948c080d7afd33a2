"""`cde-server keys create`: a new API key, and the lines that let it in."""

import hashlib
import secrets
from typing import Annotated

import typer

from app.api.auth import ALL_SCOPES
from app.cli.options import messages

keys = typer.Typer(help="API keys.", no_args_is_help=True)


@keys.command()
def create(
    name: str,
    scope: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(ALL_SCOPES)}; absent: all")] = None,
) -> None:
    """Print a new key's entry for the keys file on stdout, and the key itself, once, on stderr."""
    unknown = set(scope or ()) - set(ALL_SCOPES)
    if unknown or (not name.isidentifier() and not name.replace("-", "").isalnum()):
        raise typer.BadParameter(f"names are letters, digits and '-'; scopes are {', '.join(ALL_SCOPES)}")
    secret = f"cde-{secrets.token_urlsafe(32)}"
    scopes = ", ".join(f'"{s}"' for s in scope or ALL_SCOPES)
    typer.echo(
        f'[[keys]]\nname = "{name}"\nsha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"\nscopes = [{scopes}]'
    )
    messages.print(f"The key, shown this once: {secret}", markup=False)
