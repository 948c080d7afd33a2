"""Strategies: requests with structure, where any part may be wrong."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from hypothesis import strategies as st

from tests.conftest import BUILTIN
from tests.live import V1

Strategy = st.SearchStrategy


@dataclass(frozen=True)
class Request:
    method: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def wire(self) -> bytes:
        lines = [b"%s %s HTTP/1.1" % (self.method, self.target), b"Host: fuzz"]
        lines += [b"%s: %s" % header for header in self.headers]
        if self.body or self.method in (b"POST", b"PUT"):
            lines.append(b"Content-Length: %d" % len(self.body))
        return b"\r\n".join([*lines, b"", self.body])


class Raw(str):
    """JSON text that `json.dumps` would not write."""


# --- values ---------------------------------------------------------------------------------------------------------

CHARACTERS = st.characters(exclude_categories=())  # lone surrogates too
ODD_TEXTS = [
    "", " ", "\0", "a\0b", "\ud83d", "\udc00\ud800", "é" * 300, "😀", "\u202e", "{}", "../../etc/passwd", "%00", "null",
    "x" * 70_000, "search_query: ", "search_document: x", "[SEP] [CLS] [PAD]", "\ufeff", "-1", "1e9", "'; drop table",
]  # fmt: skip
ODD_NUMBERS = ["1e400", "-1e400", "NaN", "Infinity", "9" * 400, "9" * 5000, "-0", "0.1", "1E5", "01", "0x1", str(2**63)]
NESTED = ["[" * 2000 + "]" * 2000, '{"a":' * 500 + "1" + "}" * 500, "[" * 3000, '[[1,"a"],{"b":[null]}]']

texts: Strategy[Any] = st.text(CHARACTERS, max_size=30) | st.sampled_from(ODD_TEXTS)
junk: Strategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    texts,
    st.sampled_from([*ODD_NUMBERS, *NESTED]).map(Raw),
    st.recursive(texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)),
)


def rarely(usual: Strategy[Any], other: Strategy[Any] = junk) -> Strategy[Any]:
    """Mostly what belongs there, so that the rest of a request is reached."""
    return st.integers(0, 15).flatmap(lambda n: other if n == 0 else usual)


def write(value: Any) -> str:
    """JSON, with `Raw` as it is."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{write(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(write, value)) + "]"
    return json.dumps(value)


def encoded(text: str) -> Strategy[bytes]:
    """As UTF-8 for the most part."""
    right = text.encode(errors="replace")
    wrong: list[Callable[[], bytes]] = [
        lambda: text.encode("utf-16", "surrogatepass"),
        lambda: text.encode("latin-1", "replace"),
        lambda: b"\xef\xbb\xbf" + right,
        lambda: right + right,
        lambda: right[: len(right) // 2],
        lambda: right.replace(b'"', b"'"),
        lambda: right.replace(b"\\", b""),
        lambda: b"\xff" + right,
        lambda: b"",
    ]
    return st.integers(0, 40).map(lambda n: wrong[n]() if n < len(wrong) else right)


def body(required: Mapping[str, Strategy[Any]], optional: Mapping[str, Strategy[Any]]) -> Strategy[bytes]:
    """An object with these fields, any of which may hold anything, and with fields nobody knows."""
    known = st.fixed_dictionaries(
        {key: rarely(value) for key, value in required.items()},
        optional={key: rarely(value) for key, value in optional.items()},
    )
    extra = st.dictionaries(texts, junk, max_size=2)
    whole = st.tuples(known, rarely(st.just({}), extra)).map(lambda both: both[0] | both[1])
    return rarely(whole).flatmap(lambda value: encoded(write(value)))


# --- the API's words ------------------------------------------------------------------------------------------------

FILE_ID = "file-" + "0" * 24
"""Stands for a file that is there."""
NAMES = ["fuzz", "fuzz-2", "default"]
names = st.sampled_from(NAMES)
refs = rarely(names | st.sampled_from(["fuzz.1", "default.1", "fuzz.99", "ctx_" + "0" * 32, "Fuzz", "a" * 64]), texts)
models = rarely(
    st.sampled_from([V1, V1, V1, BUILTIN, f"{V1}@fuzz", f"{V1}@default.1:query", f"{V1}:document", "minilm-context"]),
    st.tuples(st.sampled_from([V1, "gpt-9", ""]), st.sampled_from("@:./"), texts).map("".join),
)
few_texts = st.lists(rarely(st.text(max_size=20), texts), max_size=4)
ids = st.lists(st.integers(-5, 110_000), max_size=6)
types = st.sampled_from(["query", "document", "none"])
metadata = st.dictionaries(texts, texts, max_size=3)
inputs = st.text(min_size=1, max_size=40) | few_texts | ids | st.lists(ids, max_size=3) | st.just("word " * 600)

LARGE = st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1])
BODIES: dict[str, Strategy[bytes]] = {
    "/v1/embeddings": body(
        {"model": models, "input": inputs},
        {
            "encoding_format": st.sampled_from(["float", "base64"]),
            "dimensions": st.sampled_from([64, 384, 1, 10**9]),
            "user": texts,
            "context": refs | st.fixed_dictionaries({"documents": few_texts}),
            "input_type": types,
            "truncate": st.sampled_from(["none", "end"]),
            "normalize": st.booleans(),
        },
    ),
    "/v1/contexts": body(
        {"name": names, "documents": st.lists(st.sampled_from(["An owl.", "A fox.", "", " "]) | texts, max_size=5)},
        {
            "model": models,
            "selection": st.fixed_dictionaries(
                {"method": st.sampled_from(["random", "first", "diverse"])}, optional={"seed": st.integers()}
            ),
            "metadata": metadata,
            "dry_run": st.booleans(),
        },
    ),
    "/v1/contexts/{ref}/rollback": body({"version": st.integers(0, 9) | LARGE}, {"model": models}),
    "/v1/contexts/{ref}/compatibility": body(
        {"with": refs, "texts": few_texts}, {"input_type": types, "top_k": st.integers(0, 101), "model": models}
    ),
    "/tokenize": body({"input": inputs}, {"model": models, "input_type": types}),
    "/v1/batches": body(
        {
            "input_file_id": st.just(FILE_ID) | texts,
            "endpoint": st.just("/v1/embeddings"),
            "completion_window": st.just("24h"),
        },
        {"metadata": metadata},
    ),
}

