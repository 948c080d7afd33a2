"""The golden self-check: fixed texts under a fixed context, before a model answers anybody.

The vectors are held against those that the same checkpoint is known to give (`references.py`): what the package ships
for the embedded default, else what the first start on this `data_dir` computed. It notices kernels that compute
something else on this machine, a library that changed, weights that give NaN.

A reference is float32 where it can be: one that a bfloat16 or int8 start had to make is held to the rounding of both,
and replaced as soon as a more exact start agrees with it. So nothing is ever compared more closely than it was made.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.domain import Arrays, FloatArray, InputType, ModelSpec, Payload, Stage, TokenizedText
from app.engine.engine import Engine
from app.errors import SelfCheckError, ServiceError
from app.models.base import TwoStageModel
from app.references import Reference, References
from app.registry import ServedModel
from app.vectors import normalized

log = logging.getLogger(__name__)

ROUNDING: Mapping[str, float] = {"float32": 5e-4, "bfloat16": 0.05, "int8": 0.15}
"""How far rounding may move a vector, as a share of its length; 1 - cos is about half the square. Three times and more
what was measured: 0.015 in bfloat16, 0.057 in int8. Another computation lies far beyond: hub and training are at least
0.3 apart."""

FIRST, SECOND = "first_stage", "second_stage"
WAIT_SECONDS = 600.0

DOCUMENTS = (
    "The harbour was dredged in spring.",
    "Minutes of the lighthouse committee, 14 March. Present: the keeper, two pilots, the clerk of works. The lamp was "
    "out for eleven minutes in the gale of the 9th; the spare burner took over as it should. It was resolved to order "
    "forty metres of wick, to have the fog signal's bearings greased before Easter, and to ask the county whether the "
    "road along the dyke could be closed to carts above two tonnes while the revetment is being repaired.",
)
TEXTS: Sequence[tuple[str, InputType]] = (
    ("when does the ferry leave?", InputType.QUERY),
    ("Naïve café: 東京 → Zürich, 3.14 € (50 %) 😀", InputType.QUERY),
    ("The ferry leaves at noon.", InputType.DOCUMENT),
    (
        "A tide table gives the time and the height of high and of low water for each day at one place, its standard "
        "port. It is computed a year ahead from the harmonic constants of the place: amplitudes and phases of some "
        "tens of partial tides, each of which has the period of one motion of the moon or the sun. The largest, M2, "
        "comes round twice in a lunar day of 24 hours and 50 minutes; S2 twice in a solar one. When both are in step, "
        "a little after new and full moon, there are springs: the high waters are higher, and the low waters lower "
        "than the mean. A week later they work against each other, and there are neaps. For places between the "
        "standard ports, the table lists differences in time and height, to be added to those of the nearest port. "
        "None of this knows the weather. A strong onshore wind can raise the sea by a metre above what is printed, "
        "and a high barometer presses it down by about one centimetre for each hectopascal; so harbour masters read "
        "the table, look at the glass, and keep a hand's breadth of water in reserve under the keel.",
        InputType.DOCUMENT,
    ),
)
AT_START = (TEXTS[1], TEXTS[3])
"""The odd one and the long one: behind a context of 512 rows short texts take nearly as long, and show less."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One stage's vectors against the known ones: the largest distance, as a share of the known vector's length."""

    stage: str
    distance: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.distance <= self.limit


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the self-check saw. `reference` None: nothing was known, and `kept` says where it is now."""

    findings: Sequence[Finding]
    reference: Reference | None
    kept: Path | None


def check(engine: Engine, served: ServedModel, references: References) -> Outcome:
    """Raises SelfCheckError where the vectors differ from the known ones, or are none. Blocks until they are there."""
    outcome = examine(engine, served, references)
    wrong = next((finding for finding in outcome.findings if not finding.ok), None)
    if wrong is not None and outcome.reference is not None:
        raise SelfCheckError(_complaint(served.spec, wrong, outcome.reference))
    return outcome


def examine(engine: Engine, served: ServedModel, references: References) -> Outcome:
    """As `check`, but a difference is only told. Raises SelfCheckError where there are no vectors to compare."""
    spec, vectors = served.spec, compute(engine, served)
    key = key_of(spec)
    reference = references.find(key, {name: array.shape for name, array in vectors.items()})
    if reference is None:
        kept = references.keep(key, vectors, spec)
        log.info("self-check of %s: nothing to compare with yet; its vectors are in %s", spec.id, kept or "no file")
        return Outcome((), None, kept)
    limit = ROUNDING[spec.dtype] + ROUNDING[reference.dtype]
    findings = [Finding(name, distance(array, reference.arrays[name]), limit) for name, array in vectors.items()]
    kept = None
    if all(finding.ok for finding in findings):
        log.info("self-check of %s: within %.1e of %s", spec.id, max(f.distance for f in findings), reference.path)
        if ROUNDING[spec.dtype] < ROUNDING[reference.dtype]:
            kept = references.keep(key, vectors, spec)
    return Outcome(findings, reference, kept)


def key_of(spec: ModelSpec) -> str:
    """See key_for."""
    return key_for(
        spec.revision,
        spec.tokenizer_revision,
        spec.semantics,
        spec.max_length,
        spec.corpus_size,
        has_first_stage=spec.has_first_stage,
    )


def key_for(
    revision: str,
    tokenizer_revision: str,
    semantics: str,
    max_length: int,
    corpus_size: int,
    *,
    has_first_stage: bool,
) -> str:
    """Names everything that decides the vectors besides their precision: weights, tokenizer, semantics, and the texts;
    and which stages there are."""
    sizes = map(str, (max_length, corpus_size, has_first_stage))
    texts = (text for text, _ in (*TEXTS, *AT_START))
    parts = (revision, tokenizer_revision, semantics, *sizes, *DOCUMENTS, *texts)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def compute(engine: Engine, served: ServedModel) -> Arrays:
    """Raw vectors: of DOCUMENTS (2, hidden_size) where there is a first stage, of AT_START (2, hidden_size).

    Raises SelfCheckError.
    """
    model = served.model
    vectors: dict[str, FloatArray] = {}
    try:
        if served.spec.has_first_stage:
            documents = tokenized(served, [(text, InputType.DOCUMENT) for text in DOCUMENTS])
            corpus = Payload("selfcheck:corpus", model.corpus_arrays(documents))
            vectors[FIRST] = engine.submit(served.id, Stage.FIRST, documents, corpus).result(WAIT_SECONDS)
        context = Payload("selfcheck", synthetic_context(model))
        texts = tokenized(served, AT_START)
        vectors[SECOND] = engine.submit(served.id, Stage.SECOND, texts, context).result(WAIT_SECONDS)
    except (ServiceError, TimeoutError) as error:
        told = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise SelfCheckError(
            f"The self-check of {served.id} ({served.spec.dtype} on {served.spec.device}) failed: fixed texts get no "
            f"vectors ({told}). Its weights or this machine cannot be used as they are."
        ) from error
    return vectors


def tokenized(served: ServedModel, texts: Sequence[tuple[str, InputType]]) -> list[TokenizedText]:
    """Each under its own input type."""
    return [served.tokenizer.texts([text], kind, truncate=True)[0] for text, kind in texts]


def distance(found: FloatArray, expected: FloatArray) -> float:
    """The largest distance of two rows, as a share of the expected one's length: sees directions and lengths."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    apart = np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(b, axis=1), 1e-30)
    return float(apart.max())


def synthetic_context(model: TwoStageModel) -> Arrays:
    """A context that no document and no first stage made: unit rows, and weights between 0 and 1.

    RandomState, because its numbers are the same in every version of numpy.
    """
    drawn = np.random.RandomState(0)
    arrays: dict[str, FloatArray] = {}
    for name, shape in sorted(model.context_shapes(model.spec.corpus_size).items()):
        values = drawn.random_sample(shape).astype(np.float32)
        arrays[name] = normalized(values - np.float32(0.5)) if len(shape) == 2 else values
    return arrays


def _complaint(spec: ModelSpec, wrong: Finding, reference: Reference) -> str:
    advice = "" if reference.is_shipped else " If the file is what is wrong, remove it: it is made anew."
    return (
        f"The self-check of {spec.id} ({spec.dtype} on {spec.device}) failed: its {wrong.stage} vectors lie "
        f"{wrong.distance:.2g} of their length from those in {reference.path} (made by {reference.made_by}); rounding "
        f"explains {wrong.limit:.2g}. Something computes differently here: try another dtype or device, and look "
        f"closer with `cde-server verify --model`.{advice}"
    )
