"""The gateway's rules: what is sent on to another replica and what never is, request ids, its own errors, TLS."""

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest

from tests.conftest import ANIMALS
from tests.deploy.gateway import Gateway, needs_nginx
from tests.deploy.stub import Stub
from tests.live import V1

pytestmark = needs_nginx

EMBEDDINGS, CONTEXTS = "/v1/embeddings", "/v1/contexts"
BODY = {"model": V1, "input": "x"}


@pytest.fixture(scope="module")
def gateway(server: str) -> Iterator[str]:
    """In front of the server that tests share."""
    with Gateway([server.removeprefix("http://")]) as running:
        yield running.url


def nobody() -> str:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"127.0.0.1:{listening.getsockname()[1]}"


def asked(path: str, first: Stub, second: Stub) -> list[int]:
    """Statuses of requests that go to `first` and then, one more, to `second`."""
    with Gateway([first.address, second.address]) as running, httpx.Client(base_url=running.url) as http:
        return [http.post(path, json=BODY).status_code for _ in range(2)]


@pytest.mark.parametrize("status", [0, 503])
def test_embeddings_go_on_to_another_replica(status: int) -> None:
    with Stub(status) as bad, Stub(200) as good:
        assert asked(EMBEDDINGS, bad, good) == [200, 200]
        assert bad.heard
        assert {heard.body for heard in bad.heard + good.heard} == {b'{"model":"v1-tiny-c16","input":"x"}'}


@pytest.mark.parametrize("status", [429, 500])
def test_embeddings_that_were_refused_for_good_do_not(status: int) -> None:
    with Stub(status) as bad, Stub(200) as good:
        assert sorted(asked(EMBEDDINGS, bad, good)) == [200, status]
        assert (len(bad.heard), len(good.heard)) == (1, 1)


def test_what_may_have_changed_something_is_never_sent_twice() -> None:
    with Stub(0) as bad, Stub(201) as good:
        assert sorted(asked(CONTEXTS, bad, good)) == [201, 502]
        assert (len(bad.heard), len(good.heard)) == (1, 1)


def test_what_reached_nobody_is_sent_to_somebody() -> None:
    with Stub(201) as good, Gateway([nobody(), good.address]) as running:
        statuses = [httpx.post(f"{running.url}{CONTEXTS}", json=BODY).status_code for _ in range(3)]
    assert statuses == [201, 201, 201]


def test_a_request_kills_three_replicas_at_most() -> None:
    with ExitStack() as stack:
        stubs = [stack.enter_context(Stub(0)) for _ in range(4)]
        running = stack.enter_context(Gateway([stub.address for stub in stubs]))
        assert httpx.post(f"{running.url}{EMBEDDINGS}", json=BODY).status_code == 502
        assert sum(len(stub.heard) for stub in stubs) == 3


def test_uploads_pass_through_as_they_come() -> None:
    """The second half is not sent before the replica has seen the first."""
    arrived = threading.Event()

    def replica(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            received = b""
            while b"first" not in received:
                received += connection.recv(65536)
            arrived.set()
            while b"second" not in received:
                received += connection.recv(65536)
            connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")

    def lines() -> Iterator[bytes]:
        yield b'"first"\n'
        assert arrived.wait(20)
        yield b'"second"\n'

    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        Gateway([f"127.0.0.1:{listening.getsockname()[1]}"]) as running,
    ):
        thread = threading.Thread(target=replica, args=(listening,))
        thread.start()
        answer = httpx.post(f"{running.url}{CONTEXTS}?name=x", content=lines(), timeout=30)
        thread.join()
    assert answer.status_code == 201


@pytest.mark.parametrize(("given", "passes"), [("mine-1:2.3_x", True), ("has a space", False), ("x" * 129, False)])
def test_request_ids(gateway: str, given: str, passes: bool) -> None:
    answer = httpx.post(f"{gateway}{EMBEDDINGS}", json=BODY, headers={"X-Request-Id": given})
    assert (answer.headers.get_list("x-request-id") == [given]) is passes
    assert answer.headers["x-request-id"].startswith("mine" if passes else "req_")


