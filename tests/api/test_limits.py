"""Clients that send too much, too slowly or nonsense: each is answered or cut off, and everybody else is served on."""

import gzip
import hashlib
import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api import protocol
from app.json_text import MAX_VALUES
from tests.api.test_errors import check
from tests.live import V1, live_server
from tests.postgres import new_database
from tests.raw import Answer, Answers, connected, exchange, rest
from tests.waiting import until

JSON = {"Content-Type": "application/json"}
HOST = b"Host: here\r\n"
GET = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
LAST = b"GET /health HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n"
LIMITS: dict[str, Any] = {
    "header_seconds": 1,
    "stall_seconds": 1,
    "max_documents": 10,
    "max_body_bytes": 100_000,
    "max_line_bytes": 100_000,
    "max_body_bytes_in_flight": 250_000,
}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Impatient, and with little room."""
    with pytest.MonkeyPatch.context() as patch, live_server(tmp_path_factory.mktemp("strict"), limits=LIMITS) as url:
        patch.setattr(protocol, "LINGER_SECONDS", 0.2)
        yield url


@pytest.fixture(scope="module")
def others(strict: str) -> Iterator[httpx.Client]:
    """Everybody else."""
    with httpx.Client(base_url=strict, timeout=30) as client:
        yield client


@pytest.fixture(autouse=True)
def _serves_on(others: httpx.Client) -> Iterator[None]:
    yield
    assert others.get("/health").status_code == 200
    assert others.post("/v1/embeddings", json={"model": V1, "input": "x"}).is_success


def refused(answers: list[Answer], status: int, code: str | None) -> None:
    """One answer, in OpenAI's shape, with the headers of every answer, and the connection is closed."""
    (answer,) = answers
    assert (answer.status, answer.complete) == (status, True)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["connection"] == "close"
    assert {"x-request-id", "openai-processing-ms", "openai-version", "date"} <= set(answer.headers)
    (error,) = json.loads(answer.body).values()
    assert list(error) == ["message", "type", "param", "code"]
    assert error["code"] == code


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/embeddings", length: int | None = None) -> bytes:
    size = b"Content-Length: %d" % (len(body) if length is None else length)
    lines = [b"POST %s HTTP/1.1" % path, b"Host: here", b"Content-Type: application/json", size, *headers]
    return b"\r\n".join([*lines, b"", body])


def cut(others: httpx.Client, reason: str) -> float:
    """How many connections were, for this reason."""
    name = f'cde_connections_cut_total{{reason="{reason}"}} '
    lines = others.get("/metrics").text.splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


# --- what is no HTTP, or too much of it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"\x00" * 100,
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\na\x00b: c\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: minus one\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nno length\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello, and more\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999999\r\n\r\n",
    ],
)
def test_what_is_no_http_is_a_400(strict: str, sent: bytes) -> None:
    refused(exchange(strict, sent), 400, None)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nX-Long: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX-Never-Ends: " + b"a" * 300_000,
        b"GET /health?" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"a:b\r\n" * 300 + b"\r\n",
        b"GET /health HTTP/1.1\r\n" + (b"X-Some: " + b"a" * 3000 + b"\r\n") * 30 + b"\r\n",
    ],
)
def test_headers_have_a_limit(strict: str, head: bytes) -> None:
    refused(exchange(strict, head), 431, "headers_too_large")


def test_headers_up_to_the_limit(strict: str) -> None:
    (answer,) = exchange(strict, LAST[:-2] + b"X-Long: " + b"a" * 60_000 + b"\r\n\r\n")
    assert answer.status == 200
    (answer,) = exchange(strict, LAST[:-2] + b"a:b\r\n" * 250 + b"\r\n")
    assert answer.status == 200


