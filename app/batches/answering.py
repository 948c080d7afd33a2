"""One line of a batch -> its line of the output, however long that takes."""

import asyncio
import uuid
from contextlib import suppress
from typing import Any, Protocol

import orjson

from app.batches.lines import Line
from app.errors import OutOfDeviceMemory, RetryableError, ShuttingDown, StoreError
from app.stores.batch_base import LineResult
from app.telemetry.requests import RequestRecord, current

LONGEST_WAIT = 5.0
ATTEMPTS = 5
"""At a line for which the device has no memory. What is full, down or being built is waited for without end."""


class Answers(Protocol):
    """A line's body -> status and body, as the endpoint answers."""

    async def __call__(self, body: Any, namespace: str, /) -> tuple[int, bytes]:
        """In that namespace. Raises what may pass."""

    def given_up(self, error: Exception, /) -> tuple[int, bytes]:
        """Where nothing else will come."""


async def answered(answers: Answers, line: Line, namespace: str, stopped: asyncio.Event) -> LineResult | None:
    """None: the batch was stopped before. In a task of its own: what is logged in it has the id of its answer.

    Raises ShuttingDown."""
    request = RequestRecord(f"req_{uuid.uuid4().hex}")
    current.set(request)
    answer = await _patiently(answers, line.body, namespace, stopped)
    return None if answer is None else _result(line, answer, request.id)


def given_up(answers: Answers, line: Line, error: Exception) -> LineResult:
    """It is not tried again."""
    return _result(line, answers.given_up(error), f"req_{uuid.uuid4().hex}")


async def _patiently(answers: Answers, body: Any, namespace: str, stopped: asyncio.Event) -> tuple[int, bytes] | None:
    """What may pass is waited for, however long that takes, but for a text that fits on no device."""
    failures = 0
    while not stopped.is_set():
        try:
            return await answers(body, namespace)
        except ShuttingDown:
            raise
        except RetryableError as error:
            failures += isinstance(error, OutOfDeviceMemory)
            if failures == ATTEMPTS:
                return answers.given_up(error)
            seconds = min(error.retry_after, LONGEST_WAIT)
        except StoreError:
            seconds = 1.0
        with suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), seconds)
    return None


def _result(line: Line, answer: tuple[int, bytes], request_id: str) -> LineResult:
    status, body = answer
    response = {"status_code": status, "request_id": request_id, "body": orjson.Fragment(body)}
    told = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id, "response": response, "error": None}
    return LineResult(line.number, status < 400, orjson.dumps(told, option=orjson.OPT_APPEND_NEWLINE))
