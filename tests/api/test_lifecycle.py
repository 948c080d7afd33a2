"""Starting, serving, stopping: what the process promises at each turn, seen from outside."""

import asyncio
import gc
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import State

from app.cli.draining import DrainingServer, listen
from app.errors import EngineUnavailable, SelfCheckError
from app.lifecycle import Server
from app.main import application
from app.references import References, write
from app.selfcheck import SECOND, key_of
from app.settings import Settings
from tests.compare import assert_same
from tests.conftest import BUILTIN
from tests.live import GOLDENS, V1, live_server
from tests.load.sigterm import one_round
from tests.models.conftest import load_golden
from tests.processes import ServerProcess
from tests.waiting import until

# So much for one core that it is not done before the tests that need it running are.
MUCH = {"model": BUILTIN, "input": [f"{i} " + "word " * 200 for i in range(1000)]}


def test_a_model_that_fails_its_self_check_is_never_ready(data_dir: Path) -> None:
    with live_server(data_dir):
        pass
    spec = load_golden(V1).model.spec
    folder, key = data_dir / "selfcheck", key_of(spec)
    known = References(folder).find(key, {})
    assert known is not None
    with live_server(data_dir):  # a second start agrees with the first, and leaves its file alone
        again = References(folder).find(key, {})
    assert again is not None
    assert_same(again.arrays[SECOND], known.arrays[SECOND])

    write(known.path, {name: array + 0.01 for name, array in known.arrays.items()}, spec)
    with pytest.raises(SelfCheckError), live_server(data_dir):
        pass


# --- SIGTERM -------------------------------------------------------------------------------------------------------


def test_sigterm_under_load_loses_nothing(tmp_path: Path) -> None:
    """The long form: python -m tests.load.sigterm --rounds 50."""
    seen = one_round(tmp_path / "server", grace=1.0, requests=40)
    assert seen.exit_code == 0
    assert len(seen.taken) >= 40
    assert seen.taken_late
    assert seen.lost == []
    assert seen.surprises == []


def test_what_is_not_done_in_time_is_told_so(tmp_path: Path) -> None:
    variables = {"CDE__SERVER__DRAIN_SECONDS": "1.5", "CDE__SERVER__GRACE_SECONDS": "0"}
    with (
        ServerProcess(tmp_path / "server", model=BUILTIN, **variables) as server,
        httpx.Client(base_url=server.when_ready().url, timeout=60) as idle,
    ):
        assert idle.post("/v1/embeddings", json={"model": BUILTIN, "input": "x"}).is_success
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.url}/v1/embeddings", json=MUCH, timeout=60))
        )
        asking.start()
        until(lambda: _queued(server.url) > 10_000)
        server.process.send_signal(signal.SIGTERM)
        server.when_it_says("requests are refused; 1 are being answered")

        refused = idle.post("/v1/embeddings", json={"model": BUILTIN, "input": "y"})
        _assert_gone(refused, "shutting down")
        _assert_gone(idle.get("/ready"), "shutting down")  # a new connection: the port is open still
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert server.process.wait(30) == 0
        asking.join(30)
        _assert_gone(answers[0], "before this was answered")
        assert "1 requests were not answered within server.drain_seconds (1.5 s)" in server.log
        assert "Traceback" not in server.log


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "server", model=BUILTIN, CDE__SERVER__GRACE_SECONDS="600") as server:
        url = server.when_ready().url
        server.process.send_signal(signal.SIGTERM)
        server.when_it_says("not ready any more")
        _assert_gone(httpx.get(f"{url}/ready"), "about to shut down")
        served = httpx.post(f"{url}/v1/embeddings", json={"model": BUILTIN, "input": "late"})
        assert (served.status_code, served.headers["connection"]) == (200, "close")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 128 + signal.SIGTERM
        assert "A second signal" in server.log


def test_sigterm_does_not_wait_for_a_download(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:  # takes connections, and says nothing
        variables = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_ETAG_TIMEOUT": "600",
            "CDE__SERVER__GRACE_SECONDS": "600",
        }
        with ServerProcess(tmp_path / "server", model="jxm/cde-small-v2", **variables) as server:
            hub.settimeout(60)
            connection, _ = hub.accept()
            with connection:
                starting = httpx.get(f"{server.url}/ready")
                assert (starting.status_code, starting.json()["error"]["code"]) == (503, "not_ready")
                server.process.send_signal(signal.SIGTERM)
                assert server.process.wait(60) == 0
                assert "Traceback" not in server.log


def _assert_gone(response: httpx.Response, words: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (503, "server_error", "shutting_down")
    assert words in error["message"]
    assert response.headers["connection"] == "close"
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["x-request-id"]


def _queued(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("cde_queue_tokens{"))


# --- the heap --------------------------------------------------------------------------------------------------


def test_collections_do_not_walk_what_was_loaded(data_dir: Path) -> None:
    """Between start and stop: one of all that is there stops every thread for a quarter of a second."""

    async def run() -> tuple[int, int]:
        server = Server(Settings.model_validate({"models": [{"name": str(GOLDENS / V1)}], "data_dir": data_dir}))
        await server.start(State())
        serving = gc.get_freeze_count()
        await server.stop()
        return serving, gc.get_freeze_count()

    gc.unfreeze()
    serving, stopped = asyncio.run(run())
    assert serving > 100_000
    assert stopped == 0


# --- failing ---------------------------------------------------------------------------------------------------


@contextmanager
def draining_server(data_dir: Path, failures: list[Exception]) -> Iterator[tuple[DrainingServer, Server, str]]:
    """As `serve` runs it, in a thread."""
    settings = Settings.model_validate(
        {"models": [{"name": str(GOLDENS / V1)}], "data_dir": data_dir, "server": {"grace_seconds": 600}}
    )

    def failed(error: Exception) -> None:
        failures.append(error)
        server.end()

    lifecycle = Server(settings, failed)
    server = DrainingServer(application(lifecycle), lifecycle)
    sockets = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    try:
        until(lambda: httpx.get(f"{url}/ready").is_success)
        yield server, lifecycle, url
    finally:
        server.end()
        thread.join(60)
        assert not thread.is_alive()


def test_a_server_that_fails_says_so_answers_and_ends(data_dir: Path) -> None:
    failures: list[Exception] = []
    body = b'{"model": "v1-tiny-c16", "input": "once"}'
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with (
        draining_server(data_dir, failures) as (server, lifecycle, url),
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as slow,
    ):
        slow.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())  # taken; its body is still to come
        until(lambda: bool(server.server_state.tasks))
        assert httpx.get(f"{url}/ready").is_success
        broken = EngineUnavailable("The device worker died three times.")
        for _ in range(2):
            lifecycle.fail(broken)  # from another thread than the loop's, as the engine's workers do
        ready = httpx.get(f"{url}/ready")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "not_ready")
        assert "The device worker died three times." in ready.json()["error"]["message"]
        assert ready.headers["connection"] == "close"
        slow.sendall(body)
        assert slow.recv(1000).startswith(b"HTTP/1.1 200 OK")
    assert failures == [broken]
