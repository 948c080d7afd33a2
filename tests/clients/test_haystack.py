"""Haystack's embedders for queries and for documents."""

from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.clients.helpers import MODEL, TEXTS, TOO_LONG, UNKNOWN, optional
from tests.clients.refusing import Refusing

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's packages warn as they like


def options(base: str, model: str = MODEL, key: str = "none") -> dict[str, Any]:
    secret = optional("haystack.utils").Secret.from_token(key)
    return {"api_base_url": base, "model": model, "api_key": secret}


def documents(texts: list[str]) -> list[Any]:
    document = optional("haystack").Document
    return [document(content=text, meta={"place": place}) for place, text in enumerate(texts)]


def test_vectors(base: str, agrees: Callable[[Any], None]) -> None:
    embedders = optional("haystack.components.embedders")
    one = embedders.OpenAITextEmbedder(**options(base))
    agrees([one.run(text)["embedding"] for text in TEXTS])
    answer = embedders.OpenAIDocumentEmbedder(**options(base), progress_bar=False).run(documents(TEXTS))
    agrees([document.embedding for document in answer["documents"]])
    assert answer["meta"]["usage"]["prompt_tokens"] > 0


def test_errors(base: str, locked: str) -> None:
    embedders = optional("haystack.components.embedders")
    with pytest.raises(openai.NotFoundError):
        embedders.OpenAITextEmbedder(**options(base, UNKNOWN)).run("x")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        embedders.OpenAITextEmbedder(**options(base)).run(TOO_LONG)
    with pytest.raises(openai.AuthenticationError):
        embedders.OpenAITextEmbedder(**options(locked, key="wrong")).run("x")


def test_the_document_embedder_raises_only_when_told(base: str) -> None:
    embedders = optional("haystack.components.embedders")
    given = {**options(base, UNKNOWN), "progress_bar": False}
    answer = embedders.OpenAIDocumentEmbedder(**given).run(documents(["x"]))
    assert answer["documents"][0].embedding is None
    with pytest.raises(openai.NotFoundError):
        embedders.OpenAIDocumentEmbedder(**given, raise_on_failure=True).run(documents(["x"]))


def test_retries(refusing: Refusing) -> None:
    embedder = optional("haystack.components.embedders").OpenAITextEmbedder(**options(refusing.base))
    assert embedder.run("x")["embedding"]
    assert refusing.requests == 2
