"""The server under load: a process with keys, seen from outside."""

import asyncio
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from tests.api.test_auth import auth, entry
from tests.load.metrics import Metrics
from tests.processes import ServerProcess

KEYS = ("a", "b", "c")
PATIENCE = 120.0
NO_CACHE = {"CDE__LIMITS__VECTOR_CACHE_BYTES": "0"}
"""Every text is computed, but for those that are in flight at the same time."""


class LoadServer:
    """Use as a context manager."""

    def __init__(self, folder: Path, model: str, *options: str, **variables: str) -> None:
        """`model`: as ServerProcess takes it. `variables`: settings, `CDE__LIMITS__QUEUE_SECONDS="5"` and the like."""
        folder.mkdir(parents=True, exist_ok=True)
        keys = folder / "keys.toml"
        keys.write_text("".join(entry(key, key, "embed", "contexts:read", "contexts:write") for key in KEYS))
        variables = {"CDE__SERVER__KEYS_FILE": str(keys), **variables}
        self._folder = folder / "server" / "data"
        self._process = ServerProcess(folder / "server", *options, model=model, **variables)
        self._seen = psutil.Process(self._process.process.pid)

    def __enter__(self) -> Self:
        try:
            self.url = self._process.when_ready().url
            info = httpx.get(f"{self.url}/info", headers=auth(KEYS[0]), timeout=PATIENCE).raise_for_status().json()
        except BaseException:
            self._process.__exit__()
            raise
        self._reader = httpx.Client(base_url=self.url, timeout=PATIENCE)
        self.model: str = info["models"][0]["id"]
        self.is_exact: bool = info["models"][0]["dtype"] == "float32"
        self.limits: dict[str, Any] = info["limits"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()
        self._process.__exit__()

    @property
    def log(self) -> str:
        return self._process.log

    @property
    def is_alive(self) -> bool:
        return self._process.process.poll() is None

    def client(self, key: str = KEYS[0]) -> httpx.AsyncClient:
        """As many connections as there are requests at once."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.url, headers=auth(key), timeout=PATIENCE, limits=limits, verify=False)

    async def metrics(self) -> Metrics:
        return Metrics((await asyncio.to_thread(self._reader.get, "/metrics")).text)

    @property
    def resident_bytes(self) -> int:
        return int(self._seen.memory_info().rss)

    @property
    def open_files(self) -> int:
        """File descriptors, sockets among them, of which one is ours and reads the metrics. The database's are left
        out: it opens more connections when it needs them, and keeps them."""
        of_database = [file for file in self._seen.open_files() if Path(file.path).is_relative_to(self._folder)]
        return int(self._seen.num_fds()) - len(of_database)

    async def until_quiet(self, seconds: float = PATIENCE) -> float:
        """Waits until nothing waits and nothing runs; how long that took. Raises TimeoutError."""
        started = time.perf_counter()
        while True:
            now = await self.metrics()
            passed = time.perf_counter() - started
            # The request for the metrics is in flight itself.
            if not now("cde_queue_jobs") + now("cde_running_tokens") and now("cde_requests_in_flight") <= 1:
                return passed
            if passed > seconds:
                raise TimeoutError(f"{now('cde_queue_jobs'):.0f} texts still wait after {passed:.0f} s")
            await asyncio.sleep(0.05)
