"""The OpenAPI page is what is committed, and what the server does."""

import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.docs import openapi_page

CASES = int(os.environ.get("SCHEMA_CASES", "12"))
"""Of each operation."""
COMMITTED = Path(__file__).parents[2] / "docs" / "openapi.json"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@schemathesis.serializer("application/vnd.safetensors", "application/x-npy")
def raw(_context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


schema = schemathesis.openapi.from_dict(json.loads(COMMITTED.read_text(encoding="utf-8")))
pytestmark = pytest.mark.filterwarnings("ignore")  # the tester's own


def test_the_committed_page_is_the_servers(http: httpx.Client) -> None:
    """`python -m tests.docs openapi > docs/openapi.json` makes it anew."""
    assert http.get("/openapi.json").json() == json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert openapi_page() == COMMITTED.read_text(encoding="utf-8")


@schema.include(path_regex="^/(v1|tokenize|info|health|ready)").parametrize()
@settings(
    max_examples=CASES,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
def test_every_operation_does_as_described(case: schemathesis.Case[Any], server: str) -> None:
    if case.headers:  # after a millisecond the answer is a 503, which is right
        case.headers.pop("x-timeout-ms", None)
    case.call_and_validate(base_url=server, checks=CHECKS, timeout=60)
