"""cl100k_base ids back to text, with the genuine vocabulary; and what happens without it."""

import threading

import pytest
import tiktoken

from app import token_ids
from app.token_ids import Cl100k, VocabularyMissing
from tests.vocabulary import needs_vocabulary

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Crème brûlée,  two  spaces\n\tand a tab",
    "東京都の狐 дремлет في الحظيرة",
    "👩‍👩‍👧‍👦 and 🏴‍☠️",
    "<|endoftext|> is text here",
    " ",
]
OUTSIDE = [100256, *range(100261, 100276), 100277, 200000, 2**31, 2**32, 2**64, 2**80, -1, -(2**70)]


@needs_vocabulary
def test_ordinary_ids_are_exactly_the_text() -> None:
    encoding = tiktoken.get_encoding("cl100k_base")
    assert Cl100k().decode([encoding.encode_ordinary(text) for text in TEXTS]) == TEXTS


@needs_vocabulary
@pytest.mark.parametrize("outside", OUTSIDE)
def test_ids_of_no_token_are_refused_by_position(outside: int) -> None:
    with pytest.raises(ValueError, match=r"input\[1\] holds an id that cl100k_base does not have"):
        Cl100k().decode([[791, 4062], [791, outside]])


@needs_vocabulary
def test_special_tokens_are_their_names_and_half_a_character_is_replaced() -> None:
    named = {
        100257: "<|endoftext|>",
        100258: "<|fim_prefix|>",
        100259: "<|fim_middle|>",
        100260: "<|fim_suffix|>",
        100276: "<|endofprompt|>",
    }
    assert Cl100k().decode([[i] for i in named]) == list(named.values())
    fox = tiktoken.get_encoding("cl100k_base").encode_ordinary("🦊")
    assert len(fox) > 1
    assert Cl100k().decode([fox[:-1]]) == ["\ufffd"]


def test_a_missing_vocabulary_is_looked_for_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fails(name: str) -> tiktoken.Encoding:
        tries.append(name)
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fails)
    cl100k = Cl100k()
    for _ in range(3):
        with pytest.raises(VocabularyMissing):
            cl100k.decode([[791]])
    assert tries == ["cl100k_base"]
    monkeypatch.setattr(token_ids, "AGAIN_SECONDS", 0.0)
    with pytest.raises(VocabularyMissing):
        cl100k.decode([[791]])
    assert len(tries) == 2


def test_a_download_that_hangs_holds_one_thread_only(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, done, left = threading.Event(), threading.Event(), threading.Event()

    def hangs(name: str) -> tiktoken.Encoding:
        inside.set()
        done.wait(30)
        left.set()
        raise OSError("timed out")

    def first() -> None:
        with pytest.raises(VocabularyMissing):
            cl100k.decode([[791]])

    monkeypatch.setattr(tiktoken, "get_encoding", hangs)
    monkeypatch.setattr(token_ids, "PATIENCE_SECONDS", 0.05)
    cl100k = Cl100k()
    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert inside.wait(10)
        with pytest.raises(VocabularyMissing):
            cl100k.decode([[791]])
        assert not left.is_set(), "it did not wait for the first"
    finally:
        done.set()
        thread.join(10)
