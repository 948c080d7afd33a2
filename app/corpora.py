"""Texts in files: .txt, .jsonl and .parquet in; a folder in BEIR's layout. One text at a time, in order."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import orjson
import pyarrow.parquet as pq
from pyarrow import ArrowException

from app.json_text import InvalidJson, parse_json, without_lone_surrogates

TEXT_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")
BOM = b"\xef\xbb\xbf"
BEIR_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")


class BadCorpus(ValueError):
    """A file that is not what its suffix says; the message names file and line."""


@dataclass(frozen=True, slots=True)
class Record:
    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """One text as it stands in its file. `number`: its line or row, from 0; `at`: where its line begins, in bytes."""

    number: int
    at: int
    where: str
    raw: Any

    @property
    def record(self) -> Record:
        """A title goes in front of its text, as BEIR does. Without `_id`, the id is the number. Raises BadCorpus."""
        raw = self.raw
        if isinstance(raw, str):
            return Record(str(self.number), raw)
        if not isinstance(raw, dict) or not isinstance(raw.get("text"), str):
            raise BadCorpus(f'{self.where}: neither a string nor an object with a string "text"')
        title = raw.get("title")
        text = f"{title} {raw['text']}".strip() if isinstance(title, str) and title else raw["text"]
        given = raw.get("_id")
        return Record(str(self.number if given is None else given), text)


def read_records(path: Path) -> Iterator[Record]:
    """One record a line (.txt, .jsonl: a string, or an object with `text`, `_id` and `title` where it has them) or row.

    Raises BadCorpus, OSError.
    """
    for row in _rows(path):
        yield row.record


def place_of(path: Path, index: int) -> str:
    """Where in a file the record number `index`, from 0, stands. Raises BadCorpus, OSError."""
    row = next(islice(_rows(path), index, None), None)
    return row.where if row else str(path)


def _rows(path: Path) -> Iterator[Row]:
    if path.is_dir():
        raise BadCorpus(f"{path}: this is a folder; name a file of texts: {', '.join(TEXT_SUFFIXES)}")
    if not path.exists():
        raise BadCorpus(f"{path}: there is no such file, seen from {Path.cwd()}")
    with path.open("rb") as file:
        yield from read_rows(file, str(path))


def read_rows(file: BinaryIO, name: str, *, first: int = 0, at: int = 0, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of an open file from the row `first` on, whose line begins at the byte `at`.

    `columns`: what is read of a Parquet file besides text, title and id. Raises BadCorpus, OSError.
    """
    suffix = PurePath(name).suffix.lower()
    if suffix == ".parquet":
        return _parquet(file, name, first, columns)
    if suffix not in TEXT_SUFFIXES:
        raise BadCorpus(f"{name}: unknown kind of file; known: {', '.join(TEXT_SUFFIXES)}")
    file.seek(at)
    return _lines(file, name, first, at)


def _lines(file: BinaryIO, name: str, number: int, at: int) -> Iterator[Row]:
    parse = _text if PurePath(name).suffix.lower() == ".txt" else _json
    for read in file:
        line = read if at else read.removeprefix(BOM)
        where = f"{name}:{number + 1}"
        if parse is _text or line.strip():
            yield Row(number, at, where, parse(line, where))
        number += 1
        at += len(read)


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadCorpus(f"{where}: not UTF-8") from error


def _json(line: bytes, where: str) -> Any:
    try:
        return orjson.loads(line)
    except ValueError:
        pass
    try:
        value = parse_json(line)
    except InvalidJson as error:
        _text(line, where)
        raise BadCorpus(f"{where}: not valid JSON") from error
    # It has half an emoji somewhere, in a text, an id or a column to keep; none of them could be written.
    return orjson.loads(without_lone_surrogates(json.dumps(value, ensure_ascii=False)))


def _parquet(file: BinaryIO, name: str, first: int, columns: Sequence[str]) -> Iterator[Row]:
    try:
        source = pq.ParquetFile(file)
        there = source.schema_arrow.names
        missing = [column for column in ("text", *columns) if column not in there]
        if missing:
            raise BadCorpus(f"{name}: no column {missing[0]!r}")
        wanted = [column for column in dict.fromkeys(("text", "title", "_id", *columns)) if column in there]
        number, groups = _groups_from(source, first)
        for batch in source.iter_batches(batch_size=1024, row_groups=groups, columns=wanted):
            before = min(max(0, first - number), len(batch))
            number += before
            for raw in batch.slice(before).to_pylist():
                yield Row(number, 0, f"{name}: row {number}", raw)
                number += 1
    except (ArrowException, UnicodeDecodeError) as error:
        raise BadCorpus(f"{name}: not a Parquet file that can be read: {error}") from error


def _groups_from(source: pq.ParquetFile, first: int) -> tuple[int, list[int]]:
    """The row groups from that of the row `first` on, and the number of the first row in them."""
    number, groups = 0, range(source.num_row_groups)
    for group in groups:
        rows = source.metadata.row_group(group).num_rows
        if number + rows > first:
            return number, list(groups[group:])
        number += rows
    return number, []


@dataclass(frozen=True, slots=True)
class Collection:
    """A retrieval collection: documents, queries with judgements, and relevance by query and document id."""

    documents: list[Record]
    queries: list[Record]
    qrels: dict[str, dict[str, int]]


def read_beir(folder: Path) -> Collection:
    """corpus.jsonl, queries.jsonl and qrels/test.tsv. Raises BadCorpus, OSError."""
    missing = [name for name in BEIR_FILES if not (folder / name).is_file()]
    if missing:
        raise BadCorpus(f"{folder}: no {missing[0]} there; a folder in BEIR's layout has {', '.join(BEIR_FILES)}")
    qrels = _judgements(folder / "qrels" / "test.tsv")
    queries = [record for record in read_records(folder / "queries.jsonl") if record.id in qrels]
    documents = list(read_records(folder / "corpus.jsonl"))
    if not queries or not documents:
        raise BadCorpus(f"{folder}: no documents, or no query with a judgement")
    for name, records in (("corpus", documents), ("queries", queries)):
        twice = next((each for each, times in Counter(record.id for record in records).items() if times > 1), None)
        if twice is not None:  # which of them a judgement means, nobody knows
            raise BadCorpus(f"{folder / name}.jsonl: the _id {twice!r} is there twice")
    return Collection(documents, queries, qrels)


def _judgements(path: Path) -> dict[str, dict[str, int]]:
    """Relevance by query and document id. Raises BadCorpus, OSError."""
    found: dict[str, dict[str, int]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        try:
            for row in rows:
                found.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
        except UnicodeDecodeError as error:
            raise BadCorpus(f"{path}: not UTF-8") from error
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise BadCorpus(
                f"{path}:{rows.line_num}: columns query-id, corpus-id and score, a whole number, are expected"
            ) from error
    return found
