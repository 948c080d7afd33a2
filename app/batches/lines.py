"""A batch's input, line by line, in OpenAI's format."""

import math
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from app.json_text import BOM, InvalidJson, parse_json
from app.stores.batch_base import Problem

ENDPOINT = "/v1/embeddings"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_CUSTOM_ID = 512
"""Those of a whole file are held while it is read."""
MAX_PROBLEMS = 100
"""Of a bad input, as many are told."""
BLANK_FACTOR = 2
"""Lines may be parted by blank ones."""


@dataclass(frozen=True, slots=True)
class Line:
    """One request. `number` counts the file's lines from 1; `size`: its bytes."""

    number: int
    custom_id: str
    body: dict[str, Any]
    size: int

    @property
    def inputs(self) -> int:
        """About how many texts it holds."""
        given = self.body.get("input")
        return len(given) if isinstance(given, list) else 1


class TooManyLines(Exception):
    """Blank ones and others together; `number` is the first that is too many."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class LineTooLong(Exception):
    """Line `number` is over the limit."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def numbered(chunks: Iterable[bytes], max_line_bytes: int, max_lines: float = math.inf) -> Iterator[tuple[int, bytes]]:
    """Lines of a content in chunks, blank ones left out, though they count. Raises LineTooLong, TooManyLines."""
    parts: list[bytes] = []  # of a line that goes on in the next chunk
    number = 1
    for chunk in chunks:
        for i, piece in enumerate(chunk.split(b"\n")):
            if i:
                if line := _line(number, parts):
                    yield number, line
                parts, number = [], number + 1
                if number > max_lines:
                    raise TooManyLines(number)
            parts.append(piece)
            if sum(map(len, parts)) > max_line_bytes:
                raise LineTooLong(number)
    if line := _line(number, parts):
        yield number, line


def _line(number: int, parts: Sequence[bytes]) -> bytes:
    line = b"".join(parts).strip()
    return line.removeprefix(BOM) if number == 1 else line


def parsed(number: int, raw: bytes) -> Line | Problem:
    try:
        given = parse_json(raw)
    except InvalidJson:
        return Problem("invalid_json_line", "This line is not parseable as valid JSON.", number)
    if not isinstance(given, dict):
        return Problem("invalid_json_line", "This line is not a JSON object.", number)
    for name, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
        value = given.get(name)
        if not isinstance(value, kind) or (isinstance(value, str) and LONE_SURROGATE.search(value)):
            message = f"Missing required parameter: '{name}'." if name not in given else f"Invalid '{name}'."
            return Problem("missing_required_parameter", message, number, name)
    if given["method"] != "POST":
        return Problem("invalid_method", "The method of every line is POST.", number, "method")
    if given["url"] != ENDPOINT:
        message = f"The url of every line is the batch's endpoint, {ENDPOINT}."
        return Problem("mismatched_endpoint", message, number, "url")
    return Line(number, given["custom_id"], given["body"], len(raw))


def unanswered(chunks: Iterable[bytes], answered: Container[int], max_line_bytes: int) -> Iterator[Line]:
    """The lines of a good input whose numbers are not among `answered`. Raises LineTooLong."""
    for number, raw in numbered(chunks, max_line_bytes):
        if number not in answered and isinstance(line := parsed(number, raw), Line):
            yield line


def checked(chunks: Iterable[bytes], max_lines: int, max_line_bytes: int) -> tuple[int, list[Problem]]:
    """How many lines there are, and what is wrong with them. Holds the custom ids in memory, and one line."""
    problems: list[Problem] = []
    seen: set[str] = set()
    total = 0
    try:
        for number, raw in numbered(chunks, max_line_bytes, max_lines * BLANK_FACTOR + 1):
            total += 1
            line = parsed(number, raw)
            if isinstance(line, Line) and len(line.custom_id) > MAX_CUSTOM_ID:
                message = f"A custom_id has at most {MAX_CUSTOM_ID} characters."
                line = Problem("invalid_custom_id", message, number, "custom_id")
            if isinstance(line, Line) and line.custom_id in seen:
                message = "The custom_id of every line is its own; this one was there before."
                line = Problem("duplicate_custom_id", message, number, "custom_id")
            if isinstance(line, Line):
                seen.add(line.custom_id)
            else:
                problems.append(line)
            if len(problems) == MAX_PROBLEMS:
                break
            if total > max_lines:
                problems.append(Problem("too_many_lines", f"A batch holds at most {max_lines} lines.", number))
                break
    except TooManyLines as error:
        message = f"A batch holds at most {max_lines} lines, and no more blank ones beside them."
        return total, [*problems, Problem("too_many_lines", message, error.number)]
    except LineTooLong as error:
        message = f"This line is longer than the {max_line_bytes} bytes this server takes."
        return total, [*problems, Problem("invalid_json_line", message, error.number)]
    if total == 0:
        problems.append(Problem("empty_file", "The input file is empty. Please ensure it holds at least one line."))
    return total, problems
