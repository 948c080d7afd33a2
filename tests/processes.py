"""`cde-server serve` as a process of its own, with its log in a file."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol, Self

from tests.live import GOLDENS, V1, golden

START_SECONDS = 90
ROOT = GOLDENS.parents[1]
SERVE = "from app.cli import main; main()"


class Process(Protocol):
    """What tests do to one."""

    @property
    def pid(self) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


class ServerProcess:
    """Use as a context manager: what is left at the end is killed."""

    def __init__(self, folder: Path, *options: str, model: str = V1, **variables: str) -> None:
        """`variables`: of the process's surroundings, `CDE__SERVER__DRAIN_SECONDS="1"` and the like."""
        folder.mkdir(exist_ok=True)
        self.log_file = folder / "log"
        self.log_file.write_bytes(b"")
        arguments = ["serve", "--port", "0", "--model", golden(model), "--data-dir", str(folder / "data"), *options]
        self.process = self._start(arguments, {**os.environ, "OMP_NUM_THREADS": "1", **variables})

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Process:
        with self.log_file.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-c", SERVE, *arguments], stdout=out, stderr=out, cwd=ROOT, env=environment
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(20)

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def url(self) -> str:
        found = re.search(r'http://[^\s"]+', self.log)
        assert found, self.log
        return found[0]

    def when_it_says(self, words: str) -> Self:
        deadline = time.monotonic() + START_SECONDS
        while words not in self.log:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)
        return self

    def when_ready(self) -> Self:
        return self.when_it_says("ready after")

    def stop(self) -> None:
        """By SIGTERM, in order."""
        self.process.terminate()
        assert self.process.wait(40) == 0, self.log


class ForkedServer(ServerProcess):
    """Forked from a process that has imported everything: there in a third of the time. What libraries read of the
    surroundings while they are imported cannot be given, and the interpreter does not end as it does elsewhere."""

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Process:
        return _Forked(arguments, environment, self.log_file)


class _Forked:
    """As Popen has it."""

    _context = get_context("forkserver")
    _context.set_forkserver_preload(["app.cli.serve"])

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._process = self._context.Process(target=_serve, args=(list(arguments), dict(environment), str(log)))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send_signal(self, sig: int) -> None:
        os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._process.kill()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError("the server goes on")
        return self._process.exitcode


def _serve(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """In the server's process."""
    from app.cli import main  # noqa: PLC0415 - the test's own process need not

    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = ["cde-server", *arguments]
    main()
