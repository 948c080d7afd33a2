"""Texts in files: .txt, .jsonl and .parquet in; a folder in BEIR's layout. One text at a time, in order."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
from pyarrow import ArrowException

TEXT_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")


class BadCorpus(ValueError):
    """A file that is not what its suffix says; the message names file and line."""


@dataclass(frozen=True, slots=True)
class Record:
    id: str
    text: str


def read_records(path: Path) -> Iterator[Record]:
    """One record a line (.txt, .jsonl: a string, or an object with `text`, `_id` and `title` where it has them) or row.

    A title goes in front of its text, as BEIR does. Without `_id`, the id is the position. Raises BadCorpus, OSError.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl(path)
    if suffix == ".txt":
        return _txt(path)
    raise BadCorpus(f"{path}: unknown kind of file; known: {', '.join(TEXT_SUFFIXES)}")


def _txt(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadCorpus(f"{path}:{number + 1}: not UTF-8") from error
            yield Record(str(number), text.rstrip("\r\n"))


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                raw = orjson.loads(line)
            except ValueError as error:
                raise BadCorpus(f"{path}:{number + 1}: not valid JSON") from error
            yield _record(raw, number, f"{path}:{number + 1}")


def _parquet(path: Path) -> Iterator[Record]:
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield _record(row, number, f"{path}: row {number}")
                number += 1
    except ArrowException as error:
        raise BadCorpus(f"{path}: not a Parquet file that can be read: {error}") from error


def _record(raw: Any, number: int, where: str) -> Record:
    if isinstance(raw, str):
        return Record(str(number), raw)
    if not isinstance(raw, dict) or not isinstance(raw.get("text"), str):
        raise BadCorpus(f'{where}: neither a string nor an object with a string "text"')
    title = raw.get("title")
    text = f"{title} {raw['text']}".strip() if isinstance(title, str) and title else raw["text"]
    return Record(str(raw.get("_id", number)), text)


@dataclass(frozen=True, slots=True)
class Collection:
    """A retrieval collection: documents, queries with judgements, and relevance by query and document id."""

    documents: list[Record]
    queries: list[Record]
    qrels: dict[str, dict[str, int]]


def read_beir(folder: Path) -> Collection:
    """corpus.jsonl, queries.jsonl and qrels/test.tsv. Raises BadCorpus, OSError."""
    qrels: dict[str, dict[str, int]] = {}
    path = folder / "qrels" / "test.tsv"
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            try:
                qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
            except (KeyError, TypeError, ValueError) as error:
                raise BadCorpus(f"{path}: columns query-id, corpus-id and score are expected") from error
    queries = [record for record in read_records(folder / "queries.jsonl") if record.id in qrels]
    documents = list(read_records(folder / "corpus.jsonl"))
    if not queries or not documents:
        raise BadCorpus(f"{folder}: no documents, or no query with a judgement")
    return Collection(documents, queries, qrels)
