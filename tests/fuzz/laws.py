"""What holds for every answer, whatever was asked."""

import json

from app.api.openai_errors import FRAMEWORK, INVALID, TABLE
from tests.raw import Answer

DOCUMENTED = {(status, kind, code) for status, kind, code in TABLE.values()} | {
    (status, INVALID, code) for status, (code, _) in FRAMEWORK.items()
}
"""Every status, type and code of README's table."""
SUCCESS = {200, 201, 202}
REDIRECT = 307
FAULT = 500
OF_EVERY_ANSWER = {"x-request-id", "openai-processing-ms", "openai-version", "date"}


def check_answer(answer: Answer, sent: object) -> None:
    """Raises AssertionError, which shows what was `sent`."""
    try:
        _check(answer)
    except (AssertionError, ValueError, KeyError) as error:
        raise AssertionError(f"{error!r} for {sent!r}") from error


def _check(answer: Answer) -> None:
    assert answer.complete, f"{answer.status} broke off"
    assert set(answer.headers) >= OF_EVERY_ANSWER, answer.headers
    if answer.status >= 400:
        check_error(answer)
    elif answer.status == REDIRECT:
        assert answer.body == b""
    else:
        assert answer.status in SUCCESS, answer.status
        if answer.headers.get("content-type") == "application/json":
            json.loads(answer.body, parse_constant=_no_constant)


def check_error(answer: Answer) -> None:
    """OpenAI's shape, in a combination that is documented, and not our fault."""
    assert answer.status != FAULT, answer.body
    assert answer.headers["content-type"] == "application/json", answer.headers
    body = json.loads(answer.body)
    assert list(body) == ["error"], body
    error = body["error"]
    assert list(error) == ["message", "type", "param", "code"], body
    assert (answer.status, error["type"], error["code"]) in DOCUMENTED, (answer.status, body)
    assert isinstance(error["message"], str), body
    assert error["message"], body
    assert error["param"] is None or isinstance(error["param"], str), body
    assert len(answer.body) < 20_000, answer.body[:200]  # nothing that was sent comes back at length


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} in an answer")