def test_replicas_learn_the_gateways_request_id() -> None:
    with Stub(200) as replica, Gateway([replica.address]) as running:
        httpx.post(f"{running.url}{EMBEDDINGS}", json=BODY)
        entry = running.first(EMBEDDINGS)
    assert replica.heard[0].headers["x-request-id"] == entry["request_id"]
    assert entry["request_id"].startswith("req_")


def test_the_openai_client_through_it(gateway: str) -> None:
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0) as client:
        assert len(client.embeddings.create(model=V1, input=ANIMALS).data) == len(ANIMALS)
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.embeddings.create(model="nothing", input="x")


def test_large_bodies_and_answers_pass() -> None:
    answered = b'"' + b"v" * 8_000_000 + b'"'
    with Stub(200, answered) as replica, Gateway([replica.address]) as running:
        sent = {"model": V1, "input": "x" * 5_000_000}
        answer = httpx.post(f"{running.url}{EMBEDDINGS}", json=sent)
        assert answer.content == answered
        assert len(replica.heard[0].body) > 5_000_000


def raw(running: Gateway, head: str) -> httpx.Response:
    """The answer to a head that no client would send."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        connection.sendall(head.encode())
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
            if received.endswith(b"}"):
                break
    start, _, body = received.partition(b"\r\n\r\n")
    status, *headers = start.decode().split("\r\n")
    pairs = [tuple(line.split(": ", 1)) for line in headers]
    return httpx.Response(int(status.split()[1]), headers=pairs, content=body)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (f"POST {EMBEDDINGS} HTTP/1.1\r\nHost: x\r\nContent-Length: 67108865\r\n\r\n", 413, "request_too_large"),
        (f"GET /{'x' * 70_000} HTTP/1.1\r\nHost: x\r\n\r\n", 414, None),
        (f"GET / HTTP/1.1\r\nHost: x\r\nX-Long: {'x' * 70_000}\r\n\r\n", 400, None),
        ("GET /metrics HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\n\r\n", 404, "unknown_url"),
        *(
            (f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n", 404, "unknown_url")
            for path in (
                "/metrics/",
                "/metrics//",
                "//metrics",
                "/metrics%2F",
                "/metrics/%2f",
                "/%6detrics/",
                "/v1/../metrics/",
            )
        ),
        (f"POST {EMBEDDINGS} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 502, "bad_gateway"),
    ],
)
def test_its_own_errors_have_openais_shape(head: str, status: int, code: str | None) -> None:
    with Gateway([nobody()]) as running:
        answer = raw(running, head)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"] == "mine" or answer.headers["x-request-id"].startswith("req_")
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert ("retry-after" in answer.headers) is (status == 502)


def test_an_answer_that_takes_too_long_is_not_asked_for_again() -> None:
    done = threading.Event()
    edits = {"proxy_read_timeout 600s": "proxy_read_timeout 1s"}
    with Stub(200, wait=done.wait) as slow, Stub(200, wait=done.wait) as other:
        with (
            Gateway([slow.address, other.address], edits) as running,
            openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=2) as client,
            pytest.raises(openai.APIStatusError) as raised,
        ):
            client.embeddings.create(model=V1, input="x")
        done.set()
        assert raised.value.status_code == 504
        assert raised.value.code == "gateway_timeout"
        assert len(slow.heard + other.heard) == 1


def test_the_replicas_own_errors_pass_as_they_are(gateway: str) -> None:
    answer = httpx.post(f"{gateway}{EMBEDDINGS}", json={"model": "nothing", "input": "x"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert httpx.get(f"{gateway}/nothing").json()["error"]["code"] == "unknown_url"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here to make a certificate")
def test_https_as_in_the_example(server: str, tmp_path: Path) -> None:
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "certificate.pem")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    trusted = ssl.create_default_context(cafile=str(tmp_path / "certificate.pem"))
    with Gateway([server.removeprefix("http://")], tls=tmp_path) as running:
        answer = httpx.post(f"https://127.0.0.1:{running.tls_port}{EMBEDDINGS}", json=BODY, verify=trusted)
    assert answer.is_success
    assert answer.headers["strict-transport-security"].startswith("max-age=")
