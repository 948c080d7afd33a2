"""`cde-server embed --engine ray`: a corpus of any size through a Ray cluster into a folder of Parquet files."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer

from app.cli.options import messages, progress
from app.corpora import BadCorpus
from app.domain import Payload
from app.errors import ConfigError
from app.offline import Offline
from app.scale.folders import absolute, filesystem, text_files
from app.scale.job import Job, Pool, Recipe
from app.scale.parts import Corpus

ContextOf = Callable[[Offline], Payload]

WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Ray: actors with the model; absent: as many as the cluster has room for")
]
CpusOption = Annotated[int | None, typer.Option(min=1, help="Ray: cores of each worker; absent: 1")]
GpusOption = Annotated[
    float | None, typer.Option(min=0, help="Ray: GPUs of each worker, 0.5 for two on one; absent: 1 on CUDA, else 0")
]
KeepOption = Annotated[list[str] | None, typer.Option(help="Ray: a column to keep beside the vectors; once for each")]
PartRowsOption = Annotated[int | None, typer.Option(min=1, help="Ray: texts of one output file; absent: 4096")]

PART_ROWS = 4096


@dataclass(frozen=True, slots=True)
class RayOptions:
    """The options above as they were given."""

    workers: int | None = None
    cpus: int | None = None
    gpus: float | None = None
    keep: tuple[str, ...] = ()
    part_rows: int | None = None


def embed_on_ray(recipe: Recipe, context_of: ContextOf, input_: str, output: str, options: RayOptions) -> None:
    """Raises ConfigError where Ray is not installed, BadCorpus, and what the workers raise."""
    own = sorted({"_id", "_path", "_row", "embedding"} & set(options.keep))
    if own:
        raise ConfigError(f"--keep {own[0]} is a column of the output itself: rename it in the corpus")
    ray_data = _ray_data()
    source, target = absolute(input_), absolute(output)
    if PurePosixPath(filesystem(target)[1]).is_relative_to(filesystem(source)[1]):
        raise ConfigError(f"{output} is in {input_}, whose files of the next run it would be: choose another folder")
    folder, names = text_files(source)
    corpus = Corpus(source, folder, tuple(names), options.keep, options.part_rows or PART_ROWS)
    ray_data.connect()
    parts = ray_data.cut_corpus(corpus)
    if not parts:
        raise BadCorpus(f"{input_} holds no text")
    with Offline(recipe.model, recipe.options) as offline:
        context, spec = context_of(offline), offline.spec
    del offline  # its weights are the workers' room
    fingerprint = recipe.fingerprint(spec, context)
    device = spec.device.partition(":")[0]  # Ray says which card
    gpus = options.gpus if options.gpus is not None else float(device == "cuda")
    model = absolute(recipe.model) if Path(recipe.model).is_dir() else recipe.model
    recipe = replace(recipe, model=model, options=replace(recipe.options, device=device))
    job = Job(corpus, recipe, fingerprint, target, Pool(options.workers or 0, options.cpus or 1, gpus))
    total = sum(part.rows for part in parts)
    with progress() as bar:
        task = bar.add_task("embedding", total=total)
        for rows in ray_data.embed_parts(job, parts, context):
            bar.advance(task, rows)
    messages.print(f"{total} vectors in {output}, context {context.key}, fingerprint {fingerprint}")


def _ray_data() -> Any:
    """The one module of the command line that needs Ray, whose import takes a second."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--engine ray needs Ray: pip install -e '.[ray]' in a checkout")
    return importlib.import_module("app.scale.corpus")
