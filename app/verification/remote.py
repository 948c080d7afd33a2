"""A running server, held from outside against what its models are known to give: through the public API alone.

Fixed texts are embedded under a context of fixed documents sent with the request, so that nothing is stored there.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson

from app.domain import FloatArray, InputType, ModelSpec, Selection, Stage
from app.offline import Offline
from app.references import SHIPPED, References
from app.selfcheck import DOCUMENTS, ROUNDING, TEXTS, distance, key_for, tokenized
from app.vectors import normalized

INLINE = "inline"
"""The name, in shipped references, of the vectors (4, hidden_size) of TEXTS under DOCUMENTS sent along."""

Call = Callable[[str, str, bytes | None], "Answer"]
"""Method, path and JSON body -> the server's answer; one that is refused does not come back."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Body and headers (names in lower case)."""

    body: Any
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Known:
    """What a model's texts should give; with a local copy of it also under which context and fingerprint."""

    vectors: FloatArray
    dtype: str
    source: str
    context_id: str | None = None
    spec: ModelSpec | None = None

    @classmethod
    def computed(cls, offline: Offline) -> "Known":
        """By a local copy. Raises ServiceError."""
        context = offline.context_of(DOCUMENTS, Selection())
        vectors = offline.submit(Stage.SECOND, tokenized(offline.served, TEXTS), context).result()
        spec = offline.spec
        return cls(vectors, spec.dtype, f"{spec.source}, here in {spec.dtype}", context.key, spec)

    @classmethod
    def shipped(cls, served: Mapping[str, Any]) -> "Known | None":
        """By this package, for an entry of /info."""
        size = served["dimensions"]
        key = key_for(
            served["weights_sha256"],
            served["tokenizer_sha256"],
            served["semantics"],
            served["max_input_tokens"],
            served["corpus_size"],
            has_first_stage=served["first_stage"],
        )
        found = References(SHIPPED).find(key, {INLINE: (len(TEXTS), size)})
        if found is None:
            return None
        return cls(found.arrays[INLINE], found.dtype, "the vectors that this package ships")


@dataclass(frozen=True, slots=True)
class Check:
    """One promise: the number seen, and the one it may not exceed."""

    name: str
    seen: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.seen <= self.limit  # NaN is not


def checks_of(call: Call, served: Mapping[str, Any], known: Known | None) -> list[Check]:
    """All checks of one model, an entry of /info."""
    rounding = ROUNDING[served["dtype"]]
    alone = [_embedded(call, served["id"], [text], kind) for text, kind in TEXTS]
    together: list[Answer] = []
    backwards: list[Answer] = []
    as_floats: list[Answer] = []
    for kind in (InputType.QUERY, InputType.DOCUMENT):
        texts = [text for text, its_kind in TEXTS if its_kind is kind]
        together.append(_embedded(call, served["id"], texts, kind))
        backwards.append(_embedded(call, served["id"], texts[::-1], kind))
        as_floats.append(_embedded(call, served["id"], texts, kind, encoding="float"))
    vectors = _rows(alone)
    batched, floats = _rows(together), _rows(as_floats)
    reversed_back = np.concatenate([_vectors(answer)[::-1] for answer in backwards])
    answers = [*alone, *together, *backwards, *as_floats]
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    checks = [
        Check("values that are no finite number", float((~np.isfinite(vectors)).sum()), 0),
        Check("length of a vector, away from 1", float(np.abs(lengths - 1).max()), 1e-5),
        Check("a text alone, and in a batch", distance(batched, vectors), rounding),
        Check("texts in another order", distance(reversed_back, vectors), rounding),
        Check("as base64, and as floats", distance(floats, batched), rounding),
        Check("indices that are out of order", float(sum(map(_misplaced, answers))), 0),
        Check("fingerprints, beyond the first", float(len(_headers(answers, "x-embedding-fingerprint")) - 1), 0),
        Check("context ids, beyond the first", float(len(_headers(answers, "x-context-id")) - 1), 0),
    ]
    if known is not None:
        checks += _against(known, vectors, answers[0], served)
    return checks


def _against(known: Known, vectors: FloatArray, answer: Answer, served: Mapping[str, Any]) -> list[Check]:
    limit = ROUNDING[served["dtype"]] + ROUNDING[known.dtype]
    checks = [Check("distance from the known vectors", distance(vectors, normalized(known.vectors)), limit)]
    if known.context_id is not None and known.spec is not None:
        context_id = answer.headers.get("x-context-id")
        spec = replace(known.spec, dtype=served["dtype"])
        expected = spec.fingerprint(known.context_id, spec.hidden_size, normalized=True)
        checks += [
            Check("another context id than here", float(context_id != known.context_id), 0),
            Check("another fingerprint than here", float(answer.headers.get("x-embedding-fingerprint") != expected), 0),
        ]
    return checks


def _embedded(call: Call, model: str, texts: Sequence[str], kind: InputType, encoding: str = "base64") -> Answer:
    body = {
        "model": model,
        "input": texts,
        "input_type": kind.value,
        "context": {"documents": DOCUMENTS},
        "truncate": "end",
        "encoding_format": encoding,
    }
    return call("POST", "/v1/embeddings", orjson.dumps(body))


def _rows(answers: Sequence[Answer]) -> FloatArray:
    return np.concatenate([_vectors(answer) for answer in answers])


def _vectors(answer: Answer) -> FloatArray:
    """(n, dimensions), in the order of the answer."""
    rows = [item["embedding"] for item in answer.body["data"]]
    if isinstance(rows[0], str):
        return np.stack([np.frombuffer(base64.b64decode(row), dtype="<f4") for row in rows])
    return np.array(rows, dtype=np.float32)


def _misplaced(answer: Answer) -> int:
    return sum(item["index"] != i for i, item in enumerate(answer.body["data"]))


def _headers(answers: Sequence[Answer], name: str) -> set[str | None]:
    return {answer.headers.get(name) for answer in answers}
