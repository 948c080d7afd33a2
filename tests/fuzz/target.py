"""A real server process to be fuzzed, and what the operating system says of it."""

import json
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.conftest import BUILTIN
from tests.processes import ServerProcess
from tests.raw import Answer, Answers, connected

SETTINGS: Mapping[str, Any] = {
    "LIMITS__IDLE_SECONDS": 1,
    "LIMITS__HEADER_SECONDS": 1,
    "LIMITS__STALL_SECONDS": 1,
    # Small, so that caches do not look like leaks.
    "LIMITS__VECTOR_CACHE_BYTES": 2**20,
    "CONTEXTS__CACHE_BYTES": 2**22,
    "CONTEXTS__KEEP_DOCUMENTS": True,
}
KERNELS: Mapping[str, str] = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""What oneDNN compiles and keeps is no leak."""
FAULTS = re.compile(r"^.*( ERROR |Traceback|Exception in ).*$", re.MULTILINE)


class Target:
    """A server that runs."""

    def __init__(self, url: str, pid: int, log: Path) -> None:
        self.url = url
        self._proc = Path(f"/proc/{pid}")
        self._log = log

    def resident(self) -> float:
        """MiB of memory now."""
        return self._status("VmRSS")

    def peak(self) -> float:
        """MiB of memory at most, since `forget_peak`."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        (self._proc / "clear_refs").write_text("5")

    def files(self) -> int:
        """Open file descriptors."""
        return len(list((self._proc / "fd").iterdir()))

    def faults(self) -> list[str]:
        """Lines of its log that should not be there."""
        return [found[0] for found in FAULTS.finditer(self._log.read_text(errors="replace"))]

    def _status(self, field: str) -> float:
        found = re.search(rf"^{field}:\s+(\d+) kB$", (self._proc / "status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) / 1024


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Target]:
    """`cde-server serve` with a tiny CDE model and the embedded default, as a process of its own."""
    environment = {f"CDE__{name}": str(value) for name, value in {**SETTINGS, **settings}.items()}
    with ServerProcess(folder, "--model", BUILTIN, **KERNELS, **environment) as server:
        yield Target(server.when_ready().url, server.process.pid, server.log_file)


class Client:
    """Asks one thing after another, on one connection for as long as the server keeps it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: socket.socket | None = None

    def ask(self, sent: bytes) -> Answer:
        """Raises AssertionError where there is no answer, TimeoutError where the connection hangs."""
        for _ in range(2):
            fresh = self._connection is None
            answer = self._try(sent)
            if answer is not None:
                return answer
            assert not fresh, "closed without an answer"
        raise AssertionError("closed without an answer")

    def _try(self, sent: bytes) -> Answer | None:
        if self._connection is None:
            with connected(self._url) as connection:
                self._connection = connection.dup()
        answers = Answers()
        with suppress(ConnectionError):
            with suppress(ConnectionError):  # it may have answered before the end
                self._connection.sendall(sent)
            while not (answers.found and answers.found[0].complete):
                received = self._connection.recv(2**16)
                if not received:
                    break
                answers.feed(received)
        answer = next(iter(answers.found), None)
        if answer is None or not answer.complete or answer.headers.get("connection") == "close":
            self.close()
        return answer

    def json(self, path: str) -> Any:
        answer = self.ask(f"GET {path} HTTP/1.1\r\nHost: fuzz\r\n\r\n".encode())
        assert answer.status == 200, answer
        return json.loads(answer.body)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
