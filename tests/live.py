"""A real uvicorn on a free loopback port, in a thread of the test process."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from app.main import create_app
from app.serving import server_config
from app.settings import Settings

GOLDENS = Path(__file__).parent / "goldens"
V1, V2 = "v1-tiny-c16", "v2-tiny-c16"
START_SECONDS = 60


def golden(name: str) -> str:
    """The folder of a golden checkpoint; any other name as it is."""
    return str(GOLDENS / name) if (GOLDENS / name).is_dir() else name


@contextmanager
def live_server(data_dir: Path, models: Sequence[str | dict[str, Any]] = (V1,), **settings: Any) -> Iterator[str]:
    """Serves until the block ends; gives the base URL. `models`: golden folders, other names, or their settings."""
    named = [m if isinstance(m, dict) else {"name": golden(m)} for m in models]
    settings["server"] = {"port": 0, **settings.get("server", {})}
    tree = Settings.model_validate({"models": named, "data_dir": data_dir, **settings})
    failures: list[Exception] = []
    server = uvicorn.Server(server_config(create_app(tree, on_failure=failures.append), tree))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield _url_when_ready(server, failures)
    finally:
        server.should_exit = True
        thread.join(START_SECONDS)


def _url_when_ready(server: uvicorn.Server, failures: list[Exception]) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and not failures:
        if server.started:
            port = server.servers[0].sockets[0].getsockname()[1]
            url = f"http://127.0.0.1:{port}"
            if httpx.get(f"{url}/ready").status_code == httpx.codes.OK:
                return url
        time.sleep(0.02)
    raise failures[0] if failures else TimeoutError("the server did not become ready")
