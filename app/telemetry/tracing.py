"""OpenTelemetry traces of requests. The API is always there; the SDK, which sends them, comes with the extra `otel` and
reads the OTEL_* variables itself.

FastAPI can make a request's span too. It is switched off in main.py: its spans carry query strings, and where a log
provider is set it sends the messages of exceptions.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer

from app.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

Attributes = Mapping[str, str | int]
NAME = "cde-server"


class RequestTrace:
    """The span of one request, and spans of parts of its work below it."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def id(self) -> str:
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    def part(self, name: str) -> AbstractContextManager[Span]:
        """A span below the current one, for as long as the block runs."""
        return self._tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False)

    def parts_until_now(self, parts: Mapping[str, tuple[float, Attributes]]) -> None:
        """Spans below the current one that follow each other and end now: name -> seconds, attributes."""
        at = time.time_ns() - sum(_nanoseconds(seconds) for seconds, _ in parts.values())
        for name, (seconds, attributes) in parts.items():
            span = self._tracer.start_span(name, start_time=at, attributes=_ours(attributes))
            at += _nanoseconds(seconds)
            span.end(at)

    def answered(self, method: str, route: str, status: int, facts: Attributes) -> None:
        """What is known of the request at its end."""
        self._span.update_name(f"{method} {route}")
        self._span.set_attributes({"http.route": route, "http.response.status_code": status, **_ours(facts)})
        if status >= 500:
            self._span.set_attribute("error.type", str(facts.get("code", status)))
            self._span.set_status(StatusCode.ERROR)


class Tracing:
    """Where spans go: to the process's own provider where something has set one, else over OTLP/HTTP."""

    def __init__(self) -> None:
        """Raises ConfigError without the extra."""
        given = trace.get_tracer_provider()
        self._made = _exporting() if isinstance(given, trace.ProxyTracerProvider) else None
        self._tracer = (self._made or given).get_tracer(NAME, version(NAME))

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[RequestTrace]:
        """The span of a request, in the trace that its `traceparent` names."""
        with self._tracer.start_as_current_span(
            method,
            context=propagate.extract(headers),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method},
            record_exception=False,  # messages stay in the log
            set_status_on_exception=False,
        ) as span:
            yield RequestTrace(self._tracer, span)

    def close(self) -> None:
        """Sends what is left. Blocks while the collector does not answer, up to its time-out."""
        if self._made is not None:
            self._made.shutdown()


def _exporting() -> "TracerProvider":
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError("server.traces needs OpenTelemetry's SDK: pip install -e '.[otel]' in a checkout") from error
    resource = Resource.create({SERVICE_VERSION: version(NAME)})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # OTEL_SERVICE_NAME is not set
        resource = resource.merge(Resource({SERVICE_NAME: NAME}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _ours(attributes: Attributes) -> dict[str, str | int]:
    return {f"cde.{name}": value for name, value in attributes.items()}


def _nanoseconds(seconds: float) -> int:
    return round(1e9 * seconds)
