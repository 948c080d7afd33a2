"""Every metric but the engine's own. docs/metrics.md is made from this module: `python -m tests.docs metrics`.

Labels take their values from code and settings, never from what a caller sends.
"""

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, read by nobody

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""From a cached vector to a long request on a CPU."""
STORE_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)

BUILD = Gauge("cde_build_info", "Always 1: what is running", ["version", "torch", "device"])
MODEL = Gauge(
    "cde_model_info",
    "Always 1: one for each served model; `weights` is the beginning of their SHA-256",
    ["model", "family", "semantics", "dtype", "device", "weights"],
)
READY = Gauge("cde_ready", "1 while requests are taken and, as the last batch showed, computed")

REQUESTS = Counter(
    "cde_requests_total",
    "Requests by route template and status; 499: the client had gone",
    ["method", "route", "status"],
)
ERRORS = Counter(
    "cde_errors_total", "Answers of 400 and above by OpenAI's error code; `none` where it is null", ["status", "code"]
)
IN_FLIGHT = Gauge("cde_requests_in_flight", "Requests being answered, the one that reads this among them")
REQUEST_SECONDS = Histogram(
    "cde_request_seconds", "From the request's head to the answer's last byte", ["method", "route"], buckets=SECONDS
)

REQUEST_INPUTS = Histogram(
    "cde_request_inputs",
    "Texts in one request for embeddings, or in one batch line",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
)
TOKENS = Counter("cde_tokens_total", "Tokens of texts, prompt and special ones in", ["model"])
COMPUTE_TOKENS = Counter("cde_compute_tokens_total", "Tokens as computed, context rows counted", ["model"])
TRUNCATED = Counter("cde_truncated_inputs_total", "Texts that were cut to the model's length", ["model"])

VECTOR_CACHE = Counter(
    "cde_vector_cache_total",
    "Texts by where their vector came from: `hit` (the cache), `shared` (computed for another request at that moment), "
    "`computed`",
    ["outcome"],
)
VECTOR_CACHE_BYTES = Gauge("cde_vector_cache_bytes", "Bytes the vector cache holds")

CONTEXTS_RESIDENT = Gauge("cde_contexts_resident", "Contexts held in memory")
CONTEXTS_RESIDENT_BYTES = Gauge("cde_contexts_resident_bytes", "Bytes of the contexts held in memory")
CONTEXT_EVICTIONS = Counter("cde_context_evictions_total", "Contexts that were dropped from memory to make room")
CONTEXT_USES = Counter(
    "cde_context_uses_total",
    "Contexts by where they came from when they were used: `resident` (memory), `loaded` (the store), `built` (the "
    "first stage, for documents sent along)",
    ["source"],
)
CONTEXTS_BUILDING = Gauge("cde_contexts_building", "Context versions this process is building")
CONTEXT_BUILDS = Counter(
    "cde_context_builds_total",
    "Context versions by how their build ended: `completed`, `failed`, `stopped` (the server shut down, or it was "
    "deleted)",
    ["outcome"],
)
FIRST_STAGE_DOCUMENTS = Counter("cde_first_stage_documents_total", "Documents through the first stage", ["model"])

BATCH_LINES = Counter("cde_batch_lines_total", "Lines of batches answered: `completed` or `failed`", ["outcome"])
BATCHES_RUNNING = Gauge("cde_batches_running", "Batches this process runs")

STORE_SECONDS = Histogram(
    "cde_store_seconds",
    "Transactions on the database, waiting for it in: `read` or `write`",
    ["operation"],
    buckets=STORE_SECONDS_BUCKETS,
)
STORE_FAILURES = Counter("cde_store_failures_total", "Transactions the database did not carry out", ["operation"])
STORE_RETRIES = Counter("cde_store_retries_total", "Writes begun anew because another writer was in the way")

STORE_FAULT = Gauge("cde_store_fault", "1 while the context store has this fault", ["kind"])
STALE_CONTEXTS = Counter("cde_stale_contexts_total", "Requests under what was last known of a context")

CONNECTIONS_CUT = Counter("cde_connections_cut_total", "Connections refused or cut for the limits' sake", ["reason"])

# There from the start, so that the first failure is an increase.
for _operation in ("read", "write"):
    STORE_FAILURES.labels(_operation)
for _outcome in ("completed", "failed", "stopped"):
    CONTEXT_BUILDS.labels(_outcome)
for _outcome in ("completed", "failed"):
    BATCH_LINES.labels(_outcome)


def count_embeddings(model: str, texts: int, tokens: int, *, truncated: int) -> None:
    """One answer with vectors."""
    REQUEST_INPUTS.observe(texts)
    TOKENS.labels(model).inc(tokens)
    TRUNCATED.labels(model).inc(truncated)