PARAMETERS = ["model", "limit", "after", "order", "purpose", "name", "wait", "dry_run", "metadata"]
VALUES = [V1, "5", "fuzz", "desc", "false", '{"a":"b"}', "batch"]
queries = st.dictionaries(
    rarely(st.sampled_from(PARAMETERS), texts), rarely(st.sampled_from(VALUES), texts), max_size=3
)


def _header_value(text: str) -> bytes:
    return text.encode(errors="replace").translate(None, bytes([*range(9), *range(10, 32), 127]))[:9000]


HEADERS = [
    b"X-Context", b"X-Input-Type", b"X-Expect-Fingerprint", b"X-Request-Id", b"X-Forwarded-For", b"X-Forwarded-Proto",
    b"Authorization", b"Accept", b"Cookie", b"Content-Encoding", b"Expect", b"Origin", b"Range",
    b"X-Timeout-Ms",
]  # fmt: skip
HEADER_VALUES = ["fuzz", "query", "1", "60000", "100-continue", "gzip", "Bearer x", "application/x-npy", "*/*"]
header_values = (st.sampled_from(HEADER_VALUES) | texts).map(_header_value)
headers = st.dictionaries(st.sampled_from(HEADERS), header_values, max_size=2)


def _target(path: str, ref: str, query: Mapping[str, str]) -> bytes:
    filled = path.replace("{ref}", quote(ref.encode(errors="replace"), safe="/@:"))
    pairs = [(key.encode(errors="replace"), value.encode(errors="replace")) for key, value in query.items()]
    return (filled + ("?" + urlencode(pairs) if pairs else "")).encode()[:60_000]


def made(method: str, path: str, kind: Strategy[str], content: Strategy[bytes]) -> Strategy[Request]:
    def make(ref: str, query: Mapping[str, str], more: Mapping[bytes, bytes], media: str, data: bytes) -> Request:
        given = ((b"Content-Type", media.encode()), *more.items()) if media else tuple(more.items())
        return Request(method.encode(), _target(path, ref, query), given, data)

    return st.builds(make, refs, rarely(st.just({}), queries), rarely(st.just({}), headers), kind, content)


JSON = "application/json"
MEDIA_TYPES = [JSON, "application/json; charset=utf-16", "text/plain", "", "a/b+json", "multipart/form-data"]
media_types = rarely(st.just(JSON), st.sampled_from(MEDIA_TYPES))
json_requests = st.one_of(
    *[made("POST", path, media_types, content) for path, content in BODIES.items()],
    *[made("POST", "/v1/embeddings", st.just(JSON), BODIES["/v1/embeddings"])] * 3,
)

GETS = [
    "/", "/health", "/ready", "/metrics", "/info", "/docs", "/openapi.json", "/v1/models", "/v1/models/{ref}",
    "/v1/contexts", "/v1/contexts/{ref}", "/v1/contexts/{ref}/versions", "/v1/contexts/{ref}/embeddings",
    "/v1/contexts/{ref}/documents", "/v1/files", "/v1/files/{ref}", "/v1/files/{ref}/content", "/v1/batches",
    "/v1/batches/{ref}", "/v1/{ref}", "/{ref}",
]  # fmt: skip
looking = st.sampled_from(GETS).flatmap(lambda path: made("GET", path, st.just(""), st.just(b"")))
METHODS = [b"DELETE", b"PUT", b"PATCH", b"OPTIONS", b"TRACE", b"PURGE", b"POST", b"GET"]
other_methods = st.builds(
    lambda method, request: Request(method, request.target, request.headers, request.body),
    st.sampled_from(METHODS),
    looking | json_requests,
)
