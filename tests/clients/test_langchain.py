"""langchain-openai: token ids, its default, and strings."""

from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.clients.helpers import KEY, MODEL, TEXTS, TOO_LONG, UNKNOWN, optional
from tests.clients.refusing import Refusing
from tests.vocabulary import needs_vocabulary

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's packages warn as they like

WAYS = [
    pytest.param({}, id="token-ids", marks=needs_vocabulary),
    pytest.param({"check_embedding_ctx_length": False}, id="strings"),
]


def embeddings(base: str, **options: Any) -> Any:
    return optional("langchain_openai").OpenAIEmbeddings(
        **{"base_url": base, "api_key": "none", "model": MODEL} | options
    )


@pytest.mark.parametrize("way", WAYS)
async def test_vectors(base: str, agrees: Callable[[Any], None], way: dict[str, Any]) -> None:
    client = embeddings(base, **way)
    agrees(client.embed_documents(TEXTS))
    agrees([client.embed_query(text) for text in TEXTS])
    agrees(await client.aembed_documents(TEXTS))


@pytest.mark.parametrize("way", WAYS)
def test_context_in_the_body(base: str, agrees: Callable[[Any], None], way: dict[str, Any]) -> None:
    body = {"context": "legal", "input_type": "query"}
    agrees(embeddings(base, model="minilm-context", model_kwargs={"extra_body": body}, **way).embed_documents(TEXTS))


@pytest.mark.parametrize("way", WAYS)
def test_errors(base: str, locked: str, way: dict[str, Any]) -> None:
    with pytest.raises(openai.NotFoundError):
        embeddings(base, model=UNKNOWN, **way).embed_query("x")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        embeddings(base, **way).embed_documents([TOO_LONG])
    with pytest.raises(openai.BadRequestError, match="empty string"):
        embeddings(base, **way).embed_documents([""])
    with pytest.raises(openai.AuthenticationError):
        embeddings(locked, api_key=f"not-{KEY}", **way).embed_query("x")


@pytest.mark.parametrize("way", WAYS)
def test_retries(refusing: Refusing, agrees: Callable[[Any], None], way: dict[str, Any]) -> None:
    agrees(embeddings(refusing.base, **way).embed_documents(TEXTS))
    assert refusing.requests == 2
