"""What every context store promises."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.domain import Arrays, ContextInfo, ContextRef, DocumentCounts, Selection, Space
from app.registry import parse_ref
from app.stores.base import ContextStore, NewContext

M = Space("m")
COUNTS = DocumentCounts(received=3, chosen=2, duplicates=1, truncated=1, repeated=14)


def new_context(name: str, content: int, space: Space = M) -> NewContext:
    return NewContext(
        id=f"ctx_{content:032x}",
        space=space,
        model_revision="r",
        name=name,
        selection=Selection("random", 7),
        documents=COUNTS,
        corpus_size=2,
        dimensions=3,
        metadata={"team": "search"},
        total=2,
    )


def arrays_of(content: int) -> Arrays:
    return {"dataset_embeddings": np.full((2, 3), content, np.float32)}


def put(store: ContextStore, name: str, content: int, space: Space = M) -> tuple[ContextInfo, bool]:
    return store.put(new_context(name, content, space), arrays_of(content))


def names_of(store: ContextStore, limit: int, *, newest_first: bool) -> list[str]:
    """The whole listing, page by page, as a client walks it."""
    found: list[str] = []
    after = None
    for _ in range(1000):
        page = store.list_current("", "m", after=after, limit=limit, newest_first=newest_first)
        assert page is not None
        found += [info.name for info in page.items]
        if not page.has_more:
            return found
        after = page.items[-1].id
    raise AssertionError("the listing does not end")


def test_what_was_put_comes_back(store: ContextStore) -> None:
    info, created = put(store, "legal", 1)
    assert created
    assert (info.name, info.version, info.id) == ("legal", 1, f"ctx_{1:032x}")
    assert (info.documents, info.selection, info.metadata) == (COUNTS, Selection("random", 7), {"team": "search"})
    for ref in ("legal", "legal.1", info.id):
        assert store.get(M, parse_ref(ref)) == info
    arrays = store.arrays(info.id)
    assert arrays is not None
    np.testing.assert_array_equal(arrays["dataset_embeddings"], np.full((2, 3), 1, np.float32))


def test_a_name_points_at_its_newest_version(store: ContextStore) -> None:
    put(store, "legal", 1)
    second, created = put(store, "legal", 2)
    assert created
    assert store.get(M, parse_ref("legal")) == second
    old = store.get(M, parse_ref("legal.1"))
    assert old is not None
    assert old.id == f"ctx_{1:032x}"
    assert [info.version for info in store.versions(M, "legal")] == [2, 1]


def test_the_same_content_again_is_the_version_that_is_there(store: ContextStore) -> None:
    first, _ = put(store, "legal", 1)
    assert put(store, "legal", 1) == (first, False)
    put(store, "legal", 2)
    assert put(store, "legal", 1) == (first, False)
    assert store.get(M, parse_ref("legal")) == first
    assert len(store.versions(M, "legal")) == 2


def test_names_move_back_and_forth(store: ContextStore) -> None:
    first, _ = put(store, "legal", 1)
    second, _ = put(store, "legal", 2)
    assert store.move(M, "legal", 1) == first
    assert store.get(M, parse_ref("legal")) == first
    assert store.move(M, "legal", 2) == second
    assert store.move(M, "legal", 3) is None
    assert store.move(M, "other", 1) is None
    third, _ = put(store, "legal", 3)
    assert third.version == 3


def test_models_do_not_share_names(store: ContextStore) -> None:
    put(store, "legal", 1, space=Space("a"))
    put(store, "legal", 2, space=Space("b"))
    mine = store.get(Space("a"), parse_ref("legal"))
    assert mine is not None
    assert mine.id == f"ctx_{1:032x}"
    assert store.get(Space("c"), parse_ref("legal")) is None
    assert list(store.models_of("", parse_ref("legal"))) == ["a", "b"]
    assert list(store.models_of("", parse_ref(f"ctx_{2:032x}"))) == ["b"]


def test_delete_by_name_takes_all_versions(store: ContextStore) -> None:
    put(store, "legal", 1)
    put(store, "legal", 2)
    put(store, "other", 2)
    assert store.delete_name(M, "legal")
    assert not store.delete_name(M, "legal")
    assert store.get(M, parse_ref("legal.1")) is None
    assert store.arrays(f"ctx_{1:032x}") is None
    assert store.arrays(f"ctx_{2:032x}") is not None, "another name holds it"


def test_delete_a_version_unless_a_name_points_at_it(store: ContextStore) -> None:
    put(store, "legal", 1)
    put(store, "legal", 2)
    assert store.delete_versions(M, parse_ref("legal.2")) is False
    assert store.delete_versions(M, ContextRef("", id=f"ctx_{2:032x}")) is False
    assert store.delete_versions(M, parse_ref("legal.1")) is True
    assert store.delete_versions(M, parse_ref("legal.1")) is None
    assert store.arrays(f"ctx_{1:032x}") is None
    assert [info.version for info in store.versions(M, "legal")] == [2]


def test_version_numbers_are_never_used_twice(store: ContextStore) -> None:
    put(store, "legal", 1)
    put(store, "legal", 2)
    store.move(M, "legal", 1)
    assert store.delete_versions(M, parse_ref("legal.2")) is True
    info, _ = put(store, "legal", 3)
    assert info.version == 3


def test_after_an_unknown_context(store: ContextStore) -> None:
    assert store.list_current("", "m", after=f"ctx_{9:032x}", limit=5, newest_first=True) is None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(st.integers(0, 6), max_size=12), limit=st.integers(1, 5), newest_first=st.booleans())
def test_pagination_never_loses_or_repeats_a_name(
    store: ContextStore, contents: list[int], limit: int, newest_first: bool
) -> None:
    """Names that share a content share the id that pages are cut by."""
    for name in names_of(store, 100, newest_first=True):
        store.delete_name(M, name)
    names = [f"n{i}" for i in range(len(contents))]
    for name, content in zip(names, contents, strict=True):
        put(store, name, content)
    assert sorted(names_of(store, limit, newest_first=newest_first)) == sorted(names)


def test_many_writers_at_once(store: ContextStore) -> None:
    """Versions 1..n, each once, and the name at one of them."""
    with ThreadPoolExecutor(8) as pool:
        infos = [info for info, _ in pool.map(lambda i: put(store, "legal", i), range(24))]
    assert sorted(info.version for info in infos) == list(range(1, 25))
    assert [info.version for info in store.versions(M, "legal")] == list(range(24, 0, -1))


def test_one_content_put_by_many_at_once_is_one_version(store: ContextStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: put(store, "legal", 5), range(16)))
    assert sum(created for _, created in results) == 1
    assert {info.version for info, _ in results} == {1}


@pytest.mark.parametrize("ref", ["legal", "legal.1", f"ctx_{0:032x}"])
def test_nothing_there(store: ContextStore, ref: str) -> None:
    assert store.get(M, parse_ref(ref)) is None
    assert store.arrays(f"ctx_{0:032x}") is None
    assert store.versions(M, "legal") == []
