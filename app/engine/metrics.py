"""What the engine tells Prometheus."""

from prometheus_client import Counter, Gauge, Histogram

from app.domain import Lane
from app.engine.scheduling import WaitingJobs

SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

QUEUE_TOKENS = Gauge("cde_queue_tokens", "Tokens as computed that wait, context rows counted", ["lane"])
QUEUE_JOBS = Gauge("cde_queue_jobs", "Texts that wait", ["lane"])
QUEUE_AGE = Gauge("cde_queue_age_seconds", "How long the oldest request that waits for its turn has waited", ["lane"])
QUEUE_WAIT = Histogram("cde_queue_wait_seconds", "From admission to the first forward", ["lane"], buckets=SECONDS)
RUNNING_TOKENS = Gauge("cde_running_tokens", "Tokens as computed in the batches that run")
REFUSED = Counter(
    "cde_admission_refused_total",
    "Requests not taken into the queue: `full`, `deadline`, `shutting_down`, `unavailable`",
    ["reason"],
)
CANCELLED = Counter(
    "cde_cancelled_texts_total",
    "Texts whose caller had gone: `queued` (not computed), `running` (computed for nobody)",
    ["state"],
)

BATCH_ROWS = Histogram("cde_batch_rows", "Texts in a batch", ["stage"], buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256))
BATCH_TOKENS = Histogram(
    "cde_batch_tokens", "Tokens as computed in a batch", ["stage"], buckets=tuple(64 * 2**i for i in range(11))
)
PADDING = Counter("cde_padding_tokens_total", "Tokens a padded batch has beyond its texts'", ["stage"])
FORWARDS = Counter("cde_forwards_total", "Batches run", ["stage"])
FORWARD_SECONDS = Histogram("cde_forward_seconds", "Of one batch", ["stage"], buckets=SECONDS)
FAILED = Counter("cde_forwards_failed_total", "Batches that failed: `error`, `oom`; texts: `non_finite`", ["reason"])
OOM_SPLITS = Counter("cde_oom_splits_total", "Batches halved for want of memory")
BUDGET = Gauge("cde_batch_budget_tokens", "Tokens of one batch that are known to fit", ["device"])
NON_FINITE = Counter(
    "cde_non_finite_total", "Vectors with NaN or infinity: `recomputed` in float32, `failed`", ["outcome"]
)

RESTARTS = Counter("cde_worker_restarts_total", "Device workers that died and were started again", ["device"])
WORKERS = Gauge("cde_workers_alive", "Device workers that run")
STUCK = Gauge("cde_stuck_forward_seconds", "Of the longest forward that runs, where it is longer than allowed")
CONTEXT_BYTES = Gauge("cde_device_contexts_bytes", "Contexts on a device", ["device"])
CONTEXT_EVICTIONS = Counter("cde_device_context_evictions_total", "Contexts that made room for others on a device")

_SHOWN = {lane: (QUEUE_TOKENS.labels(lane), QUEUE_JOBS.labels(lane), QUEUE_AGE.labels(lane)) for lane in Lane}
WAITED = {lane: QUEUE_WAIT.labels(lane) for lane in Lane}
for _reason in ("full", "deadline", "shutting_down", "unavailable"):
    REFUSED.labels(_reason)

for _state in ("queued", "running"):
    CANCELLED.labels(_state)
for _reason in ("error", "oom", "non_finite"):
    FAILED.labels(_reason)
for _outcome in ("recomputed", "failed"):
    NON_FINITE.labels(_outcome)


def show_queue(waiting: WaitingJobs, running_tokens: int, now: float) -> None:
    """`now`: time.monotonic()."""
    RUNNING_TOKENS.set(running_tokens)
    for lane, queue in waiting.lanes.items():
        tokens, jobs, age = _SHOWN[lane]
        tokens.set(queue.tokens)
        jobs.set(queue.jobs)
        oldest = queue.oldest
        age.set(now - oldest.timing.queued_at if oldest else 0.0)
