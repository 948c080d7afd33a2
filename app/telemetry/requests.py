"""What is noted about one request while it is answered: for its log line, its Server-Timing header and its trace."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

from app.telemetry.tracing import RequestTrace

Fact = str | int


@dataclass(slots=True)
class RequestRecord:
    """`facts`: what the log line says besides times. `seconds`: by part of the work, in the order they ended."""

    id: str
    trace: RequestTrace | None = None
    facts: dict[str, Fact] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def server_timing(self, total: float) -> str:
        """The header of that name, in milliseconds: `tokenize;dur=0.2, compute;dur=14.1, total;dur=15.0`."""
        parts = {**self.seconds, "total": total}
        return ", ".join(f"{part};dur={1000 * seconds:.2f}" for part, seconds in parts.items())

    def milliseconds(self, total: float) -> dict[str, float]:
        """Fields of the log line."""
        parts = {"total": total, **self.seconds}
        return {f"{part}_ms": round(1000 * seconds, 2) for part, seconds in parts.items()}


current: ContextVar[RequestRecord | None] = ContextVar("request", default=None)
"""The request that is being answered; tasks it starts inherit it. None: work that nobody asked for over HTTP."""


def note(**facts: Fact) -> None:
    """Says something about the current request. Never inputs, vectors, keys or documents."""
    record = current.get()
    if record is not None:
        record.facts.update(facts)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Times a part of the current request's work, as a span where it is traced; times of one name add up."""
    record = current.get()
    if record is None:
        yield
        return
    started = time.perf_counter()
    try:
        with record.trace.part(name) if record.trace else nullcontext():
            yield
    finally:
        record.add(name, time.perf_counter() - started)


def record_engine(queue_seconds: float, forward_seconds: float, **attributes: Fact) -> None:
    """Where the time of texts that have just come back from the engine went: waiting, and on the device.

    To be called as soon as they have: a trace gets two spans that end now. `attributes` go to the second of them.
    """
    record = current.get()
    if record is None:
        return
    record.add("queue", queue_seconds)
    record.add("forward", forward_seconds)
    if record.trace is not None:
        record.trace.parts_until_now({"queue": (queue_seconds, {}), "forward": (forward_seconds, attributes)})
