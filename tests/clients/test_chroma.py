"""Chroma's embedding function, alone and under a collection."""

from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.clients.helpers import MODEL, TEXTS, TOO_LONG, UNKNOWN, optional
from tests.clients.refusing import Refusing

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's packages warn as they like


def function(base: str, model: str = MODEL, key: str = "none") -> Any:
    made = optional("chromadb.utils.embedding_functions").OpenAIEmbeddingFunction
    return made(api_base=base, model_name=model, api_key=key)


def test_vectors(base: str, agrees: Callable[[Any], None]) -> None:
    agrees(function(base)(TEXTS))


def test_a_collection_finds_by_meaning(base: str) -> None:
    chroma = optional("chromadb").EphemeralClient()
    documents = function(base, "minilm-context@legal:document")
    collection = chroma.create_collection("pages", embedding_function=documents)
    collection.add(ids=["owl", "rice"], documents=["The owl sleeps in the barn.", "Boil the rice for ten minutes."])
    query = function(base)(["How long does rice take?"])
    assert collection.query(query_embeddings=query, n_results=1)["ids"] == [["rice"]]


def test_errors(base: str, locked: str) -> None:
    with pytest.raises(openai.NotFoundError):
        function(base, UNKNOWN)(["x"])
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        function(base)([TOO_LONG])
    with pytest.raises(openai.BadRequestError, match="empty string"):
        function(base)([""])
    with pytest.raises(openai.AuthenticationError):
        function(locked, key="wrong")(["x"])


def test_retries(refusing: Refusing, agrees: Callable[[Any], None]) -> None:
    agrees(function(refusing.base)(TEXTS))
    assert refusing.requests == 2
