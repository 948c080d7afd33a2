"""Token ids as LangChain sends them: lists of cl100k_base ids, base64, and "" for a text of no tokens."""

import base64
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import tiktoken

from app.token_ids import Cl100k, VocabularyMissing
from tests.api.test_errors import check
from tests.compare import assert_same
from tests.conftest import BUILTIN
from tests.live import V1, live_server
from tests.unit.test_token_ids import OUTSIDE, TEXTS
from tests.vocabulary import needs_vocabulary


@needs_vocabulary
@pytest.mark.parametrize("model", [BUILTIN, V1])
def test_ids_give_the_vectors_of_their_text(http: httpx.Client, model: str) -> None:
    encoding = tiktoken.get_encoding("cl100k_base")
    ids = [encoding.encode_ordinary(text) for text in TEXTS]
    body = {"model": model, "encoding_format": "base64"}
    by_ids = http.post("/v1/embeddings", json={**body, "input": ids}).json()
    by_text = http.post("/v1/embeddings", json={**body, "input": TEXTS}).json()
    assert by_ids["usage"] == by_text["usage"]
    for found, expected in zip(by_ids["data"], by_text["data"], strict=True):
        assert_same(
            *(np.frombuffer(base64.b64decode(item["embedding"]), dtype="<f4") for item in (found, expected)),
        )
    one = http.post("/v1/embeddings", json={**body, "input": ids[0]}).json()
    assert len(one["data"]) == 1


@needs_vocabulary
def test_ids_outside_the_vocabulary_are_a_400(http: httpx.Client) -> None:
    for outside in OUTSIDE:
        response = http.post("/v1/embeddings", json={"model": BUILTIN, "input": [[791], [791, outside]]})
        # JSON's integers end at 64 bits; beyond them the body is not read at all.
        if -(2**63) <= outside < 2**64:
            check(response, 400, None, "input", "input[1]", "cl100k_base")
        else:
            assert response.status_code == 400


@needs_vocabulary
def test_a_request_is_as_large_as_its_ids_are_many(data_dir: Path) -> None:
    """LangChain sends at most 300,000 of them, whatever the model makes of them."""
    encoding = tiktoken.get_encoding("cl100k_base")
    texts = ["Договор вступает в силу с момента подписания."] * 3
    ids = [encoding.encode_ordinary(text) for text in texts]
    limit = sum(map(len, ids))
    with live_server(data_dir, (BUILTIN,), limits={"max_tokens_per_request": limit}) as url:
        taken = httpx.post(f"{url}/v1/embeddings", json={"model": BUILTIN, "input": ids})
        assert taken.json()["usage"]["prompt_tokens"] > limit
        for refused in (texts, [*ids, [791]]):
            response = httpx.post(f"{url}/v1/embeddings", json={"model": BUILTIN, "input": refused})
            check(response, 400, "max_tokens_per_request", "input", f"at most {limit}")


def test_langchains_empty_text_is_a_400(http: httpx.Client) -> None:
    check(http.post("/v1/embeddings", json={"model": BUILTIN, "input": ""}), 400, None, "input", "empty string")
    check(http.post("/v1/embeddings", json={"model": BUILTIN, "input": [[]]}), 400, None, "input", "non-empty")


def test_without_a_vocabulary_ids_are_a_400_that_says_what_to_do(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_self: Cl100k) -> tiktoken.Encoding:
        raise VocabularyMissing

    monkeypatch.setattr(Cl100k, "_loaded", missing)
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False") as caught:
        client.embeddings.create(model=BUILTIN, input=[[791, 4062]])
    assert caught.value.code == "token_ids_not_accepted"
