"""Answers in pieces: the same bytes, and no more of them at once than one caller may have."""

import asyncio
import json

import pytest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app.api.delivery import PIECE, Delivery
from app.settings import LimitSettings

LIMITS = LimitSettings(max_answer_bytes_in_flight=8 * PIECE)


def scope(key: str = "a") -> Scope:
    return {"type": "http", "method": "GET", "headers": [], "state": {"key_name": key}}


async def nothing() -> Message:
    raise AssertionError


def answering(content: bytes) -> Delivery:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(content, headers={"x-some": "thing"})(scope, receive, send)

    return Delivery(app, LIMITS)


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 4 * PIECE - 1])
async def test_the_same_bytes_come_out(size: int) -> None:
    content, sent = bytes(i % 251 for i in range(size)), list[Message]()

    async def send(message: Message) -> None:
        sent.append(message)

    await answering(content)(scope(), nothing, send)
    start, *pieces = sent
    assert start["status"] == 200
    assert {(b"x-some", b"thing"), (b"content-length", b"%d" % size)} <= set(start["headers"])
    assert b"".join(piece["body"] for piece in pieces) == content
    assert all(len(piece["body"]) == PIECE and piece["more_body"] for piece in pieces[:-1])
    assert not pieces[-1].get("more_body")


async def test_pieces_that_come_as_such_hold_nothing() -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for more in (True, True, False):
            await send({"type": "http.response.body", "body": b"x" * 20 * PIECE, "more_body": more})

    sent = list[Message]()

    async def send(message: Message) -> None:
        sent.append(message)

    await Delivery(app, LIMITS)(scope(), nothing, send)
    assert sent[0]["status"] == 200
    assert sum(len(message["body"]) for message in sent[1:]) == 60 * PIECE
    assert [message["more_body"] for message in sent[1:]] == [True] * 59 + [False]


class Reader:
    """A client that reads once it is told to."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.reads = asyncio.Event()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self.body += message["body"]
        if message.get("more_body"):
            await self.reads.wait()


async def test_a_caller_that_does_not_read_is_refused_more() -> None:
    delivery = answering(b"x" * 2 * PIECE)
    readers = {name: Reader() for name in ("a1", "a2", "a3", "b1")}
    tasks = {}
    for name, reader in readers.items():
        tasks[name] = asyncio.create_task(delivery(scope(name[0]), nothing, reader.send))
        await asyncio.sleep(0)
    assert {name: reader.status for name, reader in readers.items()} == {"a1": 200, "a2": 200, "a3": 429, "b1": 200}
    assert json.loads(readers["a3"].body)["error"]["code"] == "rate_limit_exceeded"
    readers["a1"].reads.set()
    await tasks["a1"]
    tasks["a2"].cancel()
    await asyncio.gather(tasks["a2"], return_exceptions=True)
    again = Reader()
    again.reads.set()
    await delivery(scope("a"), nothing, again.send)
    assert (again.status, len(again.body)) == (200, 2 * PIECE)
    tasks["b1"].cancel()


async def test_what_can_never_be_given_is_a_413() -> None:
    reader = Reader()
    await answering(b"x" * 5 * PIECE)(scope(), nothing, reader.send)
    assert (reader.status, json.loads(reader.body)["error"]["code"]) == (413, "request_too_large")
