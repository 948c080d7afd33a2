"""Settings -> every object behind the routes, built once and in order; `lifecycle.py` starts and stops them."""

import logging
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from app.api.batches import LineAnswers
from app.batches.runner import BatchRunner
from app.batches.service import Batches
from app.building import ContextBuilder
from app.catalog import Catalog
from app.contexts import Contexts
from app.engine.engine import Engine
from app.models.loading import BUILTIN, LoadOptions, load_model
from app.registry import Registry, ServedModel
from app.service import EmbeddingService, EmbedPolicy
from app.settings import ModelSettings, Settings
from app.stores.batches import SqlBatchStore
from app.stores.database import Database
from app.stores.files import SqlFileStore
from app.stores.sql import SqlContextStore
from app.telemetry.metrics import BUILD, MODEL
from app.vector_cache import VectorCache

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the routes and the lifecycle use."""

    registry: Registry
    engine: Engine
    contexts: Contexts
    catalog: Catalog
    service: EmbeddingService
    runner: BatchRunner
    batches: Batches


def load_replicas(settings: Settings) -> list[list[ServedModel]]:
    """All models, once a device. Raises CheckpointError."""
    devices: list[str | None] = [*settings.engine.devices] or [None]
    return [[_load(model, device) for model in settings.models] for device in devices]


def assemble(settings: Settings, database: Database, replicas: list[list[ServedModel]]) -> Parts:
    """Nothing runs yet. Raises ConfigError."""
    registry = Registry(replicas[0])
    _say_what_runs(replicas)
    limits, wanted, device = settings.limits, settings.contexts, registry.default.spec.device
    engine = Engine(
        [{served.id: served.model for served in replica} for replica in replicas],
        batch_tokens=settings.engine.batch_tokens_on(device),
        queue_tokens=limits.queue_tokens,
        cache_bytes=wanted.cache_bytes,
        workers=settings.engine.workers_on(device),
    )
    store, builder = SqlContextStore(database), ContextBuilder(engine)
    contexts = Contexts(builder, store, cache_bytes=wanted.cache_bytes, default=wanted.default)
    catalog = Catalog(
        contexts, builder, store, keep_documents=wanted.keep_documents, candidates=wanted.diverse_candidates
    )
    policy = EmbedPolicy(
        max_tokens=limits.max_tokens_per_request,
        truncate=settings.truncate,
        integers=settings.token_ids,
        default_context=wanted.default,
        require_context=wanted.require_context,
    )
    service = EmbeddingService(registry, contexts, VectorCache(engine, max_bytes=limits.vector_cache_bytes), policy)
    batches, files = SqlBatchStore(database), SqlFileStore(database)
    runner = BatchRunner(
        batches,
        files,
        LineAnswers(service, settings),
        max_lines=limits.max_batch_lines,
        max_line_bytes=limits.max_body_bytes,
    )
    return Parts(registry, engine, contexts, catalog, service, runner, Batches(batches, files, runner))


def _say_what_runs(replicas: list[list[ServedModel]]) -> None:
    devices = dict.fromkeys(replica[0].spec.device for replica in replicas)
    BUILD.labels(version("cde-server"), version("torch"), ",".join(devices)).set(1)
    for spec in (served.spec for served in replicas[0]):
        MODEL.labels(spec.id, spec.family, spec.semantics, spec.dtype, spec.device, spec.revision[:12]).set(1)


def _load(settings: ModelSettings, device: str | None = None) -> ServedModel:
    names = served_names(settings)
    options = LoadOptions(
        id=names[0],
        revision=settings.revision,
        semantics=settings.semantics,
        output_residual=settings.output_residual,
        mask_instruction=settings.mask_instruction,
        first_stage=settings.first_stage,
        dtype=settings.dtype,
        device=device or settings.device,
        context_attention=settings.context_attention,
    )
    started = time.perf_counter()
    loaded = load_model(settings.name, options)
    spec = loaded.model.spec
    log.info(
        "%s from %s: %s, %s, %s on %s, %.1f s",
        spec.id,
        spec.source,
        spec.family,
        spec.semantics,
        spec.dtype,
        spec.device,
        time.perf_counter() - started,
    )
    if spec.approximate:
        log.warning("%s runs with a frozen context: its vectors are approximate, and a space of their own", spec.id)
    if not spec.is_cde:
        log.warning("%s is a stand-in that needs no download, and not a CDE model; see README", spec.id)
    return ServedModel(names, loaded.model, loaded.tokenizer, settings.matryoshka)


def served_names(settings: ModelSettings) -> tuple[str, ...]:
    """The id first, then its last part where it has an owner, then the aliases."""
    path = Path(settings.name).expanduser()
    own = settings.served_name or (path.resolve().name if settings.name != BUILTIN and path.is_dir() else settings.name)
    return tuple(dict.fromkeys((own, own.rpartition("/")[2], *settings.aliases)))
