"""Requests made to take up memory, or time: the greatest bodies of their kinds, one after the other and together."""

import json
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from safetensors.numpy import save

from tests.fuzz.laws import check_answer
from tests.fuzz.target import Client, Target
from tests.fuzz.uploads import ARRAY, END, PART
from tests.live import V1
from tests.raw import Answer, connected

MIB = 2**20
MODEL = V1.encode()
SMALL = json.dumps({"model": V1, "input": "x"}).encode()


@dataclass
class Report:
    name: str
    statuses: list[int]
    growth: float
    """MiB at most, above what was there before."""
    seconds: float


def _head(path: bytes, length: int, kind: bytes = b"application/json", method: bytes = b"POST") -> bytes:
    return b"%s %s HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (method, path, kind, length)


def _json(path: bytes, before: bytes, piece: bytes, after: bytes, size: int) -> bytes:
    """About `size` bytes of body, most of them repetitions of `piece`."""
    body = before + piece * ((size - len(before) - len(after)) // len(piece)) + after
    return _head(path, len(body)) + body


def _ndjson(line: bytes, lines: int) -> bytes:
    body = b"".join(b'"%d %s"\n' % (i, line) for i in range(lines))
    return _head(b"/v1/contexts?name=bomb", len(body), b"application/x-ndjson") + body


def _form(size: int) -> bytes:
    body = PART % (b"purpose", b"", b"batch") + PART % (b"file", b'; filename="a"', b"x" * size) + END
    return _head(b"/v1/files", len(body), b"multipart/form-data; boundary=b") + body


def _empty_arrays(size: int) -> bytes:
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    names = b"".join(entry % i for i in range(size // 60))
    header = b"{" + names + b'"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    body = len(header).to_bytes(8, "little") + header
    return _head(b"/v1/contexts/bomb/embeddings", len(body), b"application/vnd.safetensors", b"PUT") + body


def single(size: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name and bytes of each; `size` is the server's limit of a body."""
    embed, contexts, text = b"/v1/embeddings", b"/v1/contexts", b'{"model":"%s","input":"' % MODEL
    documents = b'{"name":"bomb","documents":['
    yield "one text of exclamation marks", lambda: _json(embed, text, b"!", b'"}', size)
    yield "the same, to be cut", lambda: _json(embed, text, b"!", b'","truncate":"end"}', size)
    yield "the same with an emoji", lambda: _json(embed, text + "😀".encode(), b"!", b'","truncate":"end"}', size)
    yield "the same to /tokenize", lambda: _json(b"/tokenize", text, b"!", b'"}', size)
    yield "a million short texts", lambda: _json(embed, text[:-1] + b"[", b'"ab",', b'"x"]}', min(size, 5 * 990_000))
    yield "22 million empty lists", lambda: _json(embed, text[:-1] + b"[", b"[],", b"0]}", size)
    yield "a million lists", lambda: _json(embed, text[:-1] + b"[", b"[1],", b"[1]]}", min(size, 4 * 490_000))
    yield "a million wrong documents", lambda: _json(contexts, documents, b"1,", b"1]}", min(size, 2 * 990_000))
    yield "one document", lambda: _json(contexts, documents + b'"', b"word ", b'"]}', size)
    yield "documents of 600 bytes", lambda: _json(contexts, documents, b'"%s",' % (b"word " * 120), b'"x"]}', size)
    yield "brackets without end", lambda: _json(embed, b"", b"[", b"", size)
    yield "half an emoji, then a text", lambda: _json(embed, text + b"\\ud83d", b"\\u00e9", b'"}', size)
    yield "a name of a field", lambda: _json(embed, b'{"', b"n", b'":1}', size)
    yield "an import of nothing", lambda: _empty_arrays(size)
    yield "600 documents of 1 MiB, NDJSON", lambda: _ndjson(b"word " * (MIB // 5), 600)
    yield "one line without end, NDJSON", lambda: _ndjson(b"word " * (size // 5), 1)
    yield "a file of the greatest size", lambda: _form(200 * MIB)
    yield "a good import", lambda: (
        _head(b"/v1/contexts/bomb/embeddings?model=" + MODEL, len(save({"dataset_embeddings": ARRAY})), method=b"PUT",
              kind=b"application/octet-stream") + save({"dataset_embeddings": ARRAY})
    )  # fmt: skip


def _measured(target: Target, name: str, act: Callable[[], list[Answer]]) -> Report:
    before = target.resident()
    target.forget_peak()
    started = time.monotonic()
    answers = act()
    seconds = time.monotonic() - started
    for answer in answers:
        check_answer(answer, name)
    client = Client(target.url)
    assert client.json("/health") == {"status": "ok"}
    client.close()
    return Report(name, [answer.status for answer in answers], target.peak() - before, seconds)


def one_by_one(target: Target, size: int, names: Collection[str] = ()) -> Iterator[Report]:
    """`names`: of the ones that are wanted; none: all."""
    for name, sent in single(size):
        if names and name not in names:
            continue
        client = Client(target.url)
        yield _measured(target, name, lambda client=client, sent=sent: [client.ask(sent())])  # type: ignore[misc]
        client.close()


def together(target: Target, size: int, clients: int) -> Report:
    """Many large bodies at once: some are served, the others told to come again."""
    body = SMALL[:-1] + b" " * (size - len(SMALL)) + b"}"
    sent = _head(b"/v1/embeddings", len(body)) + body

    def ask(_: int) -> Answer:
        return Client(target.url).ask(sent)

    def act() -> list[Answer]:
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(ask, range(clients)))

    return _measured(target, f"{clients} bodies of {size // MIB} MiB at once", act)


def half_requests(target: Target, connections: int) -> Report:
    """Headers just below their limit that do not end."""
    head = b"GET /health HTTP/1.1\r\nX: " + b"y" * 60_000

    def act() -> list[Answer]:
        with ExitStack() as stack:
            for _ in range(connections):
                connection = stack.enter_context(connected(target.url))
                with suppress(OSError):
                    connection.sendall(head)
            return []

    return _measured(target, f"{connections} connections with headers that do not end", act)


def unread_answers(target: Target, connections: int) -> Report:
    """Large answers that nobody reads, until the server has dropped them."""
    sent = b"GET /v1/files/%s/content HTTP/1.1\r\nHost: x\r\n\r\n" % _newest_file(target).encode()

    def act() -> list[Answer]:
        with ExitStack() as stack:
            for _ in range(connections):
                stack.enter_context(connected(target.url, receive_buffer=4096)).sendall(sent)
            time.sleep(5)
            return []

    return _measured(target, f"{connections} answers that nobody reads", act)


def _newest_file(target: Target) -> str:
    client = Client(target.url)
    found = client.json("/v1/files?limit=1")["data"][0]["id"]
    client.close()
    return str(found)
