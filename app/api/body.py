"""Request bodies: bounded reads, JSON as clients really send it, and pydantic's complaints in OpenAI's words."""

import asyncio
import difflib
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sized
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from app.api.intake import incoming
from app.api.schemas import WireModel
from app.errors import InvalidRequest, RequestTooLarge, UnknownParameter, UnsupportedMediaType
from app.json_text import InvalidJson, TooManyValues, parse_json

Model = TypeVar("Model", bound=WireModel)
MAX_SHOWN = 64
SMALL = 2**20
"""Bodies up to this many bytes are read on the event loop; larger ones in a thread."""


async def read_body(request: Request, limit: int) -> bytes:
    """Raises RequestTooLarge as soon as more than `limit` bytes are announced or sent; BodiesFull, RequestTimeout."""
    too_large = RequestTooLarge(f"The body is larger than the {limit} bytes this server takes. Send less at a time.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    held = incoming(request).memory
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        held.hold(size)
        chunks.append(chunk)
    return b"".join(chunks)


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def json_body(
    model: type[Model], *, query: Collection[str] = (), streams: str = ""
) -> Callable[[Request], Coroutine[Any, Any, Model]]:
    """A FastAPI dependency: the JSON body as `model`.

    `query`: parameters of the query string beside it; a field of the body there is refused, as it would do nothing.
    `streams`: a media type the route reads in another way.
    """

    async def parse(request: Request) -> Model:
        kind = media_type(request)
        if kind not in ("", "application/json") and not (kind.startswith("application/") and kind.endswith("+json")):
            expected = " or ".join(filter(None, ("application/json", streams)))
            raise UnsupportedMediaType(f"Content-Type is {kind[:80]}; {expected} is expected.")
        _check_query(request, model, query)
        settings = request.app.state.settings
        data = await read_body(request, settings.limits.max_body_bytes)
        ignore = settings.server.unknown_parameters == "ignore"
        read = partial(_read, model, data, query=query, ignore_unknown=ignore)
        return read() if len(data) <= SMALL else await asyncio.to_thread(read)

    return parse


def _check_query(request: Request, model: type[WireModel], allowed: Collection[str]) -> None:
    """Raises InvalidRequest."""
    for name in request.query_params:
        if name in _fields(model) and name not in allowed:
            raise InvalidRequest(f"'{name}' goes into the JSON body, not into the query string.", param=name)


def _fields(model: type[WireModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _read(model: type[Model], data: bytes, *, query: Collection[str], ignore_unknown: bool) -> Model:
    try:
        raw = parse_json(data)
    except TooManyValues as error:
        raise RequestTooLarge(f"The body is too large: {error}. Send less at a time.") from None
    except InvalidJson as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}. Send one JSON object.") from None
    return validated(model, raw, query=query, ignore_unknown=ignore_unknown)


def validated(model: type[Model], raw: Any, *, query: Collection[str] = (), ignore_unknown: bool = False) -> Model:
    """`raw` as `model`; fields that are null count as absent. `query`: what belongs into the query string.

    Raises InvalidRequest, UnknownParameter.
    """
    if not isinstance(raw, dict):
        raise InvalidRequest('The body must be a JSON object, like {"model": …, "input": …}.')
    given = {key: value for key, value in raw.items() if value is not None}
    known = _fields(model)
    unknown = [key for key in given if key not in known]
    if unknown and ignore_unknown:
        given = {key: value for key, value in given.items() if key in known}
    elif unknown:
        raise _unknown(unknown[0], known, query)
    try:
        return model.model_validate(given)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        # Of a union's branches the one that got furthest is the one that was meant.
        raise _complaint(max(problems, key=lambda problem: len(problem["loc"]))) from None


def _unknown(key: str, fields: Collection[str], query: Collection[str]) -> UnknownParameter:
    if key in query:
        return UnknownParameter(f"'{key}' goes into the query string: ?{key}=…, not into the body.", param=key)
    key = key[:100]
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.7)
    hint = f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(fields)}."
    return UnknownParameter(f"Unknown parameter: '{key}'.{hint}", param=key)


def _complaint(error: ErrorDetails) -> InvalidRequest:
    parts = [part for part in error["loc"] if part not in ("str", "InlineContext", "[key]")]
    shown = (f"[{part}]" if isinstance(part, int) else f".{part[:MAX_SHOWN]}" for part in parts)
    param = "".join(shown).removeprefix(".")
    if error["type"] == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    if error["type"] == "extra_forbidden":
        return UnknownParameter(f"Unknown parameter: '{param[:100]}'.", param=param[:100])
    return InvalidRequest(f"Invalid '{param}': {error['msg'][:1].lower()}{error['msg'][1:]}.", param=param)


def check_count(param: str, items: Sized, limit: int, advice: str) -> None:
    """Raises InvalidRequest for more than `limit` items."""
    if len(items) > limit:
        raise InvalidRequest(
            f"Invalid '{param}': {len(items)} items, at most {limit} fit in one request. {advice}", param=param
        )


async def ndjson_lines(request: Request, limit: int, kept: Callable[[], int]) -> AsyncIterator[tuple[int, bytes]]:
    """Numbered lines of a stream of any length, blank ones left out; one line at a time is held, and what its reader
    keeps of those before, in bytes: `kept`.

    Raises InvalidRequest for a line over `limit` bytes; BodiesFull, RequestTooLarge, RequestTimeout.
    """
    held = incoming(request).memory
    rest, number = bytearray(), 0
    async for chunk in request.stream():
        head, *lines = chunk.split(b"\n")
        rest += head
        for line in lines:
            number += 1
            if rest.strip():
                yield number, bytes(rest)
            rest = bytearray(line)
        if len(rest) > limit:
            raise InvalidRequest(f"Line {number + 1} is longer than the {limit} bytes this server takes.", param="body")
        held.hold(len(rest) + kept())
    if rest.strip():
        yield number + 1, bytes(rest)
