"""Clients of the crash harness: each works on names of its own, and knows what the store has to hold of them."""

import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save

from app.domain import DATASET_EMBEDDINGS, FloatArray

SHAPE = (16, 64)
"""Of a context of the tiny model."""
NAMES = 3
"""Names that a client has to itself."""
ALWAYS = {"create": 4, "import": 4, "share": 1}
WITH_OTHERS = {"move": 3, "delete version": 2}
"""Where a name has versions besides the one it points at. The numbers are weights."""


class Tally:
    """What happened, and what should not have. Thread-safe."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.answers = 0
        self._lock = threading.Lock()

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def answered(self, what: str) -> None:
        self.count(what)
        with self._lock:
            self.answers += 1


@dataclass(slots=True)
class Name:
    """What its client was answered: ids by version, where it points, and the highest version there ever was."""

    text: str
    versions: dict[int, str] = field(default_factory=dict)
    current: int | None = None
    highest: int = 0
    pending: tuple[str, Any] | None = None
    """What was asked for and not answered, and what with."""


class Client:
    """One thread."""

    def __init__(self, number: int, seed: int, tally: Tally) -> None:
        self.names = [Name(f"n{number}-{i}") for i in range(NAMES)]
        self.rows: dict[str, FloatArray] = {}
        """By id: of an import, what was sent; of a creation, what was read first."""
        self._choose = random.Random(f"{seed} {number}")
        self._tally = tally
        self._made = 0

    def work(self, url: str) -> None:
        """Until the server is gone."""
        try:
            with httpx.Client(base_url=url, timeout=60) as http:
                while True:
                    self._step(http, self._choose.choice(self.names))
        except httpx.HTTPError:
            return

    def _step(self, http: httpx.Client, name: Name) -> None:
        others = [version for version in name.versions if version != name.current]
        weights = ALWAYS | (WITH_OTHERS if others else {}) | ({"delete name": 1} if name.versions else {})
        action = self._choose.choices(list(weights), list(weights.values()))[0]
        match action:
            case "create":
                self._create(http, name)
            case "import":
                self._import(http, name)
            case "share":
                self._share(http)
            case "delete name":
                name.pending = (action, None)
                self._answer(http.delete(f"/v1/contexts/{name.text}"))
                name.versions, name.current = {}, None
            case "move":
                version = self._choose.choice(others)
                name.pending = (action, version)
                self._answer(http.post(f"/v1/contexts/{name.text}/rollback", json={"version": version}))
                name.current = version
            case "delete version":
                version = self._choose.choice(others)
                name.pending = (action, version)
                self._answer(http.delete(f"/v1/contexts/{name.text}.{version}"))
                del name.versions[version]
        name.pending = None
        self._tally.answered(action)

    def _create(self, http: httpx.Client, name: Name) -> None:
        self._made += 1
        documents = [f"Document {i} of {name.text}, {self._made}." for i in range(5)]
        name.pending = ("create", None)
        self._added(name, self._answer(http.post("/v1/contexts", json={"name": name.text, "documents": documents})))

    def _import(self, http: httpx.Client, name: Name) -> None:
        rows = np.random.default_rng(self._choose.getrandbits(32)).standard_normal(SHAPE, np.float32)
        name.pending = ("import", rows)
        content = save({DATASET_EMBEDDINGS: rows})
        body = self._answer(http.put(f"/v1/contexts/{name.text}/embeddings", content=content))
        self.rows[body["id"]] = rows
        self._added(name, body)

    def _share(self, http: httpx.Client) -> None:
        """A few contents under one name, for all clients: others may have deleted it."""
        documents = [f"Shared {self._choose.randrange(4)}."]
        response = http.post("/v1/contexts", json={"name": "shared", "documents": documents})
        if response.is_success and self._choose.random() < 0.3:
            response = http.delete(f"/v1/contexts/shared.{response.json()['version']}")
        if response.is_server_error:
            self._answer(response)

    def _answer(self, response: httpx.Response) -> dict[str, Any]:
        if response.is_error:
            self._tally.wrong.append(f"{response.request.method} {response.request.url.path}: {response.text}")
        body: dict[str, Any] = response.raise_for_status().json()
        return body

    def _added(self, name: Name, body: dict[str, Any]) -> None:
        version: int = body["version"]
        if version <= name.highest:
            self._tally.wrong.append(f"{name.text}.{version} was there before")
        name.highest = name.current = version
        name.versions[version] = body["id"]