def test_what_comes_behind_a_chunked_body_is_bounded_and_no_header(strict: str) -> None:
    body = json.dumps({"model": V1, "input": "x"}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n" + HOST
    start = head + b"\r\n" + b"%x;ext=1\r\n%s\r\n0\r\n" % (len(body), body)
    (answer,) = exchange(strict, start + b"X-Context: none-such\r\n" * 300 + b"\r\n")
    assert answer.status == 200
    (answer,) = exchange(strict, head + b"\r\n5;" + b"e" * 300_000)
    assert (answer.status, answer.code) == (431, "headers_too_large")


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c", b"TLS/1.2"])
def test_nothing_is_upgraded_to(strict: str, upgrade: bytes) -> None:
    sent = b"GET /v1/none HTTP/1.1\r\nConnection: close, Upgrade\r\nUpgrade: " + upgrade + b"\r\n" + HOST + b"\r\n"
    (answer,) = exchange(strict, sent)
    assert (answer.status, answer.code) == (404, "unknown_url")


# As Java's HttpClient sends it with everything, unless it is told not to.
OFFER = (
    b"Connection: Upgrade, HTTP2-Settings",
    b"Upgrade: h2c",
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
)


@pytest.mark.parametrize("pieces", [1, 2, 40])
def test_a_request_that_offers_http2_keeps_its_body(strict: str, pieces: int) -> None:
    body = json.dumps({"model": V1, "input": ["x", "y"]}).encode()
    plain = post(body, *OFFER)
    chunked = post(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), *OFFER, b"Transfer-Encoding: chunked")
    sent = plain + chunked.replace(b"Content-Length: ", b"X-Length: ") + plain + LAST
    head = sent.index(b"\r\n\r\n") + 4
    cuts = [0, head] if pieces == 2 else [len(sent) * i // pieces for i in range(pieces)]
    with connected(strict) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, end in zip(cuts, [*cuts[1:], len(sent)], strict=True):
            connection.sendall(sent[start:end])
            time.sleep(0.01)
        answers = rest(connection)
    assert [answer.status for answer in answers] == [200] * 4
    assert [len(json.loads(answer.body)["data"]) for answer in answers[:3]] == [2] * 3


def test_an_offer_changes_no_limit(strict: str) -> None:
    refused(exchange(strict, post(b"{}", *OFFER, b"X-Long: " + b"a" * 70_000)), 431, "headers_too_large")
    answers = exchange(strict, post(b"{}", *OFFER) * 500)
    assert [answer.status for answer in answers] == [400] * (protocol.MAX_PIPELINED + 1)
    refused(exchange(strict, b"CONNECT here:80 HTTP/1.1\r\n" + HOST + b"\r\n"), 400, None)


@pytest.mark.parametrize("host", [b"[", b"a:b:c", b"", b"\xff", b"http://x/"])
def test_any_host_is_as_good(strict: str, host: bytes) -> None:
    for path in (b"/none", b"/v1/contexts/none", b"/health"):
        (answer,) = exchange(strict, b"GET %s HTTP/1.1\r\nConnection: close\r\nHost: %s\r\n\r\n" % (path, host))
        assert answer.status == (200 if path == b"/health" else 404)


def test_head_has_no_body(strict: str) -> None:
    with connected(strict) as connection:
        connection.sendall(b"HEAD /health HTTP/1.1\r\n" + HOST + b"\r\n")
        assert connection.recv(2**16).endswith(b"\r\n\r\n")
        connection.sendall(LAST)
        assert [answer.status for answer in rest(connection)] == [200]


# --- several requests on a connection -------------------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_order(strict: str) -> None:
    missing = b"GET /none HTTP/1.1\r\n" + HOST + b"\r\n"
    answers = exchange(strict, GET + missing + post(b"{}") + LAST)
    assert [answer.status for answer in answers] == [200, 404, 400, 200]


def test_far_too_many_pipelined_requests_end_the_connection(strict: str) -> None:
    answers = exchange(strict, GET * 500)
    assert [answer.status for answer in answers] == [200] * (protocol.MAX_PIPELINED + 1)
    assert answers[-1].headers["connection"] == "close"


@pytest.mark.parametrize("behind", [b"\x00garbage\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 300_000])
def test_nonsense_behind_a_request_does_not_cost_its_answer(strict: str, behind: bytes) -> None:
    sent = post(json.dumps({"model": V1, "input": "x"}).encode())
    (answer,) = exchange(strict, sent + behind)
    assert (answer.status, answer.headers["connection"]) == (200, "close")


def test_nonsense_behind_an_answer_is_a_400(strict: str) -> None:
    with connected(strict) as connection:
        connection.sendall(GET)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\x00")
        refused(rest(connection), 400, None)


def test_what_comes_behind_a_refusal_is_thrown_away(strict: str, others: httpx.Client) -> None:
    before = cut(others, "malformed")
    with connected(strict) as connection:
        connection.sendall(b"hello\r\n\r\n")
        begun = connection.recv(1, socket.MSG_PEEK)  # it is answered
        for _ in range(3):
            with suppress(OSError):
                connection.sendall(GET)
        assert begun
        refused(rest(connection), 400, None)
    assert cut(others, "malformed") == before + 1


# --- slow clients ---------------------------------------------------------------------------------------------------


def trickle(connection: socket.socket, data: bytes, seconds: float, size: int = 1) -> None:
    """`size` bytes at a time, until it is through or the server has closed."""
    with suppress(OSError):
        for i in range(0, len(data), size):
            connection.sendall(data[i : i + size])
            time.sleep(seconds)


def test_a_connection_that_says_nothing_is_closed(strict: str) -> None:
    with connected(strict) as silent, connected(strict) as blank:
        blank.sendall(b"\r\n")
        assert rest(silent) == rest(blank) == []


def test_a_connection_between_requests_is_closed(tmp_path: Path) -> None:
    with live_server(tmp_path, limits={"idle_seconds": 1, "header_seconds": 600}) as url:
        for sent in (GET, GET + GET, GET + b"\r\n"):
            assert [answer.status for answer in exchange(url, sent)] == [200] * sent.count(b"GET")


def test_headers_that_do_not_end_are_cut_off(strict: str) -> None:
    refused(exchange(strict, GET[:-2]), 408, "request_timeout")


def test_headers_byte_by_byte_are_cut_off(strict: str) -> None:
    with connected(strict) as connection:
        sender = threading.Thread(target=trickle, args=(connection, GET[:-2] + b"X" * 400, 0.05))
        sender.start()
        refused(rest(connection), 408, "request_timeout")
        sender.join()


def test_the_second_request_has_no_more_time_than_the_first(strict: str) -> None:
    with connected(strict) as connection:
        connection.sendall(GET)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\r\n" + GET[:10])
        refused(rest(connection), 408, "request_timeout")


@pytest.mark.parametrize("sent", [b"", b'{"model": "x", "inp'])
def test_a_body_that_stops_is_a_408(strict: str, sent: bytes) -> None:
    (answer,) = exchange(strict, post(sent, length=1000))
    assert (answer.status, answer.code, answer.headers["connection"]) == (408, "request_timeout", "close")


def test_a_body_byte_by_byte_is_cut_off(strict: str) -> None:
    with connected(strict) as connection:
        connection.sendall(post(b"", length=1000))
        sender = threading.Thread(target=trickle, args=(connection, b" " * 1000, 0.05))
        sender.start()
        (answer,) = rest(connection)
        assert (answer.status, answer.code) == (408, "request_timeout")
        sender.join()


def test_an_upload_goes_on_as_long_as_bytes_come(others: httpx.Client) -> None:
    """Twice as long as it may stand still."""
    began = time.monotonic()

    def lines() -> Iterator[bytes]:
        number = 0
        while time.monotonic() - began < 2 * LIMITS["stall_seconds"]:
            yield json.dumps({"text": f"Document {number}. {'word ' * 40}"}).encode() + b"\n"
            number += 1
            time.sleep(0.3)

    headers = {"Content-Type": "application/x-ndjson"}
    response = others.post("/v1/contexts?name=patient", content=lines(), headers=headers, timeout=30)
    assert response.status_code == 201, response.text


def test_blank_lines_do_not_keep_an_upload_open(strict: str) -> None:
    with connected(strict) as connection:
        head = b"POST /v1/contexts?name=blank HTTP/1.1\r\nContent-Type: application/x-ndjson\r\n" + HOST
        connection.sendall(head + b"Content-Length: 1000000\r\n\r\n")
        sender = threading.Thread(target=trickle, args=(connection, b"\n \r\n" * 12_500, 0.1, 500))
        sender.start()
        (answer,) = rest(connection)
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert sender.is_alive()
        sender.join()


def test_an_answer_that_nobody_reads_is_dropped(strict: str, others: httpx.Client) -> None:
    file = {"file": ("big.jsonl", b"x" * 12_000_000)}
    made = others.post("/v1/files", data={"purpose": "batch"}, files=file).json()
    before = cut(others, "unread")
    with connected(strict, receive_buffer=4096) as connection:
        connection.sendall(b"GET /v1/files/%s/content HTTP/1.1\r\n" % made["id"].encode() + HOST + b"\r\n")
        until(lambda: cut(others, "unread") > before)
        (answer,) = rest(connection)
        assert (answer.status, answer.complete) == (200, False)


def test_an_answer_that_is_read_slowly_goes_on(strict: str, others: httpx.Client) -> None:
    """A reader that takes thousands of times what it has to, though less than the kernel asks for more at."""
    file = {"file": ("big.jsonl", b"x" * 12_000_000)}
    made = others.post("/v1/files", data={"purpose": "batch"}, files=file).json()
    with connected(strict, receive_buffer=65536) as connection:
        head = b"GET /v1/files/%s/content HTTP/1.1\r\nConnection: close\r\n" % made["id"].encode()
        connection.sendall(head + HOST + b"\r\n")
        began, begun = time.monotonic(), b""
        while time.monotonic() - began < 4 * LIMITS["stall_seconds"]:
            begun += connection.recv(2**16)
            time.sleep(0.2)
        answers = Answers()
        answers.feed(begun)
        while data := connection.recv(2**20):
            answers.feed(data)
    assert [(answer.status, len(answer.body), answer.complete) for answer in answers.found] == [(200, 12_000_000, True)]


def test_answers_that_are_not_read_have_a_limit(tmp_path: Path) -> None:
    """A caller that does not read what it asked for is refused more, others are not, and what it has is all there."""
    body = json.dumps({"model": "minilm-context", "input": ["a"] * 2048}).encode()
    limits = {"max_answer_bytes_in_flight": 30_000_000}
    with (
        live_server(tmp_path, ("builtin/minilm-context",), limits=limits) as url,
        connected(url, receive_buffer=4096) as unread,
        connected(url) as more,
    ):
        ask = post(body, b"Connection: close")
        unread.sendall(ask)
        assert unread.recv(12) == b"HTTP/1.1 200"
        more.sendall(ask)
        (answer,) = rest(more)
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
        assert "openai-processing-ms" in answer.headers
        other = httpx.post(f"{url}/v1/embeddings", content=body, headers=JSON | {"X-Forwarded-For": "10.0.0.7"})
        assert (other.status_code, other.headers["content-length"]) == (200, str(len(other.content)))
        received = bytearray(b"HTTP/1.1 200")
        while data := unread.recv(2**20):
            received += data
        assert received.endswith(b"\r\n\r\n" + other.content)
        until(lambda: httpx.post(f"{url}/v1/embeddings", content=body, headers=JSON).is_success)


# --- answered before the end ----------------------------------------------------------------------------------------


def test_a_body_that_goes_on_behind_its_answer_is_cut_off(strict: str) -> None:
    with connected(strict) as connection:
        connection.sendall(b"POST /none HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + HOST + b"\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 404")
        with pytest.raises(OSError):
            while True:
                connection.sendall(b"a\r\n0123456789\r\n" * 1000)


def test_a_connection_outlives_an_early_answer(strict: str) -> None:
    with connected(strict) as connection:
        connection.sendall(post(b"", path=b"/none", length=20_000))
        assert connection.recv(2**16).startswith(b"HTTP/1.1 404")
        connection.sendall(b"x" * 20_000 + LAST)
        (answer,) = rest(connection)
        assert answer.status == 200


def test_a_body_that_breaks_off_behind_its_answer_gets_no_second_one(strict: str) -> None:
    with connected(strict) as connection:
        connection.sendall(b"POST /none HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + HOST + b"\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 404")
        connection.sendall(b"no chunk\r\n")
        assert rest(connection) == []


# --- many clients ---------------------------------------------------------------------------------------------------


def test_connections_have_a_limit_and_probes_pass(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SPARE_CONNECTIONS", 1)
    with live_server(data_dir, limits={"max_connections": 2}) as url:
        until(lambda: httpx.get(f"{url}/v1/models").is_success)  # the connections of the start are gone
        with connected(url) as one, connected(url) as two:
            for connection in (one, two):
                connection.sendall(GET)
                assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
            refused(exchange(url, b"GET /v1/models HTTP/1.1\r\n" + HOST + b"\r\n"), 503, "too_many_connections")
            (answer,) = exchange(url, LAST)
            assert answer.status == 200
            with connected(url) as three:
                three.sendall(GET)
                assert three.recv(2**16).startswith(b"HTTP/1.1 200")
                assert exchange(url, LAST) == []
        until(lambda: httpx.get(f"{url}/v1/models").is_success)


def on_its_way(path: bytes, kind: bytes, body: bytes, *headers: bytes) -> bytes:
    """A request that lacks the last byte of its body."""
    lines = [b"POST %s HTTP/1.1" % path, b"Connection: close", b"Host: here", b"Content-Type: " + kind, *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % (len(body) + 1), b"", body])


LARGE = json.dumps({"model": V1, "input": "x"}).encode() + b" " * 90_000
EMBEDDED = (b"/v1/embeddings", b"application/json", LARGE)


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        EMBEDDED,
        (b"/v1/contexts?name=x", b"application/x-ndjson", b'"A stream counts as what it holds. ' + LARGE[-90_000:]),
    ],
)
def test_all_bodies_together_have_a_limit(strict: str, path: bytes, kind: bytes, body: bytes) -> None:
    """One caller gets half of it: of two that are on their way at once one fits, whichever it is."""
    end = b"\n" if path == EMBEDDED[0] else b'"'
    with connected(strict) as one, connected(strict) as two:
        for connection in (one, two):
            connection.sendall(on_its_way(path, kind, body))
        (full, *_), _, _ = select.select([one, two], [], [], 20)
        (answer,) = rest(full)
        assert (answer.status, answer.code) == (429, "rate_limit_exceeded")
        assert answer.headers["retry-after"] == "1"
        (other,) = {one, two} - {full}
        other.sendall(end)
        (answer,) = rest(other)
        assert answer.status in (200, 201)


def test_an_address_that_holds_much_leaves_room_for_others(strict: str) -> None:
    elsewhere = b"X-Forwarded-For: 10.0.0.7"
    with connected(strict) as one, connected(strict) as two, connected(strict) as other:
        for connection in (one, two):
            connection.sendall(on_its_way(*EMBEDDED))
        (full, *_), _, _ = select.select([one, two], [], [], 20)
        assert [answer.status for answer in rest(full)] == [429]
        body = LARGE[:60_000]
        other.sendall(on_its_way(*EMBEDDED[:2], body, elsewhere) + b" ")
        assert [answer.status for answer in rest(other)] == [200]


def test_a_key_that_holds_much_leaves_room_for_others(tmp_path: Path) -> None:
    """Its uploads stand still, and there are as many as it likes."""
    limits = LIMITS | {"stall_seconds": 20}
    keys = tmp_path / "keys.toml"
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in "ab"}
    keys.write_text("".join(f'[[keys]]\nname = "{name}"\nsha256 = "{sha}"\n' for name, sha in digests.items()))
    upload = on_its_way(
        b"/v1/contexts?name=x", b"application/x-ndjson", b'"' + b"a" * 50_000, b"Authorization: Bearer a"
    )
    with live_server(tmp_path / "data", limits=limits, server={"keys_file": keys}) as url, ExitStack() as stack:
        held = [stack.enter_context(connected(url)) for _ in range(8)]
        for connection in held:
            connection.sendall(upload)
        waiting = set(held)
        while len(waiting) > 2:
            (full, *_), _, _ = select.select(list(waiting), [], [], 20)
            assert [answer.status for answer in rest(full)] == [429]
            waiting -= {full}
        body = {"model": V1, "input": "x" * 60_000, "truncate": "end"}
        answer = httpx.post(f"{url}/v1/embeddings", json=body, headers={"Authorization": "Bearer b"})
        assert answer.status_code == 200
        for connection in waiting:
            connection.sendall(b'"')
            assert [answer.status for answer in rest(connection)] in ([200], [201])


def test_streams_hold_what_they_hold(strict: str) -> None:
    """And not what they might: many small ones go on at once."""
    with ExitStack() as stack:
        streams = [stack.enter_context(connected(strict)) for _ in range(8)]
        for i, connection in enumerate(streams):
            connection.sendall(on_its_way(b"/v1/contexts?name=x%d" % i, b"application/x-ndjson", b'"Document %d."' % i))
        for connection in streams:
            connection.sendall(b"\n")
            assert [answer.status for answer in rest(connection)] == [201]


# --- bodies ---------------------------------------------------------------------------------------------------------


def test_a_compressed_body_is_a_415(others: httpx.Client) -> None:
    body = gzip.compress(json.dumps({"model": V1, "input": "x"}).encode())
    for path in ("embeddings", "contexts?name=x", "files"):
        headers = JSON | {"Content-Encoding": "gzip"}
        response = others.post(f"/v1/{path}", content=body, headers=headers)
        check(response, 415, "unsupported_media_type", None, "uncompressed")


def test_documents_have_a_limit_in_json_and_none_in_a_stream(others: httpx.Client) -> None:
    documents = [f"Document {i}." for i in range(11)]
    response = others.post("/v1/contexts", json={"name": "many", "documents": documents})
    check(response, 400, None, "documents", "at most 10", "NDJSON")
    body = {"model": V1, "input": "x", "context": {"documents": documents}}
    response = others.post("/v1/embeddings", json=body)
    check(response, 400, None, "context.documents", "at most 10", "NDJSON")
    lines = b"".join(json.dumps(document).encode() + b"\n" for document in documents)
    headers = {"Content-Type": "application/x-ndjson"}
    assert others.post("/v1/contexts?name=many", content=lines, headers=headers).status_code == 201


def test_values_have_a_limit_and_commas_in_texts_do_not_count(http: httpx.Client) -> None:
    for values in ("[],", "1,", '"a",', '{"":0},'):
        body = '{"model": "x", "input": [' + values * (MAX_VALUES + 1) + "0]}"
        response = http.post("/v1/embeddings", content=body, headers=JSON)
        check(response, 413, "request_too_large", None, "values")
    text = '\\\\\\",[{' * MAX_VALUES
    response = http.post("/v1/embeddings", content=f'{{"model": "{V1}", "input": "{text}"}}', headers=JSON)
    check(response, 400, "context_length_exceeded", "input", "characters")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "x", "documents": [1] * 500_000}, "documents[0]"),
        ({"name": "x", "documents": ["a"], "metadata": {str(i): 1 for i in range(100_000)}}, "metadata"),
        ({"name": "x", "documents": ["a"], "selection": {str(i): 1 for i in range(100_000)}}, "selection"),
        ({"name": "x", "documents": ["a"], "metadata": {"k" * 65: "v"}}, "metadata." + "k" * 64),
        ({"name": "x", "documents": ["a"], "metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"name": "x" * 64, "documents": ["a"]}, "name"),
        ({"name": "x", "documents": ["a"], "n" * 1_000_000: 1}, "n" * 100),
    ],
)
def test_one_complaint_is_made(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = http.post("/v1/contexts", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert len(response.text) < 1000


def test_a_mark_before_the_body_is_no_part_of_it(http: httpx.Client) -> None:
    body = json.dumps({"model": V1, "input": "x"}).encode("utf-8-sig")
    assert http.post("/v1/embeddings", content=body, headers=JSON).is_success


def test_a_very_long_text(http: httpx.Client) -> None:
    """Both as an input and as a document: only what the model can see of it is looked at."""
    text = "!" * 8_000_000
    response = http.post("/v1/embeddings", json={"model": V1, "input": text})
    check(response, 400, "context_length_exceeded", "input", "8000000 characters")
    response = http.post("/v1/embeddings", json={"model": V1, "input": text, "truncate": "end"})
    assert (response.status_code, response.headers["x-truncated-inputs"]) == (200, "0")
    body = {"name": "long", "model": V1, "documents": [text, "short"]}
    assert http.post("/v1/contexts", json=body).json()["documents"]["truncated"] == 1
    response = http.post("/tokenize", json={"input": text, "model": V1})
    check(response, 400, "max_tokens_per_request", "input", "300000")


# --- what no database holds -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    url = None if request.param == "sqlite" else new_database(request.getfixturevalue("postgres"))
    contexts = {"database_url": url, "keep_documents": True}
    with (
        live_server(tmp_path_factory.mktemp("stored"), contexts=contexts) as served,
        httpx.Client(base_url=served, timeout=30) as client,
    ):
        yield client


BATCH = {"endpoint": "/v1/embeddings", "completion_window": "24h"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/batches", b'{"input_file_id": "\\ud83d"}', "input_file_id"),
        ("/v1/batches", b'{"input_file_id": "a\\u0000b"}', "input_file_id"),
        ("/v1/batches", b'{"input_file_id": "x", "metadata": {"k": "\\ud83d"}}', "metadata.k"),
        ("/v1/contexts", b'{"name": "x", "documents": ["a"], "metadata": {"k": "a\\u0000b"}}', "metadata.k"),
        ("/v1/contexts/x/rollback", b'{"version": 2147483648}', "version"),
        ("/v1/contexts/x/rollback", b'{"version": 9223372036854775808}', "version"),
    ],
)
def test_what_cannot_be_stored_is_a_400(stored: httpx.Client, path: str, body: bytes, param: str) -> None:
    if path == "/v1/batches":
        body = body[:-1] + b", " + json.dumps(BATCH).encode()[1:]
    check(stored.post(path, content=body, headers=JSON), 400, None, param)


@pytest.mark.parametrize(
    "path",
    ["/v1/contexts/a%00", "/v1/files/%00", "/v1/files?after=%00", "/v1/contexts?after=a%00b", "/v1/models/x@%00"],
)
def test_a_nul_in_a_url_is_a_400(stored: httpx.Client, path: str) -> None:
    check(stored.get(path), 400, None, None, "NUL")


def test_documents_of_any_characters_are_kept(stored: httpx.Client) -> None:
    """Half an emoji becomes U+FFFD, as it does for the model."""
    body = b'{"name": "odd", "documents": ["half \\ud83d of it", "nul \\u0000"]}'
    assert stored.post("/v1/contexts", content=body, headers=JSON).status_code == 201
    kept = [json.loads(line)["text"] for line in stored.get("/v1/contexts/odd/documents").text.splitlines()]
    assert sorted(kept) == ["half \ufffd of it", "nul \0"]


def test_the_name_of_a_file(stored: httpx.Client) -> None:
    head, end = b"multipart/form-data; boundary=b", b"\r\n\r\nx\r\n--b--\r\n"
    form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    form += b'--b\r\nContent-Disposition: form-data; name="file"; filename="a\0\\ud83d"' + end
    made = stored.post("/v1/files", content=form, headers={"Content-Type": head.decode()})
    assert (made.status_code, made.json()["filename"]) == (200, "a\\ud83d")
    for charset in ("unicode_escape", "undefined", "utf-7"):
        answer = stored.post("/v1/files", content=form, headers={"Content-Type": f"{head.decode()}; charset={charset}"})
        check(answer, 415, "unsupported_media_type", None, "UTF-8")
