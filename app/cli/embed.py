"""`cde-server embed`: texts to vectors, offline: a file in this process, or a corpus on a Ray cluster."""

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import typer

from app.assembly import served_names
from app.cli.embed_on_ray import (
    ContextOf,
    CpusOption,
    GpusOption,
    KeepOption,
    PartRowsOption,
    RayOptions,
    WorkersOption,
    embed_on_ray,
)
from app.cli.options import (
    ConfigOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    RevisionOption,
    SeedOption,
    SemanticsOption,
    messages,
    progress,
)
from app.context_refs import parse_ref
from app.corpora import TEXT_SUFFIXES, BadCorpus, place_of, read_records
from app.domain import Arrays, InputType, Payload, Selection, Space
from app.embedding_files import PartialVectors, check_output, describe, digest_of
from app.errors import ConfigError, ContextLengthExceeded
from app.models.base import InvalidContext
from app.models.loading import LoadOptions
from app.offline import Offline
from app.payloads import read_arrays
from app.scale.job import Recipe
from app.settings import ModelSettings, Settings
from app.settings_sources import load_settings
from app.stores.database import Database
from app.stores.sql import SqlContextStore
from app.vectors import normalized


def embed(
    *,
    model: ModelOption,
    input_: Annotated[
        str, typer.Option("--input", help="Texts: .txt, .jsonl or .parquet; on Ray a folder or glob too")
    ],
    output: Annotated[str, typer.Option(help="Vectors: .npy, .safetensors, .jsonl or .parquet; on Ray a folder")],
    input_type: Annotated[InputType, typer.Option(help="Which prompt stands before a text")],
    context: Annotated[
        str | None, typer.Option(help="Documents, or dataset embeddings (.safetensors, .npy), or a stored context")
    ] = None,
    seed: SeedOption = 0,
    normalize: Annotated[bool, typer.Option(help="Vectors of unit length")] = True,
    truncate: Annotated[
        Literal["none", "end"], typer.Option(help="Texts over the max length: an error, or cut")
    ] = "none",
    engine: Annotated[Literal["local", "ray"], typer.Option(help="This process, or a Ray cluster")] = "local",
    workers: WorkersOption = None,
    num_cpus: CpusOption = None,
    num_gpus: GpusOption = None,
    keep: KeepOption = None,
    part_rows: PartRowsOption = None,
    revision: RevisionOption = None,
    semantics: SemanticsOption = "training",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    config: ConfigOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there")] = False,
) -> None:
    """Embed texts. A run that was cut short goes on where it stopped."""
    options = LoadOptions(revision=revision, semantics=semantics, dtype=dtype, device=device)
    recipe = Recipe(model, options, input_type, truncate == "end", normalize)
    context_of = partial(context_payload, given=context, seed=seed, config=config)
    on_ray = RayOptions(workers, num_cpus, num_gpus, tuple(keep or ()), part_rows)
    if engine == "ray":
        if overwrite:
            raise typer.BadParameter("--overwrite is not for --engine ray, which completes the output that is there")
        embed_on_ray(recipe, context_of, input_, output, on_ray)
    elif on_ray != RayOptions():
        raise typer.BadParameter("--workers, --num-cpus, --num-gpus, --keep and --part-rows are for --engine ray only")
    else:
        check_output(Path(output))
        if Path(output).exists() and not overwrite:
            raise typer.BadParameter(f"{output} is there: choose another output, or replace it with --overwrite")
        _embed_here(recipe, context_of, Path(input_), Path(output))


def _embed_here(recipe: Recipe, context_of: ContextOf, input_: Path, output: Path) -> None:
    total, digest = describe(input_)
    if not total:
        raise BadCorpus(f"{input_} holds no text")
    with Offline(recipe.model, recipe.options) as offline, progress() as bar:
        payload = context_of(offline)
        fingerprint = recipe.fingerprint(offline.spec, payload)
        made_of = f"{fingerprint} {recipe.input_type} {recipe.truncate} {digest}"
        with PartialVectors(output, dimensions=offline.spec.hidden_size, made_of=made_of) as partly:
            first = partly.done
            if first:
                messages.print(f"going on behind the first {first} texts")
            elif partly.thrown_away:
                messages.print(
                    f"beginning anew: the {partly.thrown_away} vectors that an earlier run left were of another model, "
                    f"context, input or option"
                )
            task = bar.add_task("embedding", total=total, completed=first)
            texts = (record.text for record in islice(read_records(input_), first, None))
            raw = offline.embed(texts, payload, recipe.input_type, truncate=recipe.truncate, first=first)
            chunks = (normalized(chunk) if recipe.normalize else chunk for chunk in raw)
            try:
                partly.extend(chunks, lambda n: bar.advance(task, n))
            except ContextLengthExceeded as error:
                raise BadCorpus(f"{place_of(input_, error.index)}: {error} (--truncate end)") from error
            if digest_of(input_) != digest:
                partly.discard()
                raise BadCorpus(f"{input_} has changed while it was embedded: run this again")
            partly.finish(read_records(input_))
    messages.print(f"{total} vectors in {output}, context {payload.key}, fingerprint {fingerprint}")


def context_payload(offline: Offline, given: str | None, seed: int, config: Path | None) -> Payload:
    """Documents, dataset embeddings or a stored context as the command line names them. Raises ConfigError."""
    if given is None:
        messages.print("no --context: the default one is used; one of your own documents retrieves better")
        return offline.default_context()
    path = Path(given)
    if path.suffix.lower() in TEXT_SUFFIXES:
        return offline.context_of((record.text for record in read_records(path)), Selection(seed=seed))
    if path.suffix.lower() in (".safetensors", ".npy"):
        try:
            arrays, weights = read_arrays(path.read_bytes(), npy=path.suffix.lower() == ".npy")
            payload = offline.context_from(arrays)
        except (InvalidContext, ValueError) as error:
            raise ConfigError(f"{path} is no context of {offline.spec.id}: {error}") from error
        if weights not in (None, offline.spec.revision):
            raise ConfigError(f"{path} was made with other weights than those of {offline.spec.id}")
        return payload
    if path.suffix and path.is_file():
        known = ", ".join((*TEXT_SUFFIXES, ".safetensors", ".npy"))
        raise ConfigError(f"{path}: unknown kind of file for a context; known: {known}")
    return Payload(*_stored(offline, given, config))


def _stored(offline: Offline, name: str, config: Path | None) -> tuple[str, Arrays]:
    """From the store of the server on this machine."""
    settings = load_settings({}, config)
    if settings.contexts.database_url is None and not settings.database_file.is_file():
        raise ConfigError(f"{name} is no file, and there is no context store in {settings.data_dir}")
    ref, store = parse_ref(name), SqlContextStore(Database(settings.database_url))
    try:
        found = (store.get(Space(model), ref) for model in _served_ids(offline.spec.id, settings))
        info = next((each for each in found if each), None)
        arrays = store.arrays(info.id) if info else None
    finally:
        store.close()
    if info is None or arrays is None:
        raise ConfigError(f"{name} is neither a file nor a context of {offline.spec.id} in the context store")
    if info.model_revision != offline.spec.revision:
        raise ConfigError(f"The context {name} was made with other weights of {offline.spec.id}")
    return info.id, arrays


def _served_ids(model: str, settings: Settings) -> list[str]:
    """What the server of these settings calls `model`, which is not its folder's path."""
    folder = Path(model).expanduser().resolve()
    named = [each for each in settings.models if each.name == model or Path(each.name).expanduser().resolve() == folder]
    return [served_names(each)[0] for each in named or [ModelSettings(name=model)]]
