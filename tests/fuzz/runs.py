"""Many requests of a kind against a running server, each held against the laws."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import schemathesis
from httptools import HttpParserError
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok

from tests.api.test_openapi import CHECKS, schema
from tests.fuzz.laws import check_answer
from tests.fuzz.requests import FILE_ID, Request
from tests.fuzz.target import Client
from tests.fuzz.uploads import structured
from tests.fuzz.wire import connections
from tests.raw import Answer, exchange

PROMISES = [check for check in CHECKS if check is not not_a_server_error]
"""The laws know which 503 is one."""
ROUND = 1000
"""Examples that hypothesis makes before it begins anew, from the next seed; it slows down as it remembers more."""
AT_ONCE = 32
"""Connections of raw bytes; most of those that hang in the middle of a request wait for their time limit."""


@dataclass
class Tally:
    """What came of the requests of one kind. `unanswered`: connections on which nothing was said."""

    kind: str
    requests: int = 0
    unanswered: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0

    def count(self, answers: Iterable[Answer]) -> None:
        self.requests += 1
        statuses = [answer.status for answer in answers]
        self.unanswered += not statuses
        self.statuses.update(statuses)


def rounds(
    strategy: st.SearchStrategy[Any], check: Callable[[Any], None], examples: int, first_seed: int, size: int = ROUND
) -> Iterator[None]:
    """Gives control back after each. Raises what `check` raises, with the smallest example that does."""
    for number in range(0, examples, size):
        run = given(strategy)(check)
        configured = settings(
            max_examples=min(size, examples - number),
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        seed(first_seed + number)(configured(run))()
        yield


def with_structure(url: str, requests: int, first_seed: int, tally: Tally) -> Iterator[None]:
    client = Client(url)
    file_id = FILE_ID.encode()

    def check(request: Request) -> None:
        nonlocal file_id
        answer = client.ask(request.wire().replace(FILE_ID.encode(), file_id))
        tally.count([answer])
        check_answer(answer, request)
        if request.target == b"/v1/files" and request.method == b"POST" and answer.status == 200:
            file_id = json.loads(answer.body)["id"].encode()
            assert len(file_id) == len(FILE_ID)

    yield from rounds(structured, check, requests, first_seed)
    client.close()


def raw_bytes(url: str, requests: int, first_seed: int, tally: Tally) -> Iterator[None]:
    with ThreadPoolExecutor(AT_ONCE) as pool:

        def check(many: list[bytes]) -> None:
            for sent, answers in zip(many, pool.map(lambda sent: _exchange(url, sent), many), strict=True):
                tally.count(answers)
                for answer in answers:
                    check_answer(answer, sent)

        size = min(AT_ONCE, requests)
        batches = st.lists(connections, min_size=size, max_size=size)
        yield from rounds(batches, check, requests // size, first_seed, ROUND // size)


def _exchange(url: str, sent: bytes) -> list[Answer]:
    try:
        return exchange(url, sent)
    except (TimeoutError, HttpParserError) as error:
        raise AssertionError(f"{error!r} for {sent!r}") from error


def by_schema(url: str, requests: int, first_seed: int, tally: Tally) -> Iterator[None]:
    """schemathesis, over what docs/openapi.json promises."""
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    for operation in operations:

        def check(case: schemathesis.Case[Any]) -> None:
            response = case.call_and_validate(base_url=url, checks=PROMISES, timeout=60)
            headers = {name.lower(): values[0] for name, values in response.headers.items()}
            answer = Answer(response.status_code, headers, response.content, complete=True)
            tally.count([answer])
            check_answer(answer, case.as_curl_command())

        yield from rounds(operation.as_strategy(), check, max(1, requests // len(operations)), first_seed)


Run = Callable[[str, int, int, Tally], Iterator[None]]
KINDS: dict[str, tuple[Run, float]] = {
    "structured": (with_structure, 0.55),
    "raw bytes": (raw_bytes, 0.4),
    "schema": (by_schema, 0.05),
}
"""And their share of all requests."""


def run(url: str, kind: str, requests: int, first_seed: int, after_each_round: Callable[[], None]) -> Tally:
    """Raises AssertionError, TimeoutError for the first answer that breaks a law."""
    tally = Tally(kind)
    started = time.monotonic()
    for _ in KINDS[kind][0](url, requests, first_seed, tally):
        client = Client(url)
        assert client.json("/health") == {"status": "ok"}
        client.close()
        after_each_round()
    tally.seconds = time.monotonic() - started
    return tally
