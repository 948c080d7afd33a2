"""What a checkpoint's own code computes, and which of our semantics computes the same.

That code runs in a process of its own (`hub_code.py`), without this server's settings and keys; the token ids are
ours, its first stage's rows are the context on both sides.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from app.domain import DATASET_EMBEDDINGS, FloatArray, InputType, Payload, Stage, TokenizedText
from app.errors import CheckpointError, ConfigError
from app.models.configuration import backbone_of, read_json
from app.models.contextual import Semantics
from app.models.files import locate
from app.models.loading import BUILTIN, LoadOptions
from app.offline import Offline
from app.selection import repeated
from app.vectors import cosines_of, normalized

PROGRAM = Path(__file__).with_name("hub_code.py")
SAME = 1e-4
"""Largest difference of unit vectors that still is the same computation in float32."""


@dataclass(frozen=True, slots=True)
class Theirs:
    """What the checkpoint's code gave: raw rows (documents, D), raw vectors (texts, D)."""

    first_stage: FloatArray
    second_stage: FloatArray
    made_by: str


@dataclass(frozen=True, slots=True)
class Row:
    """One of our ways to compute, against theirs: of unit vectors, the largest difference and the lowest cosine."""

    name: str
    settings: Mapping[str, object]
    max_abs_diff: float
    min_cos: float

    @property
    def same(self) -> bool:
        return self.max_abs_diff <= SAME


def compare(
    name: str, options: LoadOptions, texts: Sequence[str], *, python: str, variables: Mapping[str, str]
) -> tuple[str, Iterator[Row]]:
    """Who made the reference; then a row for the first stage, and one for each semantics of the second.

    Raises CheckpointError, ConfigError.
    """
    if name == BUILTIN:
        raise ConfigError(f"{BUILTIN} ships no code of its own to compare with")
    with Offline(name, options) as offline:
        spec = offline.spec
        documents = _tokens(offline, texts[: spec.corpus_size], InputType.DOCUMENT)
        asked = [*_tokens(offline, texts, InputType.QUERY), *_tokens(offline, texts, InputType.DOCUMENT)]
        own = offline.submit(Stage.FIRST, documents, Payload("no corpus arrays", {})).result()
        theirs = _run(name, options.revision, documents, asked, spec.corpus_size, python=python, variables=variables)
    _check(name, "first", theirs.first_stage, own.shape)
    _check(name, "second", theirs.second_stage, (len(asked), own.shape[1]))
    rows = np.stack(repeated(list(theirs.first_stage), spec.corpus_size))

    def found() -> Iterator[Row]:
        yield _row("first stage", {}, own, theirs.first_stage)
        for variant in variants(name, options):
            with Offline(name, variant) as again:
                vectors = again.submit(Stage.SECOND, asked, Payload("theirs", {DATASET_EMBEDDINGS: rows})).result()
            yield _row("second stage", _settings(variant), vectors, theirs.second_stage)

    return theirs.made_by, found()


def variants(name: str, options: LoadOptions) -> list[LoadOptions]:
    """All that compute something else, the published ones first. Raises CheckpointError."""
    files = locate(name, options.revision)
    row, _ = backbone_of(read_json(files.need("config.json")), files)
    found: dict[Semantics, LoadOptions] = {}
    plain = replace(options, first_stage=False)
    names: tuple[Literal["training", "hub"], ...] = ("training", "hub")
    for semantics in names:
        found[row.semantics[semantics]] = replace(plain, semantics=semantics)
    for semantics in names:
        for residual in (False, True):
            for mask in (False, True):
                varied = replace(row.semantics[semantics], output_residual=residual, mask_instruction=mask)
                changed = replace(plain, semantics=semantics, output_residual=residual, mask_instruction=mask)
                found.setdefault(varied, changed)
    return list(found.values())


def _settings(options: LoadOptions) -> dict[str, object]:
    """As in the settings file."""
    chosen = {"output_residual": options.output_residual, "mask_instruction": options.mask_instruction}
    return {"semantics": options.semantics} | {name: value for name, value in chosen.items() if value is not None}


def _row(name: str, settings: Mapping[str, object], ours: FloatArray, theirs: FloatArray) -> Row:
    a, b = normalized(ours), normalized(theirs)
    return Row(name, settings, float(np.abs(a - b).max()), float(cosines_of(a, b).min()))


def _tokens(offline: Offline, texts: Sequence[str], kind: InputType) -> list[TokenizedText]:
    return offline.served.tokenizer.texts(texts, kind, truncate=True)


def _run(
    name: str,
    revision: str | None,
    documents: Sequence[TokenizedText],
    texts: Sequence[TokenizedText],
    corpus_size: int,
    *,
    python: str,
    variables: Mapping[str, str],
) -> Theirs:
    """Raises CheckpointError with the last line that the other process left."""
    folder = Path(name).expanduser()
    source = str(folder.resolve()) if folder.is_dir() else name
    ids = {"documents": [d.input_ids for d in documents], "texts": [t.input_ids for t in texts]}
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch, "request.json"), Path(scratch, "answer.safetensors")
        request.write_text(json.dumps({**ids, "corpus_size": corpus_size}), encoding="utf-8")
        program = os.path.abspath(python) if os.sep in python else python  # noqa: PTH100 - a venv's link stays one
        command = [program, str(PROGRAM), source, revision or "", str(request), str(answer)]
        try:
            done = subprocess.run(  # noqa: S603 - the user said that it may
                command, cwd=scratch, env=dict(variables), capture_output=True, check=False
            )
        except OSError as error:
            raise CheckpointError(f"{python} cannot be run: {error}") from error
        if done.returncode != 0:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
            raise CheckpointError(
                f"{name}: its own code did not run (exit code {done.returncode}): {lines[-1].strip()[:300]}. "
                f"It needs torch, transformers and safetensors; the published models' code was written for "
                f"transformers 4.48: --python names an interpreter that has it."
            )
        try:
            with safe_open(answer, framework="numpy") as file:
                made_by = (file.metadata() or {}).get("made_by", "nobody knows what")
                return Theirs(file.get_tensor("first_stage"), file.get_tensor("second_stage"), made_by)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{name}: its own code ended well, and left no vectors that can be read") from error


def _check(name: str, stage: str, rows: FloatArray, shape: tuple[int, ...]) -> None:
    """Numpy would compare one vector with all of ours. Raises CheckpointError."""
    if rows.shape != shape:
        raise CheckpointError(
            f"{name}: its own code gave vectors of {rows.shape} in the {stage} stage, ours are {shape}"
        )
    if not np.isfinite(rows).all():
        raise CheckpointError(f"{name}: its own code gave NaN or infinite values in the {stage} stage")
