"""Texts and ids as a model takes them, against the golden ids and against transformers' own truncation."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from app.domain import CHARACTERS_PER_TOKEN, InputType, TokenizedText
from app.errors import CheckpointError, ContextLengthExceeded, InvalidRequest, TooManyTokens
from app.tokenization import PIECE_CHARACTERS, TextTokenizer, _pieces, within

GOLDENS = Path(__file__).parents[1] / "goldens"
V1, V2 = "v1-tiny-c16", "v2-tiny-c16"
PROMPTS = {InputType.QUERY: "search_query: ", InputType.DOCUMENT: "search_document: ", InputType.NONE: ""}
FRAMES = {V1: (2, 3), V2: (891, 892)}
QUERY, DOCUMENT, NONE = InputType.QUERY, InputType.DOCUMENT, InputType.NONE
LONG = "The mountain rescue unit inspected an invoice for roof tiles: twice, naïvely. 東京 😀 " * 30

both = pytest.mark.parametrize("golden", [V1, V2])


@cache
def tokenizer(golden: str, max_length: int = 512, default: InputType = DOCUMENT) -> TextTokenizer:
    return opened(GOLDENS / golden / "tokenizer.json", max_length, default)


def opened(
    path: Path, max_length: int = 512, default: InputType = DOCUMENT, prompts: Mapping[InputType, str] = PROMPTS
) -> TextTokenizer:
    return TextTokenizer(path, prompts=prompts, max_length=max_length, default_input_type=default)


def of_ids(
    tokenizer: TextTokenizer,
    inputs: Sequence[Sequence[int]],
    kind: InputType | None,
    *,
    truncate: bool,
) -> list[TokenizedText]:
    return list(chain.from_iterable(tokenizer.ids_in_pieces(inputs, kind, truncate=truncate)))


@cache
def plain(golden: str) -> Tokenizer:
    """The library's tokenizer by itself."""
    return Tokenizer.from_file(str(GOLDENS / golden / "tokenizer.json"))


def plain_ids(golden: str, text: str, *, special: bool = True) -> tuple[int, ...]:
    return tuple(plain(golden).encode(text, add_special_tokens=special).ids)


def one(golden: str, text: str, input_type: InputType | None, default: InputType = DOCUMENT) -> TokenizedText:
    (found,) = tokenizer(golden, default=default).texts([text], input_type, truncate=True)
    return found


def cases() -> list[Any]:
    found = []
    for golden in (V1, "v1-tiny-c512", V2, "v2-tiny-c512"):
        raw = json.loads((GOLDENS / golden / "cases.json").read_text(encoding="utf-8"))
        found += [pytest.param(golden, case, id=f"{golden}-{case['name']}") for case in raw["cases"]]
    return found


@pytest.mark.parametrize(("golden", "case"), cases())
def test_golden_ids(golden: str, case: dict[str, Any]) -> None:
    found = tokenizer(golden, case["max_length"]).texts(case["texts"], InputType(case["prompt"]), truncate=True)
    assert [list(text.input_ids) for text in found] == case["input_ids"]
    assert {text.input_type for text in found} == {InputType(case["prompt"])}


# --- prompts -------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", list(InputType))
def test_prompt_of_the_given_type(golden: str, kind: InputType) -> None:
    found = one(golden, "an old map", kind)
    assert found.input_type is kind
    assert found.input_ids == plain_ids(golden, PROMPTS[kind] + "an old map")


@both
@pytest.mark.parametrize("default", list(InputType))
def test_no_type_given(golden: str, default: InputType) -> None:
    assert one(golden, "an old map", None, default) == one(golden, "an old map", default)


@both
@pytest.mark.parametrize("kept", [QUERY, DOCUMENT])
@pytest.mark.parametrize("default", list(InputType))
def test_a_prompt_already_there_is_kept(golden: str, kept: InputType, default: InputType) -> None:
    found = one(golden, PROMPTS[kept] + "an old map", None, default)
    assert found.input_type is kept
    assert found.input_ids == plain_ids(golden, PROMPTS[kept] + "an old map")


