"""Request bodies: bounded reads, JSON as clients really send it, and pydantic's complaints in OpenAI's words."""

import difflib
import json
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from app.api.schemas import WireModel
from app.errors import InvalidRequest, RequestTooLarge, UnknownParameter, UnsupportedMediaType

Model = TypeVar("Model", bound=WireModel)
MAX_SHOWN = 64


async def read_body(request: Request, limit: int) -> bytes:
    """Raises RequestTooLarge as soon as more than `limit` bytes are announced or sent."""
    too_large = RequestTooLarge(f"The body is larger than the {limit} bytes this server takes. Send less at a time.")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def json_body(model: type[Model]) -> Callable[[Request], Coroutine[Any, Any, Model]]:
    """A FastAPI dependency: the JSON body as `model`."""

    async def parse(request: Request) -> Model:
        kind = media_type(request)
        if kind not in ("", "application/json") and not (kind.startswith("application/") and kind.endswith("+json")):
            raise UnsupportedMediaType(f"Content-Type is {kind[:80]}; application/json is expected.")
        settings = request.app.state.settings
        raw = parse_json(await read_body(request, settings.limits.max_body_bytes))
        return validated(model, raw, ignore_unknown=settings.server.unknown_parameters == "ignore")

    return parse


def parse_json(data: bytes) -> Any:
    """orjson, and for the lone surrogates that JavaScript sends Python's own. Raises InvalidRequest."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(data, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise InvalidRequest(
                f"The body is not valid JSON (line {error.lineno}, column {error.colno}). Send one JSON object."
            ) from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def validated(model: type[Model], raw: Any, *, ignore_unknown: bool = False) -> Model:
    """`raw` as `model`; fields that are null count as absent. Raises InvalidRequest, UnknownParameter."""
    if not isinstance(raw, dict):
        raise InvalidRequest('The body must be a JSON object, like {"model": …, "input": …}.')
    given = {key: value for key, value in raw.items() if value is not None}
    known = [field.alias or name for name, field in model.model_fields.items()]
    unknown = [key for key in given if key not in known]
    if unknown and ignore_unknown:
        given = {key: value for key, value in given.items() if key in known}
    elif unknown:
        raise _unknown(unknown[0], known)
    try:
        return model.model_validate(given)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        # Of a union's branches the one that got furthest is the one that was meant.
        raise _complaint(max(problems, key=lambda problem: len(problem["loc"]))) from None


def _unknown(key: str, fields: Collection[str]) -> UnknownParameter:
    near = difflib.get_close_matches(key, fields, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(fields)}."
    return UnknownParameter(f"Unknown parameter: '{key[:100]}'.{hint}", param=key[:100])


def _complaint(error: ErrorDetails) -> InvalidRequest:
    parts = [str(part) for part in error["loc"] if part not in ("str", "InlineContext", "[key]")]
    param = ".".join(part[:MAX_SHOWN] for part in parts)
    if error["type"] == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    if error["type"] == "extra_forbidden":
        return UnknownParameter(f"Unknown parameter: '{param[:100]}'.", param=param[:100])
    return InvalidRequest(f"Invalid '{param}': {error['msg'][:1].lower()}{error['msg'][1:]}.", param=param)


async def ndjson_lines(request: Request, limit: int) -> AsyncIterator[tuple[int, bytes]]:
    """Numbered lines of a stream of any length, blank ones left out; one line at a time is held.

    Raises InvalidRequest for a line over `limit` bytes.
    """
    rest, number = b"", 0
    async for chunk in request.stream():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            if line.strip():
                yield number, line
        if len(rest) > limit:
            raise InvalidRequest(f"Line {number + 1} is longer than the {limit} bytes this server takes.", param="body")
    if rest.strip():
        yield number + 1, rest
