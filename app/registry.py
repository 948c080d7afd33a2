"""The served models, and what a model name asks for: `MODEL[@CONTEXT[.VERSION]][:INPUT_TYPE]`."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.domain import InputType, ModelSpec
from app.errors import ConfigError, ModelNotFound
from app.models.base import TwoStageModel
from app.tokenization import TextTokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model under the names clients use for it. `names[0]` is its id."""

    names: tuple[str, ...]
    model: TwoStageModel
    tokenizer: TextTokenizer
    matryoshka: bool = False

    @property
    def id(self) -> str:
        return self.names[0]

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model name taken apart."""

    served: ServedModel
    context: str | None = None
    input_type: InputType | None = None


class Registry:
    """All served models; the first is the default."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        """Raises ConfigError where two models have a name in common."""
        self.models = tuple(models)
        check_distinct([served.names for served in self.models])
        self._by_name = {name: served for served in self.models for name in served.names}

    @property
    def default(self) -> ServedModel:
        return self.models[0]

    def get(self, name: str) -> ServedModel:
        """By the name alone, where selectors mean nothing. Raises ModelNotFound."""
        served = self._by_name.get(name)
        if served is None:
            selected = any(name.startswith((f"{known}@", f"{known}:")) for known in self._by_name)
            hint = " Here a model is named without @CONTEXT and :INPUT_TYPE." if selected else ""
            raise self._not_found(name, hint)
        return served

    def choose(self, name: str) -> ModelChoice:
        """Takes `MODEL[@CONTEXT[.VERSION]][:INPUT_TYPE]` apart. Raises ModelNotFound."""
        if name in self._by_name:
            return ModelChoice(self._by_name[name])
        base, input_type = name, None
        head, colon, tail = name.rpartition(":")
        if colon and tail in tuple(InputType):
            base, input_type = head, InputType(tail)
        model, at, context = base.rpartition("@")
        served = self._by_name.get(model if at else base)
        if served is None or (at and ":" in context):
            wrong_type = head in self._by_name or served is not None
            hint = f" Behind ':' stands one of {', '.join(InputType)}." if wrong_type else ""
            raise self._not_found(name, hint)
        return ModelChoice(served, context if at else None, input_type)

    def _not_found(self, name: str, hint: str) -> ModelNotFound:
        served = ", ".join(self._by_name)
        return ModelNotFound(f"The model '{name[:200]}' does not exist here.{hint} Served: {served}.", param="model")


def check_distinct(names_of_models: Sequence[Sequence[str]]) -> None:
    """Raises ConfigError where two models have a name in common."""
    names = [name for names in names_of_models for name in names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"Several models are called {', '.join(twice)}: set served_name or aliases of one of them")
