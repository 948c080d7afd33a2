"""What every context store promises."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.context_refs import parse_ref
from app.domain import Arrays, ContextInfo, ContextRef, ContextStatus, DocumentCounts, Selection, Space
from app.stores import rows
from app.stores.base import LEASE_SECONDS, Begun, Built, ContextStore, NewContext

M = Space("m")
COUNTS = DocumentCounts(received=3, chosen=2, duplicates=1, truncated=1, repeated=14)


def new_context(name: str, content: int, space: Space = M, builder: str = "me") -> NewContext:
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
        builder=builder,
    )


def arrays_of(content: int) -> Arrays:
    return {"dataset_embeddings": np.full((2, 3), content, np.float32)}


def put(store: ContextStore, name: str, content: int, space: Space = M) -> tuple[ContextInfo, bool]:
    return store.put(new_context(name, content, space), arrays_of(content))


def names_of(store: ContextStore, limit: int, *, newest_first: bool, namespace: str = "") -> list[str]:
    """The whole listing, page by page, as a client walks it."""
    found: list[str] = []
    after = None
    for _ in range(1000):
        page = store.list_current(namespace, "m", after=after, limit=limit, newest_first=newest_first)
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


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_the_order_of_a_listing_says_nothing_of_other_namespaces(store: ContextStore) -> None:
    """Whether, and since when, another one holds the same content."""
    for i, namespace in ((3, "yours"), (1, "mine"), (3, "mine"), (2, "mine"), (4, "yours")):
        put(store, f"n{i}", i, space=Space("m", namespace))
    for newest_first, names in ((False, ["n1", "n3", "n2"]), (True, ["n2", "n3", "n1"])):
        assert names_of(store, 1, newest_first=newest_first, namespace="mine") == names
        assert names_of(store, 9, newest_first=newest_first, namespace="mine") == names
    assert store.list_current("mine", None, after=f"ctx_{4:032x}", limit=9, newest_first=True) is None


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


# --- Versions in progress ---


def built(content: int, texts: list[str] | None = None, context_id: str | None = None) -> Built:
    return Built(context_id or f"ctx_{content:032x}", arrays_of(content), Selection("random", 7), COUNTS, texts)


def silent_for(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """As if that much time had passed since the last sign of life."""
    later = datetime.now(UTC) + timedelta(seconds=seconds)
    monkeypatch.setattr(rows, "now", lambda: later)


def test_a_version_is_begun_and_completed(store: ContextStore) -> None:
    info, begun = store.begin(new_context("legal", 1))
    assert begun is Begun.OURS
    assert (info.status, info.version, info.progress) == (ContextStatus.IN_PROGRESS, 1, (0, 2))
    assert store.get(M, parse_ref("legal")) == info, "while there is no completed one"
    assert store.arrays(info.id) is None
    store.beat(info, "me", 1)
    seen = store.get(M, parse_ref(info.id))
    assert seen is not None
    assert seen.progress == (1, 2)
    assert store.begin(new_context("legal", 1))[1] is Begun.THEIRS
    completed = store.complete(info, built(1, ["a", "b"]))
    assert completed is not None
    assert (completed.status, completed.progress) == (ContextStatus.COMPLETED, (2, 2))
    assert store.get(M, parse_ref("legal.1")) == completed
    assert store.texts(completed) == ["a", "b"]
    assert store.begin(new_context("legal", 1)) == (completed, Begun.THERE)


def test_a_name_points_at_what_is_completed(store: ContextStore) -> None:
    first, _ = put(store, "legal", 1)
    second, _ = store.begin(new_context("legal", 2))
    third, _ = store.begin(new_context("legal", 3))
    assert [info.version for info in store.versions(M, "legal")] == [3, 2, 1]
    assert store.get(M, parse_ref("legal")) == first
    assert store.move(M, "legal", 2) is None, "not completed"
    assert store.complete(third, built(3)) is not None
    assert store.complete(second, built(2)) is not None, "an older one that took longer"
    current = store.get(M, parse_ref("legal"))
    assert current is not None
    assert current.version == 3


def test_what_fails_leaves_the_name_alone_and_may_begin_anew(store: ContextStore) -> None:
    first, _ = put(store, "legal", 1)
    second, _ = store.begin(new_context("legal", 2))
    store.fail(second, "me", "the disk is full")
    seen = store.get(M, parse_ref("legal.2"))
    assert seen is not None
    assert (seen.status, seen.error) == (ContextStatus.FAILED, "the disk is full")
    assert store.get(M, parse_ref("legal")) == first
    again, begun = store.begin(new_context("legal", 2))
    assert (begun, again.version, again.status) == (Begun.OURS, 2, ContextStatus.IN_PROGRESS)
    assert store.complete(again, built(2)) is not None


def test_a_reason_of_any_length_is_told_in_part(store: ContextStore) -> None:
    info, _ = store.begin(new_context("legal", 1))
    store.fail(info, "me", "x" * 1000)
    seen = store.get(M, parse_ref("legal"))
    assert seen is not None
    assert (seen.status, seen.error) == (ContextStatus.FAILED, "x" * 512)


def test_what_is_completed_stays_so_without_further_signs_of_life(
    store: ContextStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, _ = put(store, "legal", 1)
    silent_for(monkeypatch, 100 * LEASE_SECONDS)
    assert store.get(M, parse_ref("legal")) == info
    assert put(store, "legal", 1) == (info, False)


def test_one_whose_builder_is_gone_has_failed(store: ContextStore, monkeypatch: pytest.MonkeyPatch) -> None:
    info, _ = store.begin(new_context("legal", 1))
    silent_for(monkeypatch, LEASE_SECONDS - 1)
    assert store.get(M, parse_ref("legal")) == info
    store.beat(info, "me", 1)
    silent_for(monkeypatch, 2 * LEASE_SECONDS - 2)
    assert store.begin(new_context("legal", 1))[1] is Begun.THEIRS
    silent_for(monkeypatch, 2 * LEASE_SECONDS)
    seen = store.get(M, parse_ref("legal"))
    assert seen is not None
    assert seen.status is ContextStatus.FAILED
    assert "stopped" in (seen.error or "")
    assert store.begin(new_context("legal", 1))[1] is Begun.OURS


def test_an_overtaken_builder_does_not_speak_for_its_successor(
    store: ContextStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has built is the same, so that counts."""
    info, _ = store.begin(new_context("legal", 1, builder="first"))
    silent_for(monkeypatch, LEASE_SECONDS + 1)
    again, begun = store.begin(new_context("legal", 1, builder="second"))
    assert (begun, again.version) == (Begun.OURS, 1)
    store.beat(info, "first", 2)
    store.fail(info, "first", "its process stops")
    seen = store.get(M, parse_ref("legal"))
    assert seen is not None
    assert (seen.status, seen.progress) == (ContextStatus.IN_PROGRESS, (0, 2))
    assert store.complete(info, built(1)) is not None
    store.fail(again, "second", "too late")
    seen = store.get(M, parse_ref("legal"))
    assert seen is not None
    assert seen.status is ContextStatus.COMPLETED


