"""Ray Data: the parts of a corpus through a pool of actors with the model.

Ray finds the machines, keeps the actors fed and starts dead ones again. What it hands out is parts, not rows: an actor
reads, embeds and writes a part by itself, so that one that is computed twice is written once, and one that is there is
not computed.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import ActorDiedError

from app.corpora import BadCorpus
from app.domain import Payload
from app.errors import ConfigError, ServiceError, StartupError
from app.offline import Offline
from app.scale.folders import Output
from app.scale.job import Job, Pool
from app.scale.parts import Corpus, Part, cut, read
from app.vectors import normalized

AT_ONCE = 2
"""Parts in an actor: one is read or written while the other is computed."""
REFUSALS = (BadCorpus, ServiceError, OSError)
"""What is wrong with the texts or their place comes back as an answer: Ray would show a worker's traceback instead."""


def connect() -> None:
    """To the cluster that RAY_ADDRESS or `ray start` names; else to one of this machine's own, for this process."""
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def cut_corpus(corpus: Corpus) -> list[Part]:
    """All parts, in order; files are read side by side. Raises BadCorpus, OSError."""

    def parts(row: dict[str, Any]) -> list[dict[str, Any]]:
        try:
            return [asdict(part) | {"refused": ""} for part in cut(corpus, row["name"])]
        except REFUSALS as error:
            return [{"refused": str(error)}]

    names = ray.data.from_items([{"name": name} for name in corpus.names], override_num_blocks=len(corpus.names))
    found = [Part(**row) for row in _rows(names.flat_map(parts))]
    return sorted(found, key=lambda part: (part.name, part.first))


def embed_parts(job: Job, parts: Sequence[Part], context: Payload) -> Iterator[int]:
    """Writes what is missing of the output; gives numbers of rows as they are there, those of earlier runs first.

    Raises ConfigError where the folder holds other vectors, and what the workers raise.
    """
    output, names = Output(job.output), {part.output for part in parts}
    there = output.begin(job.made_of(context))
    if foreign := there - names:
        raise ConfigError(
            f"{job.output} holds {len(foreign)} files that are no parts of the input as it is now, {min(foreign)} "
            f"among them: their texts have changed or are gone, or they are of something else. Remove them, or choose "
            f"another folder."
        )
    missing = [part for part in parts if part.output not in there]
    yield sum(part.rows for part in parts if part.output in there)
    if missing:
        for row in _rows(_embedded(job, missing, context)):
            yield row["rows"]
    if lost := names - output.parts():
        raise OSError(f"{job.output} has lost {len(lost)} parts while it was written, {min(lost)} among them")
    rows = sum(part.rows for part in parts)
    output.complete({"model": job.recipe.model, "parts": len(parts), "rows": rows})


def _embedded(job: Job, parts: Sequence[Part], context: Payload) -> Dataset:
    source = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts))
    return source.map(
        Embedder,
        fn_constructor_args=(job, ray.put(context)),
        num_cpus=job.pool.cpus,
        num_gpus=job.pool.gpus,
        compute=ActorPoolStrategy(
            size=min(_room(job.pool), len(parts)),
            max_concurrent_calls_per_actor=AT_ONCE,
            max_tasks_in_flight_per_actor=AT_ONCE,
            enable_true_multi_threading=True,
        ),
    )


def _room(pool: Pool) -> int:
    """How many workers there will be. Raises ConfigError where there is room for none."""
    there = ray.cluster_resources()
    needs = {"CPU": pool.cpus, "GPU": pool.gpus}
    fits = min(int(there.get(kind, 0) // need) for kind, need in needs.items() if need)
    if not (pool.workers or fits):
        raise ConfigError(f"The Ray cluster has no room for a worker of {pool.cpus} CPUs and {pool.gpus:g} GPUs")
    return pool.workers or fits


class Embedder:
    """The actor: one loaded model, and the context."""

    def __init__(self, job: Job, context: "ray.ObjectRef[Payload]") -> None:
        """Raises CheckpointError, ConfigError."""
        self._job, self._output = job, Output(job.output)
        shared: Payload = ray.get(context)
        arrays = {name: array.copy() for name, array in shared.arrays.items()}  # torch takes no read-only memory
        self._context = Payload(shared.key, arrays)
        self._offline = Offline(job.recipe.model, job.recipe.options, workers=0 if job.pool.gpus else job.pool.cpus)
        self._computing = threading.Lock()
        if job.recipe.fingerprint(self._offline.spec, self._context) != job.fingerprint:
            raise ConfigError(f"The weights, the tokenizer or the precision of {job.recipe.model} differ by machine")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A part, as a row of Ray's, into the output; gives how many vectors it has, or why it has none."""
        part = Part(**row)
        try:
            return {"rows": self._embed(part), "refused": ""}
        except REFUSALS as error:
            return {"rows": 0, "refused": f"{part.name}, the {part.rows} texts from {part.first} on: {error}"}

    def _embed(self, part: Part) -> int:
        recipe = self._job.recipe
        texts, columns = read(self._job.corpus, part)
        with self._computing:  # part behind part, so that the next one is read and the last one written meanwhile
            chunks = list(self._offline.embed(texts, self._context, recipe.input_type, truncate=recipe.truncate))
        vectors = np.concatenate(chunks)
        flat = pa.array((normalized(vectors) if recipe.normalize else vectors).reshape(-1))
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        self._output.write(part.output, pa.table(columns))
        return len(vectors)


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Raises BadCorpus with what a worker refused, StartupError where workers cannot start."""
    try:
        for row in dataset.iter_rows():
            refused = row.pop("refused")
            if refused:
                raise BadCorpus(refused)
            yield row
    except ActorDiedError as error:
        raise StartupError(f"No worker could start: {str(error).splitlines()[-1]}") from error