@both
def test_a_given_type_goes_in_front_of_another_prompt_and_is_not_doubled(golden: str) -> None:
    both_prompts = "search_document: search_query: map"
    assert one(golden, "search_query: map", DOCUMENT).input_ids == plain_ids(golden, both_prompts)
    assert one(golden, "search_query: map", QUERY).input_ids == plain_ids(golden, "search_query: map")
    assert one(golden, "search_query: map", NONE).input_ids == plain_ids(golden, "search_query: map")
    assert one(golden, "search_query: map", NONE).input_type is NONE


@both
@pytest.mark.parametrize("text", ["Search_query: map", " search_query: map", "search_query:map", "search_query", ""])
def test_what_only_looks_like_a_prompt(golden: str, text: str) -> None:
    assert one(golden, text, None).input_ids == plain_ids(golden, "search_document: " + text)


@both
def test_each_text_of_a_request_by_itself(golden: str) -> None:
    texts = ["search_query: map", "map", "search_document: map", LONG, ""]
    found = tokenizer(golden, default=NONE).texts(texts, None, truncate=True)
    assert [text.input_type for text in found] == [QUERY, NONE, DOCUMENT, NONE, NONE]
    assert found == [one(golden, text, None, NONE) for text in texts]
    assert tokenizer(golden).texts([], None, truncate=False) == []


def test_a_model_without_prompts() -> None:
    bare = opened(GOLDENS / V1 / "tokenizer.json", 256, NONE, dict.fromkeys(InputType, ""))
    found = bare.texts(["search_query: map", "map"], None, truncate=False)
    assert [text.input_type for text in found] == [NONE, NONE]
    assert [text.input_ids for text in found] == [plain_ids(V1, "search_query: map"), plain_ids(V1, "map")]
    (query,) = bare.texts(["map"], QUERY, truncate=False)
    assert query == TokenizedText(plain_ids(V1, "map"), QUERY)


@both
def test_special_tokens_in_a_text_are_special(golden: str) -> None:
    """As in transformers by default."""
    assert one(golden, "a [SEP] b", NONE).input_ids.count(FRAMES[golden][1]) == 2


# --- cutting -------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("max_length", [3, 16, 128, 512])
def test_cut_as_transformers_cuts(golden: str, max_length: int) -> None:
    transformers_tokenizer: Any = PreTrainedTokenizerFast  # its types do not know its arguments
    theirs = transformers_tokenizer(tokenizer_file=str(GOLDENS / golden / "tokenizer.json"))
    texts = ["", "rye", LONG, "[SEP] " * 600, "x" * 3000, "ü東😀" * 400]
    found = tokenizer(golden, max_length).texts(texts, DOCUMENT, truncate=True)
    for text, ours in zip(texts, found, strict=True):
        expected = theirs("search_document: " + text, truncation=True, max_length=max_length)["input_ids"]
        assert list(ours.input_ids) == expected
        long = len(plain_ids(golden, "search_document: " + text)) > max_length
        assert ours.truncated == (long or len(text) > max_length * CHARACTERS_PER_TOKEN)


def words(golden: str, tokens: int) -> str:
    """A text of exactly so many tokens, special ones counted."""
    text = " ".join(["a"] * (tokens - 2))
    assert len(plain_ids(golden, text)) == tokens
    return text


@both
def test_the_limit_to_the_token(golden: str) -> None:
    exact, over = words(golden, 512), words(golden, 513)
    strict = tokenizer(golden)
    (fits,) = strict.texts([exact], NONE, truncate=False)
    assert len(fits.input_ids) == 512
    assert not fits.truncated
    (cut,) = strict.texts([over], NONE, truncate=True)
    assert cut == TokenizedText(fits.input_ids, NONE, truncated=True)
    with pytest.raises(ContextLengthExceeded) as caught:
        strict.texts(["short", over], NONE, truncate=False)
    message = caught.value.message
    assert "This model's maximum context length is 512 tokens, however you requested 513 tokens" in message
    assert "input[1]" in message
    assert "Please reduce your prompt; or completion length." in message  # looked for by Elasticsearch, which then cuts
    assert "truncate = end" in message
    assert '"' not in message  # Python clients show the error as a dict's repr, and some look for the first words in it
    assert caught.value.param == "input"


