"""One server process of several, as an operator sees it: started, ready, killed, told to end."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests.live import GOLDENS, V1

ROOT = Path(__file__).parents[2]
START_SECONDS = 120
DRAIN_SECONDS = 60


class Replica:
    """Serves the tiny v1 checkpoint on a port of its own. `settings`: names as in the environment, `CDE__…`."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        folder.mkdir(parents=True)
        self._log = folder / "log"
        self.address = ""
        """host:port, once it is ready."""
        command = [sys.executable, "-c", "from app.cli import main; main()", "serve", "--port", "0"]
        command += ["--model", str(GOLDENS / V1), "--data-dir", str(folder / "data")]
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env={**os.environ, **settings})

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def wait_ready(self) -> "Replica":
        """Returns itself. Raises AssertionError with the log where it does not come up."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            found = re.search(r"running on http://(\S+)", self._log.read_text())
            if found:
                self.address = found[1]
                if httpx.get(f"{self.url}/ready").is_success:
                    return self
            time.sleep(0.05)
        raise AssertionError(self._log.read_text())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def drain(self) -> int:
        """SIGTERM, and the exit code when it has ended."""
        self._process.terminate()
        return self._process.wait(DRAIN_SECONDS)

    def end(self) -> None:
        """However it is, it is gone afterwards."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(DRAIN_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
