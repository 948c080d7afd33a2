"""The one table error -> (status, type, code), and everything that turns an exception into OpenAI's error body."""

import logging
import math
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app import errors
from app.api.paths import meant
from app.api.schemas import ORJSONResponse
from app.telemetry.metrics import ERRORS
from app.telemetry.requests import note

log = logging.getLogger(__name__)

INVALID, LIMIT, SERVER = "invalid_request_error", "rate_limit_error", "server_error"

# Looked up along the class's ancestors, nearest first.
TABLE: Mapping[type[Exception], tuple[int, str, str | None]] = {
    errors.InvalidRequest: (400, INVALID, None),
    errors.ContextLengthExceeded: (400, INVALID, "context_length_exceeded"),
    errors.TooManyTokens: (400, INVALID, "max_tokens_per_request"),
    errors.UnknownParameter: (400, INVALID, "unknown_parameter"),
    errors.TokenIdsNotAccepted: (400, INVALID, "token_ids_not_accepted"),
    errors.ContextModelMismatch: (400, INVALID, "context_model_mismatch"),
    errors.ContextRequired: (400, INVALID, "context_required"),
    errors.ContextInUse: (400, INVALID, "context_in_use"),
    errors.UnknownContextNamed: (400, INVALID, "context_not_found"),
    errors.FirstStageUnavailable: (400, INVALID, None),
    errors.Unauthenticated: (401, INVALID, "invalid_api_key"),
    errors.InsufficientScope: (403, INVALID, "insufficient_scope"),
    errors.NotFound: (404, INVALID, None),
    errors.ModelNotFound: (404, INVALID, "model_not_found"),
    errors.ContextNotFound: (404, INVALID, "context_not_found"),
    errors.FingerprintMismatch: (412, INVALID, "fingerprint_mismatch"),
    errors.RequestTimeout: (408, INVALID, "request_timeout"),
    errors.RequestTooLarge: (413, INVALID, "request_too_large"),
    errors.UnsupportedMediaType: (415, INVALID, "unsupported_media_type"),
    errors.QueueFull: (429, LIMIT, "rate_limit_exceeded"),
    errors.TooManyBatches: (429, LIMIT, "rate_limit_exceeded"),
    errors.BodiesFull: (429, LIMIT, "rate_limit_exceeded"),
    errors.BuildsFull: (429, LIMIT, "rate_limit_exceeded"),
    errors.HeadersTooLarge: (431, INVALID, "headers_too_large"),
    errors.ServerFault: (500, SERVER, None),
    errors.NonFiniteEmbedding: (500, SERVER, "non_finite_embedding"),
    errors.StoreError: (503, SERVER, "engine_unavailable"),
    errors.Unavailable: (503, SERVER, "not_ready"),
    errors.NotReady: (503, SERVER, "not_ready"),
    errors.ContextNotReady: (503, SERVER, "context_not_ready"),
    errors.DeadlineExceeded: (503, SERVER, "deadline_exceeded"),
    errors.ShuttingDown: (503, SERVER, "shutting_down"),
    errors.TooManyConnections: (503, SERVER, "too_many_connections"),
    errors.EngineUnavailable: (503, SERVER, "engine_unavailable"),
    errors.OutOfDeviceMemory: (503, SERVER, "engine_unavailable"),
}

# What the framework refuses by itself: status -> (code, when).
FRAMEWORK = {
    404: ("unknown_url", "Nothing is served under this URL."),
    405: ("method_not_supported", "The URL is right, the method is not; `Allow` names the right ones."),
}

SEE_DOCS = "See /docs for what is served here."
NO_CODE = "none"
"""How a metric calls the code null."""

INTERNAL = "The server had an error while processing your request. Its log has the details under the x-request-id."


def error_response(
    status: int,
    kind: str,
    code: str | None,
    message: str,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    if code is not None:
        note(code=code)
    body = {"error": {"message": _sayable(message), "type": kind, "param": param and _sayable(param), "code": code}}
    return ORJSONResponse(body, status_code=status, headers=dict(headers or {}))


def _sayable(text: str) -> str:
    """What a client sent may hold half an emoji, which UTF-8 has no bytes for."""
    return text.encode(errors="replace").decode()


def response_of(error: Exception) -> Response:
    """The answer for any exception; one that is not in the table is a 500 that says nothing of it."""
    row = next((TABLE[cls] for cls in type(error).__mro__ if cls in TABLE), None)
    if row is None:
        log.error("unexpected %s", type(error).__name__, exc_info=error)
        return error_response(500, SERVER, None, INTERNAL)
    status, kind, code = row
    headers: dict[str, str] = {}
    message = str(error)
    if isinstance(error, errors.StoreError):
        message = error.answer
        if not error.passes:
            headers["x-should-retry"] = "false"
        # What is wrong with the database as a whole is in the log once, and not once a request.
        log.log(logging.DEBUG if error.passes else logging.ERROR, "%s", error)
    if isinstance(error, errors.RetryableError | errors.StoreError):
        seconds = min(max(error.retry_after, 1.0), 60.0)
        headers |= {"Retry-After": str(math.ceil(seconds)), "retry-after-ms": str(round(1000 * seconds))}
    if isinstance(error, errors.ServerFault):
        log.error("%s", type(error).__name__, exc_info=error.__cause__ or error)
        message = INTERNAL if code is None else message
        headers["x-should-retry"] = "false"
    if isinstance(error, errors.RequestTimeout):
        headers["Connection"] = "close"
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return error_response(status, kind, code, message, param=getattr(error, "param", None), headers=headers)


def install(app: FastAPI) -> None:
    """Every handler the app needs; other exceptions are for envelope.LastNet, which is around all of it."""

    async def known(_request: Request, error: Exception) -> Response:
        return response_of(error)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for it alone
        where = f"{request.method} {request.scope['path'][:200]}"  # request.url may not be one
        if error.status_code == 404:
            path = meant(request.scope["path"])
            hint = f"Did you mean {path[:200]}? A client's base_url ends in /v1." if path else SEE_DOCS
            message = f"Unknown request URL: {where}. {hint}"
            return error_response(404, INVALID, FRAMEWORK[404][0], message)
        if error.status_code == 405:
            message = f"Not allowed method: {where}. Allowed: {(error.headers or {}).get('Allow', 'see /docs')}."
            return error_response(405, INVALID, FRAMEWORK[405][0], message, headers=error.headers)
        return error_response(error.status_code, INVALID, None, str(error.detail), headers=error.headers)

    async def query(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it alone
        problem = error.errors()[0]
        param = str(problem["loc"][-1])
        message = f"Invalid '{param}': {problem['msg'][:1].lower()}{problem['msg'][1:]}."
        return error_response(400, INVALID, None, message, param=param)

    own = [(status, code) for status, _, code in TABLE.values()]
    for status, code in [*own, *((status, code) for status, (code, _) in FRAMEWORK.items())]:
        ERRORS.labels(status, code or NO_CODE)  # there from the start, so that the first one is an increase
    app.add_exception_handler(errors.ServiceError, known)
    app.add_exception_handler(RequestValidationError, query)
    app.add_exception_handler(errors.StoreError, known)
    app.add_exception_handler(HTTPException, http)
