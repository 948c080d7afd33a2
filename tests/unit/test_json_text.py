"""JSON as it comes: bounded, and as lenient as clients need."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import json_text
from app.json_text import InvalidJson, TooManyValues, parse_json

# No -0.0 and no integers beyond 64 bits: the two parsers differ there, and nothing depends on it.
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


def count(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(count, inner))


@given(values, st.booleans(), st.sampled_from([None, 1]))
def test_what_json_writes_is_read(value: Any, ascii_only: bool, indent: int | None) -> None:
    """Lone surrogates too, which `ensure_ascii` writes as escapes."""
    try:
        text = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    except UnicodeEncodeError:
        return
    assert parse_json(text) == value


@given(values, st.integers(1, 40), st.integers(1, 9))
def test_no_more_values_than_the_limit_and_texts_do_not_count(value: Any, limit: int, piece: int) -> None:
    """An empty list or object counts for two."""
    text = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "MAX_VALUES", limit)
        patch.setattr(json_text, "_PIECE", piece)
        try:
            parse_json(text)
        except TooManyValues:
            empty = text.count(b"[]") + text.count(b"{}")
            assert count(value) + empty > limit
        else:
            assert count(value) <= limit


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "line 1"),
        (b"[" * 5000 + b"]" * 5000, "depth"),
        (b'{"a":' * 5000 + b'"\\ud800"' + b"}" * 5000, "depth"),
        (b"NaN", "line 1, column 1"),
        (b'["\\ud800", NaN]', "line 1"),
        (b'["\\ud800", ' + b"1" * 5000 + b"]", "line 1"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b"1e999", "infinity"),
        (b"1 2", "line 1"),
    ],
)
def test_what_is_no_json(text: bytes, words: str) -> None:
    with pytest.raises(InvalidJson, match=words):
        parse_json(text)


def test_a_byte_order_mark_is_left_out() -> None:
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]