@both
def test_of_a_very_long_text_only_its_beginning_is_read(golden: str) -> None:
    small = tokenizer(golden, 16)
    read = 16 * CHARACTERS_PER_TOKEN
    for text in (" " * read + "rye", LONG + "!" * 1_000_000):
        (found,) = small.texts([text], NONE, truncate=True)
        assert found.truncated
        ids = plain_ids(golden, text[:read])
        assert found.input_ids == ids[:-1][:15] + ids[-1:]
        with pytest.raises(ContextLengthExceeded, match=f"sent {len(text)} characters .in input.1"):
            small.texts(["rye", text], NONE, truncate=False)


@given(st.lists(st.integers(0, PIECE_CHARACTERS + 9), max_size=12))
@example([0, PIECE_CHARACTERS + 1])
def test_pieces_are_bounded_and_lose_nothing(sizes: list[int]) -> None:
    texts = [chr(65 + i) * size for i, size in enumerate(sizes)]
    pieces = list(_pieces(texts))
    assert [text for piece in pieces for text in piece] == texts
    assert all(len(piece) == 1 or sum(map(len, piece)) <= PIECE_CHARACTERS for piece in pieces)


@both
def test_many_texts_go_through_in_pieces(golden: str) -> None:
    texts = [f"{i} " + "rye " * 300 for i in range(300)]
    assert sum(map(len, texts)) > 2 * PIECE_CHARACTERS
    together = tokenizer(golden).texts(texts, DOCUMENT, truncate=True)
    assert together == [one(golden, text, DOCUMENT) for text in texts]


@both
def test_texts_of_too_many_tokens_are_not_all_tokenized(golden: str) -> None:
    """Tokens count as they are cut, and the first piece that is too much is the last one."""
    limited, texts = tokenizer(golden, 16), ["rye " * 250] * 2000
    cut = within(16 * 2000, limited.texts_in_pieces(texts, NONE, truncate=True))
    assert sum(map(len, cut)) == 2000
    for most, whole in ((16 * 2000 - 1, 15), (16 * 300, 2), (15, 0)):
        pieces = within(most, limited.texts_in_pieces(texts, NONE, truncate=True))
        seen = [len(next(pieces)) for _ in range(whole)]
        assert 16 * sum(seen) <= most
        with pytest.raises(TooManyTokens, match=f"at most {most} fit in one request") as refused:
            next(pieces)
        assert refused.value.param == "input"


@both
def test_ids_of_too_many_tokens(golden: str) -> None:
    limited, inputs = tokenizer(golden, 16), [list(range(9, 509)) * 2] * 500
    found = list(within(16 * 500, limited.ids_in_pieces(inputs, NONE, truncate=True)))
    assert [text for piece in found for text in piece] == of_ids(limited, inputs, NONE, truncate=True)
    assert len(found) > 1
    with pytest.raises(TooManyTokens):
        list(within(16 * 500 - 1, limited.ids_in_pieces(inputs, NONE, truncate=True)))


@both
def test_the_prompt_counts_towards_the_limit(golden: str) -> None:
    text = words(golden, 512)
    whole = len(plain_ids(golden, PROMPTS[QUERY] + text))
    assert whole > 512
    with pytest.raises(ContextLengthExceeded, match=f"however you requested {whole} tokens"):
        tokenizer(golden).texts([text], QUERY, truncate=False)
    tokenizer(golden).texts([words(golden, 512 - (whole - 512))], QUERY, truncate=False)


