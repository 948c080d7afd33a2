"""The openai package: sync and async, both formats, the extra body, errors by class, and retries."""

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tests.clients.helpers import KEY, MODEL, TEXTS, TOO_LONG, UNKNOWN
from tests.clients.refusing import Refusing
from tests.live import V1

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's packages warn as they like


def asked(client: openai.OpenAI, **options: Any) -> list[list[float]]:
    answer = client.embeddings.create(**{"model": MODEL, "input": TEXTS} | options)
    assert [item.index for item in answer.data] == list(range(len(TEXTS)))
    return [item.embedding for item in answer.data]


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}], ids=str)
def test_sync(base: str, agrees: Callable[[Any], None], options: dict[str, str]) -> None:
    with openai.OpenAI(base_url=base, api_key="none") as client:
        if options.get("encoding_format") == "base64":  # asked for by hand, the text is not decoded
            assert all(isinstance(item, str) for item in asked(client, **options))
        else:
            agrees(asked(client, **options))


async def test_async(base: str, agrees: Callable[[Any], None]) -> None:
    async with openai.AsyncOpenAI(base_url=base, api_key="none") as client:
        answer = await client.embeddings.create(model=MODEL, input=TEXTS)
        agrees([item.embedding for item in answer.data])
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model=UNKNOWN, input="x")


def test_extra_body_and_headers(base: str, agrees: Callable[[Any], None]) -> None:
    with openai.OpenAI(base_url=base, api_key="none") as client:
        body = {"context": "legal", "input_type": "query"}
        agrees(asked(client, model="minilm-context", extra_body=body))
        headers = {"X-Context": "legal", "X-Input-Type": "query"}
        agrees(asked(client, model="minilm-context", extra_headers=headers))
        raw = client.embeddings.with_raw_response.create(model=MODEL, input="x")
        assert raw.headers["x-context-name"] == "legal"


def test_models(base: str) -> None:
    with openai.OpenAI(base_url=base, api_key="none") as client:
        listed = [model.id for model in client.models.list()]
        assert "builtin/minilm-context@legal" in listed
        for name in (*listed, "minilm-context", MODEL):
            assert client.models.retrieve(name).object == "model"


@pytest.mark.parametrize(
    ("options", "kind", "code"),
    [
        ({"model": UNKNOWN}, openai.NotFoundError, "model_not_found"),
        ({"model": "minilm-context@nowhere"}, openai.NotFoundError, "context_not_found"),
        (
            {"extra_body": {"context": "nowhere"}, "model": "minilm-context"},
            openai.BadRequestError,
            "context_not_found",
        ),
        ({"extra_body": {"contxt": "legal"}}, openai.BadRequestError, "unknown_parameter"),
        ({"input": ""}, openai.BadRequestError, None),
        ({"input": TOO_LONG}, openai.BadRequestError, "context_length_exceeded"),
        ({"dimensions": 7}, openai.BadRequestError, None),
    ],
    ids=str,
)
def test_errors(base: str, options: dict[str, Any], kind: type[openai.APIStatusError], code: str | None) -> None:
    with openai.OpenAI(base_url=base, api_key="none") as client, pytest.raises(kind) as caught:
        asked(client, **options)
    assert caught.value.code == code
    assert caught.value.request_id is not None


def test_keys(locked: str) -> None:
    with openai.OpenAI(base_url=locked, api_key=KEY) as client:
        assert client.embeddings.create(model=V1, input="x").data
    with openai.OpenAI(base_url=locked, api_key="wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.embeddings.create(model=V1, input="x")
    assert caught.value.code == "invalid_api_key"


def test_retries(refusing: Refusing, agrees: Callable[[Any], None]) -> None:
    with openai.OpenAI(base_url=refusing.base, api_key="none") as client:
        agrees(asked(client))
    assert refusing.requests == 2


async def test_async_retries(refusing: Refusing) -> None:
    async with openai.AsyncOpenAI(base_url=refusing.base, api_key="none") as client:
        assert (await client.embeddings.create(model=MODEL, input="x")).data
    assert refusing.requests == 2


def test_without_retries_the_class_says_which(refusing: Refusing) -> None:
    with (
        openai.OpenAI(base_url=refusing.base, api_key="none", max_retries=0) as client,
        pytest.raises((openai.RateLimitError, openai.InternalServerError)) as caught,
    ):
        asked(client)
    assert isinstance(caught.value, openai.RateLimitError) == (
        caught.value.status_code == httpx.codes.TOO_MANY_REQUESTS
    )
    assert caught.value.response.headers["retry-after"] == "1"
    assert refusing.requests == 1
