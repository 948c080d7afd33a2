"""Any history of creating, moving, deleting and using contexts, beside a model of it: whoever asks next sees what was
done, in lookups and in the vectors' `x-context-id` alike, and nothing is left in a cache."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ANIMALS
from tests.live import V1

NOT_FOUND, IN_USE = (404, "context_not_found"), (400, "context_in_use")
HISTORIES = count()
"""No two use the same names, as no version number is used twice."""


@dataclass
class Name:
    name: str
    contents: dict[int, int] = field(default_factory=dict)
    """By version."""
    current: int = 0
    last: int = 0

    def versions_of(self, content: int) -> list[int]:
        return [version for version, held in self.contents.items() if held == content]


class History:
    """Steps are named as in STEPS; each takes a name, one of two contents and a version."""

    def __init__(self, http: httpx.Client, arrays: list[bytes], ids: list[str]) -> None:
        self.http, self.arrays, self.ids = http, arrays, ids
        number = next(HISTORIES)
        self.names = [Name(f"one-{number}"), Name(f"two-{number}")]

    def create(self, name: Name, content: int, _: int) -> None:
        documents = {"name": name.name, "model": V1, "documents": [ANIMALS[content]]}
        self._made(name, content, self.http.post("/v1/contexts", json=documents))

    def import_(self, name: Name, content: int, _: int) -> None:
        answer = self.http.put(self._path(name.name, "/embeddings"), content=self.arrays[content])
        self._made(name, len(self.arrays) + content, answer)  # an import is a content of its own

    def roll_back(self, name: Name, _: int, version: int) -> None:
        answer = self.http.post(f"/v1/contexts/{name.name}/rollback", json={"version": version, "model": V1})
        if version in name.contents:
            name.current = version
            assert (answer.status_code, answer.json()["version"]) == (200, version)
        else:
            assert refusal(answer) == NOT_FOUND

    def delete_name(self, name: Name, _: int, __: int) -> None:
        answer = self.http.delete(self._path(name.name))
        assert refusal(answer) == (None if name.contents else NOT_FOUND)
        name.contents.clear()
        name.current = 0

    def delete_version(self, name: Name, _: int, version: int) -> None:
        held = [(name, version)] if version in name.contents else []
        self._delete(f"{name.name}.{version}", held)

    def delete_id(self, _: Name, content: int, __: int) -> None:
        self._delete(self.ids[content], self._holders(content))

    def use_name(self, name: Name, _: int, __: int) -> None:
        self._use(name.name, name.contents.get(name.current))

    def use_version(self, name: Name, _: int, version: int) -> None:
        self._use(f"{name.name}.{version}", name.contents.get(version))

    def use_id(self, _: Name, content: int, __: int) -> None:
        self._use(self.ids[content], content if self._holders(content) else None)

    def list_all(self, _: Name, __: int, ___: int) -> None:
        names = [context["name"] for page in self._pages() for context in page["data"]]
        assert sorted(set(names) & {name.name for name in self.names}) == sorted(
            name.name for name in self.names if name.current
        )
        for name in self.names:
            answer = self.http.get(self._path(name.name, "/versions"))
            found = {context["version"]: context["id"] for context in answer.json().get("data", [])}
            assert found == {version: self.ids[content] for version, content in name.contents.items()}

    def _pages(self) -> Iterator[Any]:
        after: dict[str, Any] = {}
        while True:
            page = self.http.get("/v1/contexts", params={"model": V1, "limit": 1, **after}).json()
            yield page
            if not page["has_more"]:
                return
            after = {"after": page["last_id"]}

    def _made(self, name: Name, content: int, answer: httpx.Response) -> None:
        there = name.versions_of(content)
        if not there:
            name.last += 1
            name.contents[name.last] = content
        name.current = (there or [name.last])[0]
        body = answer.json()
        assert (answer.status_code, body["version"]) == (200 if there else 201, name.current)
        assert body["id"] == self.ids[content]

    def _delete(self, ref: str, held: list[tuple[Name, int]]) -> None:
        answer = self.http.delete(self._path(ref))
        if not held:
            assert refusal(answer) == NOT_FOUND
        elif any(name.current == version for name, version in held):
            assert refusal(answer) == IN_USE
        else:
            assert refusal(answer) is None
            for name, version in held:
                del name.contents[version]

    def _use(self, ref: str, content: int | None) -> None:
        """In the model's name and in the body, and looked up."""
        for body in ({"model": f"{V1}@{ref}"}, {"model": V1, "context": ref}):
            answer = self.http.post("/v1/embeddings", json={**body, "input": "x"})
            if content is None:
                assert refusal(answer) == (400 if "context" in body else 404, "context_not_found")
            else:
                assert (answer.status_code, answer.headers.get("x-context-id")) == (200, self.ids[content])
        found = self.http.get(self._path(ref))
        assert (None if content is None else self.ids[content]) == found.json().get("id")

    def _holders(self, content: int) -> list[tuple[Name, int]]:
        return [(name, version) for name in self.names for version in name.versions_of(content)]

    def _path(self, ref: str, more: str = "") -> str:
        return f"/v1/contexts/{ref}{more}?model={V1}"


STEPS = [
    History.create, History.create, History.import_, History.roll_back, History.delete_name, History.delete_version,
    History.delete_id, History.use_name, History.use_name, History.use_version, History.use_id, History.list_all,
]  # fmt: skip


def refusal(answer: httpx.Response) -> tuple[int, str] | None:
    return None if answer.is_success else (answer.status_code, answer.json()["error"]["code"])


@pytest.fixture(scope="module")
def known(server: str) -> tuple[list[bytes], list[str]]:
    """Arrays of two contexts made from documents; the ids of both, and of what they are as imports."""
    arrays, ids, imported = [], [], []
    with httpx.Client(base_url=server, params={"model": V1}, timeout=60) as http:
        for text in ANIMALS[:2]:
            made = http.post("/v1/contexts", json={"name": "known", "model": V1, "documents": [text]})
            arrays.append(http.get("/v1/contexts/known/embeddings").content)
            ids.append(made.json()["id"])
            imported.append(http.put("/v1/contexts/known/embeddings", content=arrays[-1]).json()["id"])
        assert http.delete("/v1/contexts/known").is_success
    return arrays, ids + imported


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0, 1), st.integers(0, 1), st.integers(1, 4)),
        min_size=10,
        max_size=30,
    )
)
def test_who_asks_next_sees_what_was_done(
    http: httpx.Client, known: tuple[list[bytes], list[str]], steps: list[tuple[Any, int, int, int]]
) -> None:
    history = History(http, *known)
    try:
        for step, name, content, version in steps:
            step(history, history.names[name], content, version)
    finally:
        for named in history.names:
            http.delete(f"/v1/contexts/{named.name}", params={"model": V1})