def test_deleted_while_it_is_built(store: ContextStore) -> None:
    info, _ = store.begin(new_context("legal", 1))
    assert store.delete_name(M, "legal")
    assert store.complete(info, built(1)) is None
    assert store.get(M, parse_ref(info.id)) is None
    assert store.arrays(info.id) is None


def test_a_choice_that_turns_out_to_be_there_already(store: ContextStore) -> None:
    """Begun under an id of its own; behind the first stage it is version 1's content."""
    first, _ = put(store, "legal", 1)
    put(store, "legal", 2)
    third, _ = store.begin(new_context("legal", 3))
    assert store.complete(third, built(1)) == first
    assert store.get(M, parse_ref("legal")) == first
    assert store.get(M, parse_ref("legal.3")) is None


def test_what_is_there_is_found_behind_a_later_failure(store: ContextStore) -> None:
    """Version 2 was begun with what version 1, a choice, turned out to be."""
    first, _ = store.begin(new_context("legal", 3))
    second, _ = store.begin(new_context("legal", 1))
    store.fail(second, "me", "for a reason")
    completed = store.complete(first, built(1))
    assert put(store, "legal", 1) == (completed, False)
    assert store.begin(new_context("legal", 1)) == (completed, Begun.THERE)


def test_a_choice_keeps_the_id_it_was_begun_under(store: ContextStore) -> None:
    info, _ = store.begin(new_context("legal", 3))
    completed = store.complete(info, built(4, context_id=f"ctx_{4:032x}"))
    assert completed is not None
    assert completed.id == f"ctx_{4:032x}"
    for ref in (f"ctx_{3:032x}", f"ctx_{4:032x}", "legal"):
        assert store.get(M, parse_ref(ref)) == completed
    assert store.begin(new_context("legal", 3)) == (completed, Begun.THERE)
    assert store.arrays(f"ctx_{3:032x}") is None


