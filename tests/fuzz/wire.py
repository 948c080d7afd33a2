"""Strategies: bytes on a connection, from nearly right requests to none."""

import json
from collections.abc import Callable

from hypothesis import strategies as st

from tests.fuzz.uploads import structured
from tests.live import V1

LAST = b"GET /health HTTP/1.1\r\nHost: fuzz\r\nConnection: close\r\n\r\n"
"""Ends a connection, where what stands before it ended as a request."""
EMBED = json.dumps({"model": V1, "input": "x"}).encode()
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: fuzz\r\nContent-Type: application/json\r\n"
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
VALID = [
    b"GET /health HTTP/1.1\r\nHost: fuzz\r\n\r\n",
    b"GET /v1/models HTTP/1.0\r\n\r\n",
    b"DELETE /v1/contexts/none HTTP/1.1\r\nHost: fuzz\r\n\r\n",
    HEAD + b"Content-Length: %d\r\n\r\n" % len(EMBED) + EMBED,
    HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(EMBED) + EMBED,
    HEAD + OFFER + b"Content-Length: %d\r\n\r\n" % len(EMBED) + EMBED,
    HEAD + OFFER + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(EMBED), EMBED),
    CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(EMBED), EMBED),
    CHUNKED + b"".join(b"1;e=1\r\n%c\r\n" % byte for byte in EMBED) + b"0\r\nTrailer: x\r\n\r\n",
    b'POST /v1/contexts?name=fuzz HTTP/1.1\r\nContent-Type: application/x-ndjson\r\nContent-Length: 4\r\n\r\n"x"\n',
]
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"//", b"#", b"*", b"\xff\xfe", b"\x16\x03\x01", b"HTTP/1.1", b"HTTP/2.0",
    b"HTTP/0.9", b"GET ", b"CONNECT ", b"PRI * HTTP/2.0\r\n\r\n", b"http://x/", b"?" + b"q" * 3000,
    b"Content-Length: 0\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 500000000\r\n",
    b"Content-Length: 99999999999999999999\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n",
    b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Upgrade: h2c\r\n", b"Expect: 100-continue\r\n",
    b"Host: [\r\n", b"X: " + b"y" * 70_000 + b"\r\n", b"a:b\r\n" * 300, b"ffffffffffffffff\r\n", b"0\r\n\r\n",
    b"-1\r\n", b"5\r\nhello\r\n",
]  # fmt: skip

Edit = Callable[[bytes], bytes]
places = st.integers(0, 10_000)


def _insert(where: int, token: bytes) -> Edit:
    return lambda data: data[: where % (len(data) + 1)] + token + data[where % (len(data) + 1) :]


def _replace(where: int, token: bytes) -> Edit:
    return lambda data: data[: where % (len(data) + 1)] + token + data[where % (len(data) + 1) + len(token) :]


def _delete(where: int, size: int) -> Edit:
    return lambda data: data[: where % (len(data) + 1)] + data[where % (len(data) + 1) + size :]


def _cut(where: int) -> Edit:
    return lambda data: data[: where % (len(data) + 1)]


def _double(where: int, size: int) -> Edit:
    def edit(data: bytes) -> bytes:
        start = where % (len(data) + 1)
        return data[: start + size] + data[start : start + size] + data[start + size :]

    return edit


tokens = st.sampled_from(TOKENS) | st.binary(min_size=1, max_size=4)
edits = st.one_of(
    st.builds(_insert, places, tokens),
    st.builds(_replace, places, tokens),
    st.builds(_delete, places, st.integers(1, 40)),
    st.builds(_double, places, st.integers(1, 80)),
    st.builds(_cut, places),
)


def _edited(data: bytes, changes: list[Edit]) -> bytes:
    for change in changes:
        data = change(data)
    return data


requests = st.sampled_from(VALID) | structured.map(lambda request: request.wire())
mutated = st.builds(_edited, requests, st.lists(edits, min_size=1, max_size=3))
connections: st.SearchStrategy[bytes] = st.one_of(
    mutated,
    mutated,
    st.builds(b"".join, st.lists(requests | mutated, min_size=2, max_size=5)),
    st.binary(max_size=200),
    st.builds(lambda one, many: one * many, st.sampled_from(VALID), st.integers(2, 40)),
).map(lambda data: data + LAST)
