"""What a run over a corpus is told: values that go to every worker."""

from dataclasses import dataclass
from typing import Any

from app.domain import InputType, ModelSpec, Payload
from app.models.loading import LoadOptions
from app.scale.parts import Corpus


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides a vector besides its text and its context."""

    model: str
    options: LoadOptions
    input_type: InputType
    truncate: bool
    normalize: bool

    def fingerprint(self, spec: ModelSpec, context: Payload) -> str:
        """Of the vectors that a model loaded from this makes."""
        return spec.fingerprint(context.key, spec.hidden_size, normalized=self.normalize)


@dataclass(frozen=True, slots=True)
class Pool:
    """`workers`: how many, 0: as many as there is room for; `cpus`, `gpus`: what each of them takes."""

    workers: int = 0
    cpus: int = 1
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Job:
    """`fingerprint`: of the driver's own model and context; a worker that would make other vectors is an error."""

    corpus: Corpus
    recipe: Recipe
    fingerprint: str
    output: str
    pool: Pool

    def made_of(self, context: Payload) -> dict[str, Any]:
        """What decides an output besides its texts."""
        return {
            "context": context.key,
            "fingerprint": self.fingerprint,
            "input_type": self.recipe.input_type.value,
            "truncate": self.recipe.truncate,
            "keep": list(self.corpus.keep),
            "part_rows": self.corpus.part_rows,
        }
