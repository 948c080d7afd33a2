"""What a request asks for: parsed, and every source that says the same thing held against the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from app.domain import ANYBODY, SHARED, Caller, InputType
from app.errors import InvalidRequest
from app.registry import ModelChoice, ServedModel


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """One request, parsed. `contexts` and `input_types`: every source that named one, to be held against each other."""

    model: str
    texts: Sequence[str] | None = None
    token_ids: Sequence[Sequence[int]] | None = None
    inline_documents: Sequence[str] | None = None
    contexts: Mapping[str, str] = field(default_factory=dict)
    input_types: Mapping[str, str] = field(default_factory=dict)
    truncate: str | None = None
    dimensions: int | None = None
    normalize: bool = True
    expect_fingerprint: str | None = None
    namespace: str = SHARED
    """Whose contexts are seen."""
    caller: Caller = ANYBODY


def agreed(what: str, sources: Mapping[str, str]) -> str | None:
    """The one value all sources give; None: there are none. Raises InvalidRequest."""
    values = set(sources.values())
    if len(values) > 1:
        raise InvalidRequest(f"{quoted(sources)} name different {what}s. Send one of them.", param=next(iter(sources)))
    return values.pop() if values else None


def quoted(sources: Mapping[str, str]) -> str:
    return " and ".join(f"'{source}' ({value[:80]})" for source, value in sources.items())


def input_type_of(choice: ModelChoice, sources: Mapping[str, str]) -> InputType | None:
    """As the model name and all others say. Raises InvalidRequest."""
    named = dict(sources)
    if choice.input_type is not None:
        named["model"] = choice.input_type.value
    text = agreed("input type", named)
    if text is None:
        return None
    try:
        return InputType(text)
    except ValueError as error:
        raise InvalidRequest(
            "Invalid input type: it is 'query', 'document' or 'none'.", param=next(iter(named))
        ) from error


def dimensions_of(served: ServedModel, asked: int | None) -> int:
    """Of the answer. Raises InvalidRequest for a size the model does not give."""
    native = served.spec.hidden_size
    if asked is None or asked == native:
        return native
    if served.matryoshka and asked < native:
        return asked
    allowed = f"1 to {native}" if served.matryoshka else f"{native} (or leave it out)"
    raise InvalidRequest(f"Invalid 'dimensions': {served.id} gives vectors of {allowed}.", param="dimensions")
