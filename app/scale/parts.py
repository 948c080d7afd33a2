"""A corpus in files, cut into parts that are the same whenever it is cut; and the rows of a part.

A part is named by what is in it, so that a later run knows its output, wherever the files lie by then.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from typing import Any, BinaryIO, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from app.corpora import BadCorpus, Row, read_rows
from app.scale.folders import filesystem

READ_AHEAD = 1 << 20


@dataclass(frozen=True, slots=True)
class Corpus:
    """Files `names` below a folder of the file system that `url` is in. `keep`: columns that go along with the vectors;
    `part_rows`: rows of a part, at most."""

    url: str
    folder: str
    names: tuple[str, ...]
    keep: tuple[str, ...]
    part_rows: int


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of the file `name`, one behind the other. `first` and `at`: the first of them, by number and by byte;
    `digest`: of everything in the rows that decides the output."""

    name: str
    first: int
    at: int
    rows: int
    digest: str

    @property
    def output(self) -> str:
        """The name of the file its vectors go into."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).lstrip("._")[-80:]
        return f"{slug}-{self.first:012d}-{self.digest}.parquet"


def cut(corpus: Corpus, name: str) -> Iterator[Part]:
    """The parts of one file, in order; all of it is read. Raises BadCorpus, OSError."""
    with _opened(corpus, name) as file:
        rows = read_rows(file, name, columns=corpus.keep)
        while some := list(islice(rows, corpus.part_rows)):
            yield _part(name, some, corpus.keep)


def read(corpus: Corpus, part: Part) -> tuple[list[str], dict[str, pa.Array]]:
    """The texts of a part, and what stands beside their vectors: _id, _path, _row and the kept columns.

    Raises BadCorpus where the rows are no longer those that were cut, OSError.
    """
    with _opened(corpus, part.name) as file:
        rest = read_rows(file, part.name, first=part.first, at=part.at, columns=corpus.keep)
        rows = list(islice(rest, part.rows))
        if not rows or _part(part.name, rows, corpus.keep) != part:
            raise BadCorpus(f"{part.name} has changed since it was cut into parts: run this again")
        kinds = _kinds(file, part.name, corpus.keep)
    records = [row.record for row in rows]
    columns = {
        "_id": pa.array([record.id for record in records], pa.string()),
        "_path": pa.array([part.name] * len(rows), pa.string()),
        "_row": pa.array([row.number for row in rows], pa.int64()),
    }
    for column, kind in kinds.items():
        values = [_value(row, column) for row in rows]
        columns[column] = pa.array(map(_json, values), pa.string()) if kind is None else pa.array(values, kind)
    return [record.text for record in records], columns


def _part(name: str, rows: Sequence[Row], keep: Sequence[str]) -> Part:
    digest = hashlib.blake2b(repr((name, keep)).encode(errors="surrogatepass"), digest_size=8)
    for row in rows:
        record = row.record
        values = (row.number, record.id, record.text, *(_value(row, column) for column in keep))
        digest.update(repr(values).encode(errors="surrogatepass"))
    return Part(name, rows[0].number, rows[0].at, len(rows), digest.hexdigest())


def _kinds(file: BinaryIO, name: str, keep: Sequence[str]) -> dict[str, pa.DataType | None]:
    """The kept columns with their types, where the file has types."""
    schema = pq.read_schema(file) if keep and name.lower().endswith(".parquet") else None
    return {column: schema.field(column).type if schema else None for column in keep}


def _value(row: Row, column: str) -> Any:
    return row.raw.get(column) if isinstance(row.raw, dict) else None


def _json(value: Any) -> str | None:
    """JSON has no types by column: all values become strings."""
    return value if value is None or isinstance(value, str) else orjson.dumps(value).decode()


@contextmanager
def _opened(corpus: Corpus, name: str) -> Iterator[BinaryIO]:
    system, _ = filesystem(corpus.url)
    with system.open_input_file(f"{corpus.folder}/{name}") as raw:
        yield cast(BinaryIO, BufferedReader(raw, READ_AHEAD))
