"""JSON as clients really send it, and bounded before anything is made of it."""

import json
import re
from typing import Any

import numpy as np
import orjson

MAX_VALUES = 1_000_000
"""Values in one text. Each takes up to two hundred bytes of memory, and two bytes of text are enough for one."""
BOM = b"\xef\xbb\xbf"

_PIECE = 2**20
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class InvalidJson(ValueError):
    """Says what is wrong, and where."""


class TooManyValues(InvalidJson):
    """More than MAX_VALUES."""


def parse_json(text: bytes) -> Any:
    """orjson, and for the lone surrogates that JavaScript sends Python's own. Raises InvalidJson, TooManyValues."""
    if _has_too_many(text):
        raise TooManyValues(f"it holds more than {MAX_VALUES} values")
    text = text.removeprefix(BOM)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        try:
            text.decode()
        except UnicodeDecodeError as encoding:
            raise InvalidJson(f"byte {encoding.start} is not UTF-8") from None
        if _LONE_SURROGATE.search(text):
            try:
                return json.loads(text, parse_constant=_no_constant)
            except (ValueError, RecursionError):
                pass
        raise InvalidJson(f"{error.msg} (line {error.lineno}, column {error.colno})") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _has_too_many(text: bytes) -> bool:
    """Counts commas, brackets and braces: at least one stands before every value but the first.

    Those inside strings are told from the others only where they decide; it takes a second for 100 MiB.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) < MAX_VALUES:
        return False
    unescaped = text.replace(rb"\\", b"").replace(rb"\"", b"")
    found, inside = 1, 0
    for start in range(0, len(unescaped), _PIECE):
        piece = np.frombuffer(unescaped, np.uint8, min(_PIECE, len(unescaped) - start), start)
        quotes = np.cumsum(piece == ord('"')) + inside
        structure = (piece == ord(",")) | (piece == ord("[")) | (piece == ord("{"))
        found += int(np.count_nonzero(structure & (quotes % 2 == 0)))
        if found > MAX_VALUES:
            return True
        inside = int(quotes[-1]) % 2
    return False


def without_lone_surrogates(text: str) -> str:
    """JavaScript sends half an emoji as one; UTF-8 has no such thing, so it becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
