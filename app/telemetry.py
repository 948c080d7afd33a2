"""Log format, metric names and the request id. Never inputs, vectors or keys."""

import logging
from contextvars import ContextVar

from prometheus_client import Counter, Gauge, Histogram

request_id: ContextVar[str] = ContextVar("request_id", default="-")

REQUESTS = Counter("cde_requests_total", "Answers by route and status", ["route", "status"])
REQUEST_SECONDS = Histogram("cde_request_seconds", "Time from the first byte to the last", ["route"])
TOKENS = Counter("cde_tokens_total", "Tokens of texts, prompt and special ones in", ["model"])
COMPUTE_TOKENS = Counter("cde_compute_tokens_total", "Tokens as computed, context rows counted", ["model"])
QUEUE_TOKENS = Gauge("cde_queue_tokens", "Tokens as computed, waiting or running")
BATCH_ROWS = Histogram("cde_batch_rows", "Texts in a batch", ["stage"], buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256))
FORWARDS = Counter("cde_forwards_total", "Batches run", ["stage"])
CONNECTIONS_CUT = Counter("cde_connections_cut_total", "Connections refused or cut for the limits' sake", ["reason"])
VECTOR_CACHE = Counter("cde_vector_cache_total", "Texts by where their vector came from", ["outcome"])
VECTOR_CACHE_BYTES = Gauge("cde_vector_cache_bytes", "Bytes the vector cache holds")

BATCH_LINES = Counter("cde_batch_lines_total", "Lines of batches answered", ["outcome"])
BATCHES_RUNNING = Gauge("cde_batches_running", "Batches this process runs")


class _RequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


def configure_logging(level: str) -> None:
    """One line an event, on stderr, with the request id."""
    handler = logging.StreamHandler()
    handler.addFilter(_RequestId())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(request_id)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for library in ("httpx", "httpx2", "alembic"):
        logging.getLogger(library).setLevel("WARNING")
    logging.getLogger("python_multipart").setLevel("ERROR")  # it warns of every form that is broken
