"""`cde-server serve` as a process of its own, with its log in a file."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from tests.live import GOLDENS, V1, golden

START_SECONDS = 90
ROOT = GOLDENS.parents[1]


class ServerProcess:
    """Use as a context manager: what is left at the end is killed."""

    def __init__(self, folder: Path, *options: str, model: str = V1, **variables: str) -> None:
        """`variables`: of the process's surroundings, `CDE__SERVER__DRAIN_SECONDS="1"` and the like."""
        folder.mkdir(exist_ok=True)
        self.log_file = folder / "log"
        command = [sys.executable, "-c", "from app.cli import main; main()", "serve", "--port", "0"]
        command += ["--model", golden(model), "--data-dir", str(folder / "data"), *options]
        with self.log_file.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **variables}
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
