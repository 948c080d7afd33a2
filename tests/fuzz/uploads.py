"""Strategies: requests whose bodies are no JSON, and all requests together."""

import io
import struct

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save

from tests.fuzz.requests import Request, Strategy, json_requests, looking, made, other_methods, rarely, texts
from tests.live import V1

# --- documents, a line each -----------------------------------------------------------------------------------------

LINES = ['"An owl."', '{"text": "A fox."}', "", '{"text": 1}', "1"]
lines = st.lists(rarely(st.sampled_from(LINES), texts), max_size=6)
streams = made(
    "POST",
    "/v1/contexts?name=fuzz",
    st.just("application/x-ndjson"),
    lines.map(lambda some: "\n".join(some).encode(errors="replace")),
)

# --- arrays ---------------------------------------------------------------------------------------------------------

ARRAY = np.ones((16, 64), np.float32)
FORMS = [
    b'{"dataset_embeddings":{"dtype":"F32","shape":[16,64],"data_offsets":[0,4096]}}',
    b'{"dataset_embeddings":{"dtype":"F64","shape":[16,64],"data_offsets":[0,4096]}}',
    b'{"dataset_embeddings":{"dtype":"F32","shape":[16,9007199254740993],"data_offsets":[0,4096]}}',
    b'{"dataset_embeddings":{"dtype":"F32","shape":[0,64],"data_offsets":[0,0]},'
    b'"\\u0000":{"dtype":"I8","shape":[4096],"data_offsets":[0,4096]}}',
]
safetensors = st.sampled_from(FORMS).map(lambda form: struct.pack("<Q", len(form)) + form + b"\0" * 4096)


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, ARRAY)
    return buffer.getvalue()


def _mutated(data: bytes) -> Strategy[bytes]:
    """A few bytes changed near the beginning, where headers are, or cut short."""
    change = st.tuples(st.integers(0, 200), st.integers(0, 255))

    def apply(changes: list[tuple[int, int]], keep: int) -> bytes:
        out = bytearray(data)
        for where, value in changes:
            out[where % len(out)] = value
        return bytes(out[: len(out) - keep])

    return st.builds(apply, st.lists(change, max_size=4), rarely(st.just(0), st.integers(1, 4200)))


imports = made(
    "PUT",
    f"/v1/contexts/fuzz/embeddings?model={V1}",
    st.sampled_from(["application/vnd.safetensors", "application/x-npy", "application/octet-stream"]),
    _mutated(save({"dataset_embeddings": ARRAY})) | _mutated(_npy()) | safetensors | st.binary(max_size=100),
)

# --- files ----------------------------------------------------------------------------------------------------------

LINE = b'{"custom_id":"1","method":"POST","url":"/v1/embeddings","body":{"model":"%s","input":"x"}}' % V1.encode()
PART = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
END = b"--b--\r\n"
MULTIPART = "multipart/form-data; boundary=b"


def _form(parts: list[tuple[str, str, bytes]], end: bytes) -> bytes:
    written = [
        PART % (name.encode(errors="replace"), more.encode(errors="replace"), data) for name, more, data in parts
    ]
    return b"".join([*written, end])


part = st.tuples(
    rarely(st.sampled_from(["file", "purpose"]), texts),
    rarely(st.sampled_from(["", '; filename="a.jsonl"']), texts.map(lambda text: f'; filename="{text}"')),
    st.sampled_from([b"batch", LINE, LINE + b"\n" + LINE, b"{}", b""]) | st.binary(max_size=30),
)
good_parts = st.just([("purpose", "", b"batch"), ("file", '; filename="a.jsonl"', LINE)])
uploads = made(
    "POST",
    "/v1/files",
    rarely(st.just(MULTIPART), st.sampled_from([MULTIPART[:19], MULTIPART[:-1]])),
    st.builds(_form, rarely(good_parts, st.lists(part, max_size=4)), rarely(st.just(END), st.binary(max_size=9))),
)

structured: Strategy[Request] = st.one_of(
    json_requests, json_requests, json_requests, looking, other_methods, streams, imports, uploads
)
"""All of them; most are JSON."""
