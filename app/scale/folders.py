"""Where a corpus's files and the vectors lie: a folder here, or any that pyarrow reaches (s3://, gs://, hdfs://).

An output folder holds parts, each of which is there whole or not at all, and `_run.json`, which says what they are of.
"""

import re
import time
import uuid
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from app.corpora import TEXT_SUFFIXES, BadCorpus
from app.errors import ConfigError

RUN = "_run.json"
WRITING = "_writing-"
LEFT_SECONDS = 3600
"""Behind which a file that is not whole is nobody's any more: a part is written in seconds."""
_WILD = re.compile(r"[*?\[]")


def absolute(location: str) -> str:
    """A path or URL that means the same in every process."""
    return location.rstrip("/") if "://" in location else str(Path(location).expanduser().resolve())


def filesystem(url: str) -> tuple[fs.FileSystem, str]:
    """The file system of an absolute location, and the path in it. Raises BadCorpus."""
    if "://" not in url:
        return fs.LocalFileSystem(), url
    try:
        system, path = fs.FileSystem.from_uri(url.replace("[", "%5B").replace("]", "%5D"))
    except (pa.ArrowException, ValueError) as error:
        raise BadCorpus(f"{url} is no address that can be read: {error}") from error
    return system, str(path)


def text_files(url: str) -> tuple[str, list[str]]:
    """The folder of a file, a folder or a glob, and the names of the files of texts below it, sorted.

    Raises BadCorpus where there are none, OSError.
    """
    system, path = filesystem(url)
    wild = _WILD.search(path)
    if not wild and system.get_file_info(path).is_file:
        folder, _, name = path.rpartition("/")
        return folder, [name]
    folder = path[: wild.start()].rpartition("/")[0] if wild else path
    listed = system.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    found = sorted(info.path for info in listed if info.is_file and (not wild or _matches(info.path, path)))
    names = [name for name in (at.removeprefix(f"{folder}/") for at in found) if _holds_texts(name)]
    if not names:
        raise BadCorpus(f"{url}: no files of texts there; known: {', '.join(TEXT_SUFFIXES)}")
    return folder, names


def _holds_texts(name: str) -> bool:
    """What begins with '.' or '_' is not data, by custom."""
    path = PurePosixPath(name)
    return path.suffix.lower() in TEXT_SUFFIXES and not any(part.startswith((".", "_")) for part in path.parts)


def _matches(path: str, pattern: str) -> bool:
    """As a shell does it: '*' stays within one folder."""
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


class Output:
    """A folder that vectors go into."""

    def __init__(self, url: str) -> None:
        """Raises BadCorpus."""
        self.url = url
        self._system, self._folder = filesystem(url)

    def begin(self, made_of: Mapping[str, Any]) -> set[str]:
        """The parts that are there already. `made_of`: what decides them besides their texts.

        Raises ConfigError where the folder holds anything else, OSError.
        """
        self._system.create_dir(self._folder, recursive=True)
        listed = self._listed()
        self._remove_left(listed)
        before = self._run() if any(info.base_name == RUN for info in listed) else {}
        wrong = [key for key in made_of if before.get(key) != made_of[key]] if before else []
        if wrong:
            raise ConfigError(
                f"{self.url} holds vectors made otherwise: {wrong[0]} is {before.get(wrong[0])} there and "
                f"{made_of[wrong[0]]} now. Choose another folder, or remove it."
            )
        if self.parts() and not before:
            raise ConfigError(f"{self.url} holds files that are not of a run of this command: choose another folder.")
        self._put(RUN, orjson.dumps({**made_of, "status": "in_progress"}, option=orjson.OPT_INDENT_2))
        return self.parts()

    def write(self, name: str, table: pa.Table) -> None:
        """A part, at once. Raises OSError."""
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, use_dictionary=["_path"])
        self._put(name, buffer.getvalue())

    def parts(self) -> set[str]:
        """Their names. Raises OSError."""
        return {info.base_name for info in self._listed() if not info.base_name.startswith("_")}

    def complete(self, found: Mapping[str, Any]) -> None:
        """Raises OSError."""
        self._put(RUN, orjson.dumps({**self._run(), "status": "completed", **found}, option=orjson.OPT_INDENT_2))

    def _listed(self) -> list[fs.FileInfo]:
        found: list[fs.FileInfo] = self._system.get_file_info(fs.FileSelector(self._folder))
        return found

    def _remove_left(self, listed: Sequence[fs.FileInfo]) -> None:
        """What workers that were killed had begun. What is younger may be another run's, at work on the same parts."""
        old = time.time() - LEFT_SECONDS
        for info in listed:
            if info.base_name.startswith(WRITING) and info.mtime is not None and info.mtime.timestamp() < old:
                self._system.delete_file(info.path)

    def _run(self) -> dict[str, Any]:
        with self._system.open_input_stream(f"{self._folder}/{RUN}") as file:
            run: dict[str, Any] = orjson.loads(file.read())
        return run

    def _put(self, name: str, data: Any) -> None:
        writing = f"{self._folder}/{WRITING}{uuid.uuid4().hex}"
        with self._system.open_output_stream(writing) as file:
            file.write(data)
        self._system.move(writing, f"{self._folder}/{name}")
