"""LlamaIndex: its OpenAI embedding and the one for servers like OpenAI's."""

from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.clients.helpers import MODEL, TEXTS, TOO_LONG, UNKNOWN, optional
from tests.clients.refusing import Refusing

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's packages warn as they like


@pytest.fixture(params=["openai.OpenAIEmbedding", "openai_like.OpenAILikeEmbedding"])
def embedding(request: pytest.FixtureRequest) -> Callable[..., Any]:
    package, kind = request.param.split(".")
    made: type[Any] = getattr(optional(f"llama_index.embeddings.{package}"), kind)

    def make(base: str, model: str = MODEL, **options: Any) -> Any:
        return made(**{"model_name": model, "api_base": base, "api_key": "none", "max_retries": 2} | options)

    return make


async def test_vectors(base: str, agrees: Callable[[Any], None], embedding: Callable[..., Any]) -> None:
    client = embedding(base)
    agrees(client.get_text_embedding_batch(TEXTS))
    agrees([client.get_query_embedding(text) for text in TEXTS])
    agrees(await client.aget_text_embedding_batch(TEXTS))


def test_context_in_the_body(base: str, agrees: Callable[[Any], None], embedding: Callable[..., Any]) -> None:
    body = {"context": "legal", "input_type": "query"}
    agrees(embedding(base, "minilm-context", additional_kwargs={"extra_body": body}).get_text_embedding_batch(TEXTS))


def test_errors(base: str, locked: str, embedding: Callable[..., Any]) -> None:
    with pytest.raises(openai.NotFoundError):
        embedding(base, UNKNOWN).get_query_embedding("x")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        embedding(base).get_text_embedding(TOO_LONG)
    with pytest.raises(openai.AuthenticationError):
        embedding(locked, api_key="wrong").get_query_embedding("x")


def test_retries(refusing: Refusing, agrees: Callable[[Any], None], embedding: Callable[..., Any]) -> None:
    agrees(embedding(refusing.base).get_text_embedding_batch(TEXTS))
    assert refusing.requests == 2
