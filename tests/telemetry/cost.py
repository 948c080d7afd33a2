"""What logs, headers and traces cost a request: `python -m tests.telemetry.cost [--without CHECKOUT]` prints a table.

One process a variant, and several of each in turn. In each the whole application answers requests for one text whose
vector is in its cache, without sockets, and the event loop's thread is asked for its own CPU time: of many short runs
the fastest in a hundred, which other work on the machine disturbs least. `--without`: a checkout to compare with.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from app.main import create_app
from app.settings import Settings
from app.telemetry.logs import configure_logging
from tests.live import V1, golden

HERE = Path(__file__).parents[2]
VARIANTS: dict[str, dict[str, Any]] = {
    "no line": {"log_level": "warning"},
    "console": {},
    "json": {"log_format": "json"},
    "json and traces": {"log_format": "json", "traces": True},
}
TURNS, WARM_UP, RUNS, REQUESTS = 3, 300, 1500, 2
BODY = json.dumps({"model": V1, "input": "The fox sleeps in the barn.", "encoding_format": "base64"}).encode()
HEADERS = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(BODY))}


async def microseconds(server: dict[str, Any], folder: str) -> float:
    """CPU time of one request on the event loop's thread."""
    settings = {"models": [{"name": golden(V1)}], "data_dir": folder, "server": server}
    app = create_app(Settings.model_validate(settings))
    commands: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    events: asyncio.Queue[Any] = asyncio.Queue()
    life = asyncio.ensure_future(app({"type": "lifespan", "state": {}}, commands.get, events.put))
    await commands.put({"type": "lifespan.startup"})
    await events.get()

    async def ask() -> int:
        answer: list[Any] = []

        async def send(message: Any) -> None:
            answer.append(message)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": BODY}

        path = {"path": "/v1/embeddings", "raw_path": b"/v1/embeddings", "query_string": b"", "root_path": ""}
        headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
        await app({**scope, **path, "headers": headers, "client": None, "server": None, "state": {}}, receive, send)
        return int(answer[0]["status"])

    while await ask() != 200:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.1)
    for _ in range(WARM_UP):
        await ask()
    runs = []
    for _ in range(RUNS):
        started = time.thread_time()
        for _ in range(REQUESTS):
            await ask()
        runs.append((time.thread_time() - started) / REQUESTS)
    await commands.put({"type": "lifespan.shutdown"})
    await life
    return 1e6 * statistics.quantiles(runs, n=100)[0]


def _measured(server: dict[str, Any], checkout: Path) -> float:
    """In a process of its own, whose log goes to a file."""
    command = [sys.executable, str(Path(__file__)), "--one", json.dumps(server)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(checkout), str(HERE)))}
    with tempfile.TemporaryFile() as log:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=log, check=True, timeout=300)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--without", type=Path)
    parser.add_argument("--one", type=json.loads)
    given = parser.parse_args()
    if given.one is not None:
        wanted = {name: given.one[name] for name in given.one if name.startswith("log_")}
        configure_logging(wanted.pop("log_level", "info"), *wanted.values())
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write(str(asyncio.run(microseconds(given.one, folder))))
        return
    variants: dict[str, tuple[dict[str, Any], Path]] = {name: (server, HERE) for name, server in VARIANTS.items()}
    if given.without:
        variants = {"without": ({}, given.without), **variants}
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(TURNS):
        for name, (server, checkout) in variants.items():
            found[name].append(_measured(server, checkout))
    for name, times in found.items():
        sys.stdout.write(f"{name:16} {statistics.median(times):5.0f} µs ({min(times):.0f} to {max(times):.0f})\n")


if __name__ == "__main__":
    main()
