"""A file of texts -> a file of vectors, in order, resumable.

Vectors are appended to OUTPUT.partial as raw float32 rows; OUTPUT.partial.json says what they are of. A run that was
cut short goes on behind the last whole row when model, context, options and input are the same, and starts over else.
The output itself appears at the end, at once.
"""

import fcntl
import hashlib
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from app.corpora import BadCorpus, Record, read_records
from app.domain import FloatArray

OUTPUT_SUFFIXES = (".npy", ".safetensors", ".jsonl", ".parquet")
ROWS = 8192


def check_output(output: Path) -> None:
    """What can be told before there are vectors. Raises BadCorpus."""
    if output.suffix.lower() not in OUTPUT_SUFFIXES:
        raise BadCorpus(f"{output}: unknown kind of output; known: {', '.join(OUTPUT_SUFFIXES)}")
    if not output.parent.is_dir():
        raise BadCorpus(f"{output}: there is no folder {output.parent}; create it, or choose another output")


class PartialVectors:
    """The growing raw file beside an output, which one run at a time may write; a context manager."""

    def __init__(self, output: Path, *, dimensions: int, made_of: str) -> None:
        """`made_of`: everything that decides the vectors; a partial file of something else is thrown away.

        Raises BadCorpus where another process is writing it.
        """
        self._output = output
        self._dimensions = dimensions
        self._raw = output.with_name(output.name + ".partial")
        self._label = output.with_name(output.name + ".partial.json")
        label = orjson.dumps({"made_of": made_of, "dimensions": dimensions})
        self._file = self._raw.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this run ends, however it does
        except BlockingIOError:
            self._file.close()
            raise BadCorpus(f"{output}: another process is writing it; wait for it, or choose another output") from None
        self.thrown_away = 0
        """Rows of an earlier run that made something else."""
        if not self._label.is_file() or self._label.read_bytes() != label:
            self.thrown_away = self._raw.stat().st_size // (4 * dimensions)
            self._file.truncate(0)
            self._label.write_bytes(label)
        self.done = self._raw.stat().st_size // (4 * dimensions)
        self._file.truncate(self.done * 4 * dimensions)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # on a full disk, once more: what counts was flushed
            self._file.close()

    def extend(self, chunks: Iterator[FloatArray], advance: Callable[[int], None]) -> None:
        """Raises OSError."""
        for chunk in chunks:
            with _named(self._raw):
                self._file.write(np.ascontiguousarray(chunk, dtype="<f4").tobytes())
                self._file.flush()
            self.done += len(chunk)
            advance(len(chunk))

    def discard(self) -> None:
        """Rows that are of texts no longer there."""
        self._label.unlink()
        self._file.truncate(0)

    def finish(self, records: Iterator[Record]) -> None:
        """Writes the output from the raw rows and the ids of `records`, then removes the partial files.

        Raises OSError; the raw rows are then still there for another try.
        """
        target = self._output.with_name(self._output.name + ".writing")
        try:
            with _named(self._output):
                self._write(target, records)
                target.replace(self._output)
        finally:
            target.unlink(missing_ok=True)
        self._raw.unlink()
        self._label.unlink()

    def _write(self, target: Path, records: Iterator[Record]) -> None:
        suffix, shape = self._output.suffix.lower(), (self.done, self._dimensions)
        if suffix in (".npy", ".safetensors"):
            with target.open("wb") as file, self._raw.open("rb") as rows:
                file.write(_npy_header(shape) if suffix == ".npy" else _safetensors_header(shape))
                shutil.copyfileobj(rows, file)
            return
        vectors: FloatArray = np.empty((0, self._dimensions), np.float32)
        if self.done:
            vectors = np.memmap(self._raw, dtype="<f4", mode="r", shape=shape)
        if suffix == ".parquet":
            _write_parquet(target, records, vectors)
            return
        with target.open("wb") as file:
            for record, row in zip(records, vectors, strict=True):
                line = {"_id": record.id, "embedding": np.asarray(row)}
                file.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A full disk is told of a file without its name, and by pyarrow without a number."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _npy_header(shape: tuple[int, int]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _safetensors_header(shape: tuple[int, int]) -> bytes:
    """Of one array that follows: its library would hold all of it in memory, and its errors are its own."""
    size = 4 * shape[0] * shape[1]
    header = orjson.dumps({"embeddings": {"dtype": "F32", "shape": shape, "data_offsets": (0, size)}})
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _write_parquet(path: Path, records: Iterator[Record], vectors: FloatArray) -> None:
    width = vectors.shape[1]
    schema = pa.schema([("_id", pa.string()), ("embedding", pa.list_(pa.float32(), width))])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(vectors), ROWS):
            block = np.asarray(vectors[start : start + ROWS])
            ids = [record.id for record in islice(records, len(block))]
            column = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), width)
            writer.write_table(pa.table([pa.array(ids, pa.string()), column], schema=schema))


def describe(path: Path) -> tuple[int, str]:
    """How many texts a file holds, and a digest of it. Raises BadCorpus, OSError."""
    count = sum(1 for _ in read_records(path))
    return count, digest_of(path)


def digest_of(path: Path) -> str:
    """Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
