"""The clients for Node: openai, LangChain JS and Vercel's AI SDK."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.clients.helpers import KEY, MODEL, TEXTS, TOO_LONG, UNKNOWN, run_script
from tests.clients.refusing import Refusing
from tests.live import V1

SCRIPTS = ["openai.mjs", "langchain.mjs", "ai-sdk.mjs"]
# script -> the error's class for an unknown name, too long a text and a wrong key
CLASSES = {
    "openai.mjs": ("NotFoundError", "BadRequestError", "AuthenticationError"),
    "langchain.mjs": ("NotFoundError", "ContextOverflowError", "AuthenticationError"),
    "ai-sdk.mjs": ("AI_APICallError", "AI_APICallError", "AI_APICallError"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_vectors(base: str, agrees: Callable[[Any], None], script: str) -> None:
    agrees(run_script(script, base=base, model=MODEL, texts=TEXTS)["vectors"])


@pytest.mark.parametrize("script", ["langchain.mjs", "ai-sdk.mjs"])
def test_one_text_at_a_time(base: str, agrees: Callable[[Any], None], script: str) -> None:
    agrees(run_script(script, base=base, model=MODEL, texts=TEXTS, one=True)["vectors"])


@pytest.mark.parametrize(
    "options",
    [
        {"encoding_format": "float"},
        {"encoding_format": "float", "context": "legal", "input_type": "query"},
        {"context": "legal", "input_type": "query"},
    ],
    ids=str,
)
def test_openai_with_more_fields(base: str, agrees: Callable[[Any], None], options: dict[str, str]) -> None:
    model = "minilm-context" if "context" in options else MODEL
    agrees(run_script("openai.mjs", base=base, model=model, texts=TEXTS, options=options)["vectors"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_errors(base: str, locked: str, script: str) -> None:
    missing, bad, key = CLASSES[script]
    for kind, status, code, given in (
        (missing, 404, "model_not_found", {"base": base, "model": UNKNOWN, "texts": ["x"]}),
        (missing, 404, "context_not_found", {"base": base, "model": "minilm-context@nowhere", "texts": ["x"]}),
        (bad, 400, "context_length_exceeded", {"base": base, "model": MODEL, "texts": [TOO_LONG]}),
        (key, 401, "invalid_api_key", {"base": locked, "model": V1, "texts": ["x"], "key": "wrong"}),
    ):
        found = run_script(script, **given)
        assert (found["error"], found["status"], found["code"]) == (kind, status, code)
    assert "vectors" in run_script(script, base=locked, model=V1, texts=["x"], key=KEY)


@pytest.mark.parametrize("script", SCRIPTS)
def test_retries(refusing: Refusing, agrees: Callable[[Any], None], script: str) -> None:
    agrees(run_script(script, base=refusing.base, model=MODEL, texts=TEXTS)["vectors"])
    assert refusing.requests == 2
