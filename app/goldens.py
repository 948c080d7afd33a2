"""Runs golden cases through tokenizer, engine and model, and holds the outcome against the reference's arrays.

The folder's format: `cases.json`, `expected.safetensors` and a checkpoint; see tests/goldens/README.md.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from app.domain import DATASET_EMBEDDINGS, FloatArray, InputType, Payload, Stage
from app.errors import CheckpointError
from app.models.loading import LoadOptions
from app.offline import Offline
from app.vectors import normalized

VARIANTS = {"train": "training", "hub": "hub"}
TOLERANCE_ROW = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class Difference:
    """One array against the expected one; `limit` is the tolerance on max_abs_diff."""

    name: str
    max_abs_diff: float
    limit: float
    min_cos: float
    lowest_cos: float

    @property
    def ok(self) -> bool:
        return bool(self.max_abs_diff <= self.limit and self.min_cos >= self.lowest_cos)


@dataclass(frozen=True, slots=True)
class Goldens:
    """A folder of golden cases."""

    folder: Path
    header: Mapping[str, Any]
    expected: Mapping[str, FloatArray]

    @classmethod
    def read(cls, folder: Path) -> "Goldens":
        """Raises CheckpointError."""
        try:
            header = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
            return cls(folder, header, load_file(folder / "expected.safetensors"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} is no folder of golden cases: {error}") from error

    def run(self, variant: str, options: LoadOptions) -> Iterator[tuple[str, FloatArray]]:
        """Every required array of a variant, by its name there. Raises CheckpointError."""
        semantics: Any = VARIANTS[variant]
        with Offline(str(self.folder), replace(options, semantics=semantics)) as offline:
            own: dict[str, FloatArray] = {}
            for case in self.header["cases"]:
                names = case["expected"].get("any" if case["stage"] == 1 else variant)
                if names is None or case.get("optional"):
                    continue
                raw = self._outcome(offline, case, own)
                yield names["raw"], raw
                if "unit" in names:
                    yield names["unit"], normalized(raw)

    def difference(self, name: str, got: FloatArray, dtype: str) -> Difference:
        """Raises KeyError for a name that is not expected."""
        tolerance, expected = self.header["tolerances"][TOLERANCE_ROW[dtype]], self.expected[name]
        unit = name.endswith("/unit")
        limit = tolerance["unit_atol"] if unit else tolerance["raw_rtol_of_max"] * float(np.abs(expected).max())
        a, b = got.astype(np.float64), expected.astype(np.float64)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosine = float(((a * b).sum(axis=1) / np.maximum(norms, 1e-30)).min())
        return Difference(name, float(np.abs(a - b).max()), limit, cosine, tolerance["min_cos"])

    def _outcome(self, offline: Offline, case: Mapping[str, Any], own: dict[str, FloatArray]) -> FloatArray:
        tokenizer = offline.served.tokenizer.limited_to(case["max_length"])
        kind = InputType(case["prompt"])
        tokens = tokenizer.texts(case["texts"], kind, truncate=True)
        ids = [list(text.input_ids) for text in tokens]
        if ids != case["input_ids"]:
            raise CheckpointError(
                f"{self.folder}: case {case['name']}: the tokenizer gives other ids than the reference's"
            )
        if case["stage"] == 1:
            vectors = offline.submit(Stage.FIRST, tokens, Payload("no corpus arrays", {})).result()
            own[case["name"]] = vectors
            return vectors
        dataset = case["dataset"]
        source = own[dataset["from_case"]] if dataset.get("end_to_end") else self._golden(dataset["from_case"])
        rows = dataset["rows"]
        if rows and isinstance(rows[0], list):  # one context for each text
            futures = [
                offline.submit(Stage.SECOND, [text], _payload(f"{case['name']}:{i}", source[rows[i]]))
                for i, text in enumerate(tokens)
            ]
            return np.concatenate([future.result() for future in futures])
        return offline.submit(Stage.SECOND, tokens, _payload(case["name"], source[rows])).result()

    def _golden(self, case_name: str) -> FloatArray:
        return self.expected[f"first_stage/{case_name}"]


def _payload(key: str, rows: FloatArray) -> Payload:
    return Payload(key, {DATASET_EMBEDDINGS: rows})
