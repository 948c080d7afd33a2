"""HTTP by hand: bytes over a socket, and what came back, read strictly."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

PATIENCE = 30.0
"""Seconds without a byte after which a connection hangs."""


@dataclass
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False

    @property
    def code(self) -> Any:
        return json.loads(self.body)["error"]["code"]


class Answers:
    """Takes what httptools finds; interim answers (100) are left out. Raises HttpParserError for what is not HTTP."""

    def __init__(self) -> None:
        self.found: list[Answer] = []
        self._headers: dict[str, str] = {}
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, received: bytes) -> None:
        self._parser.feed_data(received)

    def on_message_begin(self) -> None:
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        if self._parser.get_status_code() >= 200:
            self.found.append(Answer(self._parser.get_status_code(), self._headers))

    def on_body(self, body: bytes) -> None:
        self.found[-1].body += body

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:
            self.found[-1].complete = True


@contextmanager
def connected(url: str, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    parts = urlsplit(url)
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(PATIENCE)
        connection.connect((parts.hostname, parts.port))
        yield connection


def rest(connection: socket.socket) -> list[Answer]:
    """All answers until the server closes. Raises TimeoutError where it does not."""
    answers = Answers()
    try:
        while data := connection.recv(2**16):
            answers.feed(data)
    except ConnectionResetError:
        pass
    return answers.found


def exchange(url: str, sent: bytes) -> list[Answer]:
    """What is answered to these bytes on one connection, until the server closes."""
    with connected(url) as connection:
        with suppress(OSError):  # it is closed already, which the answer explains
            connection.sendall(sent)
        return rest(connection)
