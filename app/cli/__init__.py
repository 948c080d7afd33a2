"""`cde-server`: one file a command group."""

from app.cli.main import main

__all__ = ["main"]
