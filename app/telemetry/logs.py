"""One line an event on stderr, for a person or as JSON; with the id of the request it belongs to."""

import logging
from typing import Any, Literal

from pythonjsonlogger.core import RESERVED_ATTRS, merge_record_extra
from pythonjsonlogger.json import JsonFormatter

from app.telemetry.requests import current

LogFormat = Literal["console", "json"]

TOO_CHATTY = ("httpx", "httpx2", "alembic", "urllib3")
USELESS = ("python_multipart",)  # it warns of every form that is broken
NO_FIELDS = [*RESERVED_ATTRS, "color_message"]
"""What a record has that nobody gave it as a field; the last is uvicorn's."""
NOT_AT_THE_END = frozenset({*NO_FIELDS, "request_id", "method", "route", "status"})
"""What a line for a person has in front of the fields, or not at all."""


def configure_logging(level: str, style: LogFormat = "console") -> None:
    """Everything that is logged in this process, libraries' lines too, which never go below info: ours hold nothing
    private at any level, of theirs nobody knows."""
    handler = logging.StreamHandler()
    handler.addFilter(_of_request)
    handler.setFormatter(_json() if style == "json" else _Console())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel("INFO" if level == "debug" else level.upper())
    logging.getLogger("app").setLevel(level.upper())
    for library in TOO_CHATTY:
        logging.getLogger(library).setLevel("WARNING")
    for library in USELESS:
        logging.getLogger(library).setLevel("ERROR")
    logging.captureWarnings(True)


def _of_request(record: logging.LogRecord) -> bool:
    request = current.get()
    if request is not None:
        record.request_id = request.id
        if request.trace is not None:
            record.trace_id = request.trace.id
    return True


def _json() -> logging.Formatter:
    return JsonFormatter(
        ["levelname", "name", "message"],
        defaults={"time": None},  # keeps the first place for it
        timestamp="time",
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
        reserved_attrs=NO_FIELDS,
    )


class _Console(logging.Formatter):
    """time level request-id logger: message name=value …"""

    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s %(levelname)-7s %(request_id)s %(name)s: %(message)s", defaults={"request_id": "-"}
        )

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        record.message = "\\n".join(record.message.splitlines())  # nothing that is logged looks like another line
        fields: dict[str, Any] = merge_record_extra(record, {}, NOT_AT_THE_END)
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in fields.items())])
