"""Model names with selectors, and context references."""

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.context_refs import check_name, parse_ref
from app.domain import InputType
from app.errors import InvalidRequest, ModelNotFound
from app.models.base import TwoStageModel
from app.registry import Registry, ServedModel
from app.tokenization import TextTokenizer


def _served(*names: str) -> ServedModel:
    return ServedModel(names, cast(TwoStageModel, None), cast(TextTokenizer, None))


registry = Registry(
    [_served("jxm/cde-small-v2", "cde-small-v2", "text-embedding-3-small"), _served("odd:query", "odd@name")]
)


@pytest.mark.parametrize(
    ("name", "model", "context", "input_type"),
    [
        ("jxm/cde-small-v2", 0, None, None),
        ("cde-small-v2", 0, None, None),
        ("text-embedding-3-small", 0, None, None),
        ("cde-small-v2@legal", 0, "legal", None),
        ("cde-small-v2@legal.3:query", 0, "legal.3", InputType.QUERY),
        ("jxm/cde-small-v2:document", 0, None, InputType.DOCUMENT),
        ("cde-small-v2:none", 0, None, InputType.NONE),
        ("odd:query", 1, None, None),
        ("odd:query:query", 1, None, InputType.QUERY),
        ("odd@name", 1, None, None),
        ("odd@name@legal", 1, "legal", None),
    ],
)
def test_names_come_apart(name: str, model: int, context: str | None, input_type: InputType | None) -> None:
    choice = registry.choose(name)
    assert (choice.served, choice.context, choice.input_type) == (registry.models[model], context, input_type)


@pytest.mark.parametrize("name", ["", "cde", "@legal", "cde-small-v2:quary", "cde-small-v3@legal", ":query"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ModelNotFound):
        registry.choose(name)


@given(st.text())
def test_any_text_is_a_choice_or_a_clear_no(name: str) -> None:
    try:
        assert registry.choose(name).served in registry.models
    except ModelNotFound as error:
        assert error.param == "model"


def test_references() -> None:
    assert parse_ref("legal").name == "legal"
    assert (parse_ref("legal.12").name, parse_ref("legal.12").version) == ("legal", 12)
    assert parse_ref("ctx_" + "0" * 32).id == "ctx_" + "0" * 32


@pytest.mark.parametrize("ref", ["", "Legal", "-legal", "legal.0", "legal.x", "a" * 64, "a/b", "ctx_é", "legal\n"])
def test_bad_references(ref: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_ref(ref)


@pytest.mark.parametrize("name", ["ctx_abc", "a.1", "A", "", "a" * 64])
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_name(name)
