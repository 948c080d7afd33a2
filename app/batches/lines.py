"""A batch's input, line by line, in OpenAI's format."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from app.stores.batch_base import Problem

ENDPOINT = "/v1/embeddings"
MAX_LINE_BYTES = 64 * 2**20
MAX_PROBLEMS = 100
"""Of a bad input, as many are told."""


@dataclass(frozen=True, slots=True)
class Line:
    """One request. `number` counts the file's lines from 1."""

    number: int
    custom_id: str
    body: dict[str, Any]

    @property
    def inputs(self) -> int:
        """About how many texts it holds."""
        given = self.body.get("input")
        return len(given) if isinstance(given, list) else 1


def numbered(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines of a content in chunks, blank ones left out."""
    rest, number = b"", 0
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            if line.strip():
                yield number, line
    if rest.strip():
        yield number + 1, rest


def parsed(number: int, raw: bytes) -> Line | Problem:
    try:
        given = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return Problem("invalid_json_line", "This line is not parseable as valid JSON.", number)
    if not isinstance(given, dict):
        return Problem("invalid_json_line", "This line is not a JSON object.", number)
    for name, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
        if not isinstance(given.get(name), kind):
            message = f"Missing required parameter: '{name}'." if name not in given else f"Invalid '{name}'."
            return Problem("missing_required_parameter", message, number, name)
    if given["method"] != "POST":
        return Problem("invalid_method", "The method of every line is POST.", number, "method")
    if given["url"] != ENDPOINT:
        message = f"The url of every line is the batch's endpoint, {ENDPOINT}."
        return Problem("mismatched_endpoint", message, number, "url")
    return Line(number, given["custom_id"], given["body"])


def checked(chunks: Iterable[bytes], max_lines: int) -> tuple[int, list[Problem]]:
    """How many lines there are, and what is wrong with them. Holds the custom ids in memory, and one line."""
    problems: list[Problem] = []
    seen: set[str] = set()
    total = 0
    for number, raw in numbered(chunks):
        total += 1
        line = parsed(number, raw)
        if isinstance(line, Line) and line.custom_id in seen:
            message = "The custom_id of every line is its own; this one was there before."
            line = Problem("duplicate_custom_id", message, number, "custom_id")
        if isinstance(line, Line):
            seen.add(line.custom_id)
        elif len(problems) < MAX_PROBLEMS:
            problems.append(line)
        if total > max_lines:
            problems.append(Problem("too_many_lines", f"A batch holds at most {max_lines} lines.", number))
            break
    if total == 0:
        problems.append(Problem("empty_file", "The input file is empty. Please ensure it holds at least one line."))
    return total, problems
