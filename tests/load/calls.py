"""What the clients of a long run do besides embedding: each call says what was wrong, or nothing."""

import asyncio
import random
from collections.abc import Sequence
from itertools import count
from typing import Any

import httpx
import numpy as np
import orjson

from tests.load.known import Known, documents, vectors_of
from tests.load.server import LoadServer
from tests.load.traffic import ask

EMBED_TEXTS = (1, 1, 2, 3, 4, 8, 16, 32)
BATCH_LINES, LINE_TEXTS = 6, 4
CONTEXT_DOCUMENTS = 12
STAY_SECONDS, POLL_SECONDS = 0.5, 0.5
PAGES = (
    "/v1/models",
    "/v1/contexts?limit=20",
    "/v1/contexts/load-a",
    "/info",
    "/health",
    "/ready",
    "/v1/batches?limit=5",
)
MISTAKES: Sequence[tuple[Any, int, str | None]] = (
    ({"input": []}, 400, None),
    ({"input": "x", "model": "nobody"}, 404, "model_not_found"),
    ({"input": "x", "colour": "red"}, 400, "unknown_parameter"),
    ({"input": "x", "context": "nowhere"}, 400, "context_not_found"),
    ({"input": "x", "dimensions": 7}, 400, None),
    ({"input": "word " * 3000, "truncate": "none"}, 400, "context_length_exceeded"),
    ("no JSON", 400, None),
)
"""Body, with the model where it names none; status and code of the answer."""


class Calls:
    """Of one client with connections of its own."""

    def __init__(self, server: LoadServer, client: httpx.AsyncClient, known: Known, choose: random.Random) -> None:
        self._server, self._client, self._known, self._choose = server, client, known, choose
        self._names = count()
        self.seconds: list[float] = []
        """Of each answer with vectors."""

    async def embed(self) -> str:
        texts = self._choose.choice(EMBED_TEXTS)
        answer = await ask(self._client, self._known.choose(self._choose, texts), texts)
        if answer.is_right:
            self.seconds.append(answer.seconds)
        return answer.problem or ("" if answer.is_right else f"{answer.status}")

    async def leave(self) -> str:
        """Does not stay for the answer; where it comes in time, it is right."""
        try:
            async with asyncio.timeout(self._choose.uniform(0, STAY_SECONDS)):
                return await self.embed()
        except TimeoutError:
            return ""

    async def look(self) -> str:
        """On a connection of its own."""
        async with self._server.client("b") as client:
            response = await client.get(self._choose.choice(PAGES))
        return _unless(response, httpx.codes.OK)

    async def tokenize(self) -> str:
        texts = [self._known.text() for _ in range(4)]
        response = await self._client.post("/tokenize", json={"model": self._server.model, "input": texts})
        return _unless(response, httpx.codes.OK)

    async def mistake(self) -> str:
        body, status, code = self._choose.choice(MISTAKES)
        content = body if isinstance(body, str) else orjson.dumps({"model": self._server.model} | body)
        headers = {"Content-Type": "application/json"}
        response = await self._client.post("/v1/embeddings", content=content, headers=headers)
        return _unless(response, status) or ("" if response.json()["error"]["code"] == code else "another code")

    async def stranger(self) -> str:
        response = await self._client.get("/v1/models", headers={"Authorization": "Bearer nobody"})
        return _unless(response, httpx.codes.UNAUTHORIZED)

    async def context(self) -> str:
        """Made, used, exported and deleted."""
        name = f"soak-{next(self._names)}"
        texts = [f"{name} {text}" for text in documents(CONTEXT_DOCUMENTS, skip=self._choose.randrange(40))]
        made = await self._client.post("/v1/contexts", json={"name": name, "documents": texts})
        if problem := _unless(made, httpx.codes.CREATED):
            return problem
        body = {"model": f"{self._server.model}@{name}", "input": self._known.text(), "encoding_format": "base64"}
        used = await self._client.post("/v1/embeddings", json=body | {"truncate": "end"})
        exported = await self._client.get(f"/v1/contexts/{name}/embeddings")
        deleted = await self._client.delete(f"/v1/contexts/{name}")
        if problem := next(filter(None, (_unless(r, httpx.codes.OK) for r in (used, exported, deleted))), ""):
            return problem
        of_it = {response.headers["x-context-id"] for response in (used, exported)}
        length = float(np.linalg.norm(vectors_of(used.json())[0]))
        return "" if of_it == {made.json()["id"]} and abs(length - 1) < 1e-3 else "not its context"

    async def batch(self) -> str:
        """A file of lines, run and read."""
        deck = self._known.choose(self._choose, BATCH_LINES * LINE_TEXTS)
        with deck.hand(BATCH_LINES * LINE_TEXTS) as taken:
            parts = [taken[i : i + LINE_TEXTS] for i in range(0, len(taken), LINE_TEXTS)]
            lines = [
                {"custom_id": str(i), "method": "POST", "url": "/v1/embeddings", "body": deck.body(part)}
                for i, part in enumerate(parts)
            ]
            file = {"file": ("lines.jsonl", b"\n".join(map(orjson.dumps, lines)))}
            sent = (await self._client.post("/v1/files", data={"purpose": "batch"}, files=file)).json()["id"]
            options = {"input_file_id": sent, "endpoint": "/v1/embeddings", "completion_window": "24h"}
            batch = (await self._client.post("/v1/batches", json=options)).json()
            while batch["status"] in ("validating", "in_progress", "finalizing"):
                await asyncio.sleep(POLL_SECONDS)
                batch = (await self._client.get(f"/v1/batches/{batch['id']}")).json()
            if batch["status"] != "completed" or batch["error_file_id"] is not None:
                return f"batch {batch['status']}"
            output = await self._client.get(f"/v1/files/{batch['output_file_id']}/content")
            answers = [orjson.loads(line) for line in output.content.splitlines()]
            wrong = [deck.problem(parts[int(a["custom_id"])], a["response"]["body"]) for a in answers]
            for made in (sent, batch["output_file_id"]):
                await self._client.delete(f"/v1/files/{made}")
        return "lines are missing" if len(answers) != len(parts) else next(filter(None, wrong), "")


def _unless(response: httpx.Response, status: int) -> str:
    return "" if response.status_code == status else f"{response.status_code}"