@both
def test_settings_inside_the_file_do_not_count(golden: str, tmp_path: Path) -> None:
    """Published tokenizers carry somebody's truncation and padding."""
    changed = Tokenizer.from_file(str(GOLDENS / golden / "tokenizer.json"))
    changed.enable_truncation(16)
    changed.enable_padding(length=64)
    changed.save(str(tmp_path / "tokenizer.json"))
    found = opened(tmp_path / "tokenizer.json").texts(["rye", words(golden, 200)], NONE, truncate=False)
    assert [len(text.input_ids) for text in found] == [len(plain_ids(golden, "rye")), 200]


@both
def test_another_limit(golden: str) -> None:
    limited = tokenizer(golden).limited_to(20)
    assert limited.texts([LONG], None, truncate=True) == tokenizer(golden, 20).texts([LONG], None, truncate=True)
    assert limited.revision == tokenizer(golden).revision
    assert len(one(golden, LONG, None).input_ids) == 512


@both
def test_uncut(golden: str) -> None:
    found = tokenizer(golden).uncut([LONG, "search_query: rye"], None)
    assert found == [list(plain_ids(golden, "search_document: " + LONG)), list(plain_ids(golden, "search_query: rye"))]


any_text = st.text(st.characters(exclude_categories=[]), max_size=60) | st.text("ab[SEP] é東😀\ud83d", max_size=60)


@both
def test_cut_ids(golden: str) -> None:
    @given(texts=st.lists(any_text, max_size=4), kind=st.sampled_from([*InputType, None]), limit=st.integers(2, 40))
    @settings(max_examples=150, derandomize=True, database=None)
    def check(texts: list[str], kind: InputType | None, limit: int) -> None:
        found = tokenizer(golden, limit).texts(texts, kind, truncate=True)
        whole = tokenizer(golden, limit).uncut(texts, kind)
        first, last = FRAMES[golden]
        assert len(found) == len(texts)
        for cut, ids in zip(found, whole, strict=True):
            assert 2 <= len(cut.input_ids) == min(limit, len(ids))
            assert (cut.input_ids[0], cut.input_ids[-1]) == (first, last)
            assert list(cut.input_ids[:-1]) == ids[: len(cut.input_ids) - 1]
            assert cut.truncated == (len(ids) > limit)

    check()


# --- lone surrogates -----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ("\ud83d", "\ufffd"),
        ("half \ud83d an emoji", "half \ufffd an emoji"),
        ("\ude00first", "\ufffdfirst"),
        ("last\ud83d", "last\ufffd"),
        ("\ud83d\ude00 in two halves", "😀 in two halves"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ufeffmark \ud83d 東京", "\ufeffmark \ufffd 東京"),
        ("search_query: \ud83d", "search_query: \ufffd"),
    ],
)
def test_lone_surrogates(golden: str, sent: str, meant: str) -> None:
    found = tokenizer(golden).texts([sent, "next"], None, truncate=False)
    assert found == tokenizer(golden).texts([meant, "next"], None, truncate=False)


# --- ids -----------------------------------------------------------------------------------------------------------


def as_ids(golden: str, inputs: Sequence[Sequence[int]], kind: InputType | None = None) -> list[TokenizedText]:
    return of_ids(tokenizer(golden), inputs, kind, truncate=True)


@both
@pytest.mark.parametrize("kind", [*InputType, None])
def test_ids_of_a_text_are_the_text(golden: str, kind: InputType | None) -> None:
    text = "the museum conservator"
    assert as_ids(golden, [plain_ids(golden, text, special=False)], kind) == [
        TokenizedText(
            (
                FRAMES[golden][0],
                *plain_ids(golden, PROMPTS[kind or DOCUMENT], special=False),
                *plain_ids(golden, text, special=False),
                FRAMES[golden][1],
            ),
            kind or DOCUMENT,
        )
    ]
    if golden == V1:  # bytes merge over the prompt's end, word pieces do not
        assert as_ids(golden, [plain_ids(golden, text, special=False)], kind)[0] == one(golden, text, kind)


