"""Settings -> every object behind the routes, built once and in order; `lifecycle.py` starts and stops them."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from app.api.batches import LineAnswers
from app.batches.runner import BatchRunner
from app.batches.service import Batches
from app.batches.work import BatchWork
from app.building import ContextBuilder
from app.catalog import Catalog
from app.contexts import Contexts
from app.engine.engine import Engine, EngineOptions
from app.errors import CheckpointError
from app.models.base import TwoStageModel
from app.models.loading import BUILTIN, LoadOptions, load_model
from app.registry import Registry, ServedModel
from app.service import EmbeddingService, EmbedPolicy
from app.settings import ModelSettings, Settings
from app.stores.batches import SqlBatchStore
from app.stores.database import Database
from app.stores.files import SqlFileStore
from app.stores.sql import SqlContextStore
from app.telemetry.metrics import BUILD, MODEL
from app.tokenizer_threads import TokenizerThreads
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
    return [[_load(model, device) for model in settings.models] for device in devices_of(settings)]


def assemble(
    settings: Settings,
    database: Database,
    replicas: list[list[ServedModel]],
    on_fatal: Callable[[Exception], None],
) -> Parts:
    """Nothing runs yet. `on_fatal`: told, in any thread, when the engine is beyond repair. Raises ConfigError."""
    registry = Registry(replicas[0])
    _say_what_runs(replicas)
    limits, wanted = settings.limits, settings.contexts
    engine = engine_of(settings, replicas, on_fatal)
    store, threads, tokenizing = SqlContextStore(database), database.threads, TokenizerThreads()
    builder = ContextBuilder(engine, tokenizing)
    contexts = Contexts(
        builder,
        store,
        threads,
        cache_bytes=wanted.cache_bytes,
        stale_seconds=wanted.stale_seconds,
        default=wanted.default,
    )
    catalog = Catalog(
        contexts, builder, store, threads, keep_documents=wanted.keep_documents, candidates=wanted.diverse_candidates
    )
    policy = EmbedPolicy(
        max_tokens=limits.max_tokens_per_request,
        truncate=settings.truncate,
        integers=settings.token_ids,
        default_context=wanted.default,
        require_context=wanted.require_context,
    )
    vectors = VectorCache(engine, max_bytes=limits.vector_cache_bytes)
    service = EmbeddingService(registry, contexts, vectors, tokenizing, policy)
    batches, files = SqlBatchStore(database), SqlFileStore(database)
    work = BatchWork(
        batches,
        files,
        threads,
        LineAnswers(service, settings),
        max_lines=limits.max_batch_lines,
        max_line_bytes=limits.max_line_bytes,
    )
    runner = BatchRunner(batches, files, threads, work)
    return Parts(
        registry,
        engine,
        contexts,
        catalog,
        service,
        runner,
        Batches(batches, files, threads, runner, max_unfinished=limits.max_unfinished_batches),
    )


def engine_of(
    settings: Settings, replicas: list[list[ServedModel]], on_fatal: Callable[[Exception], None] = lambda _: None
) -> Engine:
    """The engine over these devices, not started. `on_fatal`: see assemble."""
    registry, limits = Registry(replicas[0]), settings.limits
    device = registry.default.spec.device
    return Engine(
        [{served.id: served.model for served in replica} for replica in replicas],
        EngineOptions(
            batch_tokens=settings.engine.batch_tokens_on(device),
            queue_tokens=limits.queue_tokens,
            cache_bytes=settings.contexts.cache_bytes,
            workers=settings.engine.workers_on(device),
            interactive_texts=settings.engine.interactive_texts,
            queue_seconds=limits.queue_seconds,
            stuck_seconds=settings.engine.stuck_seconds,
            ride=device != "cpu",
        ),
        exact=lambda model_id, device: _in_float32(settings, registry, model_id, device),
        on_fatal=on_fatal,
    )


def _say_what_runs(replicas: list[list[ServedModel]]) -> None:
    devices = dict.fromkeys(replica[0].spec.device for replica in replicas)
    BUILD.labels(version("cde-server"), version("torch"), ",".join(devices)).set(1)
    for spec in (served.spec for served in replicas[0]):
        MODEL.labels(spec.id, spec.family, spec.semantics, spec.dtype, spec.device, spec.revision[:12]).set(1)


def devices_of(settings: Settings) -> list[str | None]:
    """Where all models are loaded; None: each where its own settings say."""
    return [*settings.engine.devices] or [None]


def _in_float32(settings: Settings, registry: Registry, model_id: str, device: str) -> TwoStageModel:
    """The model once more on `device`, as exactly as it can be computed. Raises CheckpointError."""
    chosen = next(model for model in settings.models if served_names(model)[0] == model_id)
    exact = load_model(chosen.name, replace(options_of(chosen, device), dtype="float32")).model
    if exact.spec.revision != registry.get(model_id).spec.revision:
        raise CheckpointError(f"{chosen.name} has other weights now than those that are served")
    return exact


def options_of(settings: ModelSettings, device: str | None = None) -> LoadOptions:
    return LoadOptions(
        id=served_names(settings)[0],
        revision=settings.revision,
        semantics=settings.semantics,
        output_residual=settings.output_residual,
        mask_instruction=settings.mask_instruction,
        first_stage=settings.first_stage,
        dtype=settings.dtype,
        device=device or settings.device,
        context_attention=settings.context_attention,
        cuda_graphs=settings.cuda_graphs,
    )


def _load(settings: ModelSettings, device: str | None = None) -> ServedModel:
    started = time.perf_counter()
    loaded = load_model(settings.name, options_of(settings, device))
    spec = loaded.model.spec
    log.info(
        "loaded %s from %s: family %s, semantics %s, %s on %s, in %.1f s",
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
    return ServedModel(served_names(settings), loaded.model, loaded.tokenizer, settings.matryoshka)


def served_names(settings: ModelSettings) -> tuple[str, ...]:
    """The id first, then its last part where it has an owner, then the aliases."""
    path = Path(settings.name).expanduser()
    own = settings.served_name or (path.resolve().name if settings.name != BUILTIN and path.is_dir() else settings.name)
    return tuple(dict.fromkeys((own, own.rpartition("/")[2], *settings.aliases)))
