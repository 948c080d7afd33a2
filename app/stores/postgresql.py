"""PostgreSQL: nothing waits for it without end, neither for a connection nor for an answer nor for a lock."""

import time
from collections.abc import Generator
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL

if TYPE_CHECKING:
    import psycopg

CONNECT_SECONDS = 3
ANSWER_SECONDS = 15.0
"""A server that is frozen, or whose machine is gone, says nothing; a sound one has given up at STATEMENT_SECONDS."""
STATEMENT_SECONDS = 10
LOCK_SECONDS = 5
IDLE_SECONDS = 60
"""A transaction whose client has stopped in the middle keeps its locks no longer than that."""


def opened(url: URL, **pool: Any) -> Engine:
    """For requests: every wait has an end."""
    engine = create_engine(
        url,
        pool_pre_ping=True,
        pool_use_lifo=True,
        hide_parameters=True,
        connect_args=options(url),
        **pool,
    )

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: Any, _record: Any, arguments: Any, parameters: Any) -> "psycopg.Connection[Any]":
        return _impatient().connect(*arguments, **parameters)

    @event.listens_for(engine, "connect")
    def _limits(connection: "psycopg.Connection[Any]", _record: Any) -> None:
        connection.execute(
            f"SET statement_timeout = '{STATEMENT_SECONDS}s'; SET lock_timeout = '{LOCK_SECONDS}s'; "
            f"SET idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'"
        )
        connection.commit()

    return engine


def options(url: URL) -> dict[str, Any]:
    """libpq's; those of the URL go first."""
    ours = {
        "connect_timeout": CONNECT_SECONDS,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": round(1000 * ANSWER_SECONDS),  # an integer, or no connection over TCP is made
        "application_name": "cde-server",
    }
    return {name: value for name, value in ours.items() if name not in url.query}


@cache
def _impatient() -> "type[psycopg.Connection[Any]]":
    """psycopg's connection, which by itself waits for an answer as long as the network stands."""
    import psycopg  # noqa: PLC0415 - comes with the extra `postgres`

    class Impatient(psycopg.Connection[Any]):
        def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().wait(_within(gen), *args, **kwargs)
            except TimeoutError as error:
                self.close()  # an answer that comes late would be taken for another one's
                raise psycopg.OperationalError(f"no answer within {ANSWER_SECONDS:.0f} s") from error

    return Impatient


def _within(gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """`gen` until it returns, or TimeoutError. It is woken a few times a second where nothing comes."""
    deadline = time.monotonic() + ANSWER_SECONDS
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if time.monotonic() > deadline:
                raise TimeoutError
            wanted = gen.send(ready)
    except StopIteration as stop:
        return stop.value