@both
def test_ids_in_special_tokens_are_taken_as_they_are(golden: str) -> None:
    framed = plain_ids(golden, "search_query: the museum")
    assert as_ids(golden, [framed, [*FRAMES[golden]]], QUERY) == [
        TokenizedText(framed, QUERY),
        TokenizedText(FRAMES[golden], QUERY),
    ]


@both
def test_ids_in_half_a_frame_get_a_whole_one(golden: str) -> None:
    first, last = FRAMES[golden]
    for given_ids in ([first], [last], [first, 9], [9, last], []):
        assert as_ids(golden, [given_ids], NONE)[0].input_ids == (first, *given_ids, last)


@both
@pytest.mark.parametrize("wrong", [-1, "vocabulary", 10**6, 2**70])
def test_ids_outside_the_vocabulary(golden: str, wrong: int | str) -> None:
    size = plain(golden).get_vocab_size()
    token = size if isinstance(wrong, str) else wrong
    as_ids(golden, [[0, size - 1]])
    for bad in ([5, token], [FRAMES[golden][0], token, FRAMES[golden][1]]):
        with pytest.raises(InvalidRequest) as caught:
            as_ids(golden, [[5], bad])
        assert str(token) in caught.value.message
        assert str(size) in caught.value.message
        assert "input[1]" in caught.value.message
        assert caught.value.param == "input"
        assert not isinstance(caught.value, ContextLengthExceeded)


@both
def test_ids_are_cut_as_texts_are(golden: str) -> None:
    first, last = FRAMES[golden]
    (cut,) = as_ids(golden, [[7] * 600], NONE)
    assert cut == TokenizedText((first, *[7] * 510, last), NONE, truncated=True)
    (framed,) = as_ids(golden, [[first, *[7] * 600, last]])
    assert framed.input_ids == cut.input_ids
    with pytest.raises(ContextLengthExceeded, match=r"512 tokens, however you requested 602 tokens .*input\[0\]"):
        of_ids(tokenizer(golden), [[7] * 600], NONE, truncate=False)


# --- threads -------------------------------------------------------------------------------------------------------


@both
def test_eight_threads(golden: str) -> None:
    """Requests of all lengths, types and limits at once, each as if it were alone."""
    shared = tokenizer(golden)
    short = shared.limited_to(20)
    texts = ["rye", LONG, "", "search_query: an old map", LONG[:300], "\ud83d"]

    def request(i: int) -> object:
        some = texts[i % 5 :] + texts[: i % 4]
        kind = (*InputType, None)[i % 4]
        return (
            shared.texts(some, kind, truncate=True),
            short.texts(some, kind, truncate=True),
            of_ids(shared, [[7] * (i % 700)], kind, truncate=True),
            shared.uncut(some, kind),
            shared.id_of(": "),
        )

    alone = [request(i) for i in range(20)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(request, [i % 20 for i in range(160)]))
    assert together == alone * 8


# --- the file ------------------------------------------------------------------------------------------------------


@both
def test_what_is_known_of_the_file(golden: str) -> None:
    path = GOLDENS / golden / "tokenizer.json"
    assert tokenizer(golden).revision == hashlib.sha256(path.read_bytes()).hexdigest()
    assert tokenizer(golden).vocab_size == plain(golden).get_vocab_size()
    header = json.loads((path.parent / "cases.json").read_text(encoding="utf-8"))
    if golden == V2:
        assert tokenizer(golden).id_of(": ") == header["instruction_end_id"]
    assert tokenizer(golden).tokens(FRAMES[golden]) == ["[CLS]", "[SEP]"]
    assert tokenizer(golden).tokens([10**6]) == [""]


@pytest.mark.parametrize("content", [None, b"", b"{}", b"not json", b"\x80\x02."])
def test_what_is_no_tokenizer(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        opened(path)


def test_a_tokenizer_that_frames_otherwise(tmp_path: Path) -> None:
    """Cutting keeps one token at each end: no other frame is served."""
    raw = json.loads((GOLDENS / V2 / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**raw, "post_processor": None}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="puts 0 special tokens"):
        opened(tmp_path / "tokenizer.json")