def test_versions_go_on_behind_a_deleted_name(store: ContextStore) -> None:
    """`legal.1` never comes to mean something else."""
    put(store, "legal", 1)
    store.delete_name(M, "legal")
    info, created = put(store, "legal", 2)
    assert created
    assert info.version == 2
    assert store.get(M, parse_ref("legal")) == info
    assert [i.name for i in store.versions(M, "legal")] == ["legal"]


def test_namespaces_do_not_see_each_other(store: ContextStore) -> None:
    mine, yours = Space("m", "mine"), Space("m", "yours")
    ours, _ = put(store, "legal", 1)
    info, created = put(store, "legal", 1, mine)
    assert created
    put(store, "other", 2, mine)
    assert store.get(mine, parse_ref("legal")) == info != ours
    for ref in ("other", "other.1", f"ctx_{2:032x}"):
        assert store.get(yours, parse_ref(ref)) is None
        assert store.get(M, parse_ref(ref)) is None
    assert store.versions(yours, "legal") == []
    page = store.list_current("mine", None, after=None, limit=9, newest_first=False)
    assert page is not None
    assert [i.name for i in page.items] == ["legal", "other"]
    assert store.models_of("yours", parse_ref("legal")) == []
    assert store.move(yours, "legal", 1) is None
    assert not store.delete_name(yours, "legal")
    assert store.delete_versions(yours, parse_ref("legal.1")) is None
    assert store.delete_name(mine, "legal")
    assert store.arrays(ours.id) is not None, "another namespace holds it"


def test_many_begin_the_same_at_once(store: ContextStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: store.begin(new_context("legal", 5)), range(16)))
    assert sorted(begun.name for _, begun in results) == ["OURS"] + ["THEIRS"] * 15
    assert {info.version for info, _ in results} == {1}


def test_everything_at_once(store: ContextStore) -> None:
    """Writers of all kinds on a few names and contents: nothing but answers, and what is left is whole."""

    def work(i: int) -> None:
        name, content = f"n{i % 3}", i % 4
        match i % 5:
            case 0 | 1:
                put(store, name, content)
            case 2:
                info, begun = store.begin(new_context(name, content))
                if begun is Begun.OURS:
                    store.complete(info, built(content))
            case 3:
                store.move(M, name, 1 + content)
            case _:
                store.delete_name(M, name) if i % 2 else store.delete_versions(M, parse_ref(f"{name}.{content + 1}"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(160)))
    for name in names_of(store, 2, newest_first=True):
        info = store.get(M, parse_ref(name))
        assert info is not None
        if info.status is ContextStatus.COMPLETED:
            arrays = store.arrays(info.id)
            assert arrays is not None
            assert info.id == f"ctx_{int(arrays['dataset_embeddings'][0, 0]):032x}"


def test_kept_texts_belong_to_a_version_and_not_to_its_content(store: ContextStore) -> None:
    """Texts that are equal as far as the model reads them make one content."""
    for name, kept in (("mine", ["Hello WORLD"]), ("yours", ["hello world"]), ("nobodys", None)):
        info, _ = store.begin(new_context(name, 1))
        completed = store.complete(info, built(1, kept))
        assert completed is not None
        assert store.texts(completed) == kept
    mine = store.get(M, parse_ref("mine"))
    assert mine is not None
    assert store.texts(mine) == ["Hello WORLD"]
    assert store.delete_name(M, "mine")
    assert store.texts(mine) is None
