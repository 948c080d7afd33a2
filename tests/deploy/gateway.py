"""The compose file's nginx, run here by Debian's: its own configuration, with other addresses in it."""

import json
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

CONFIG = Path(__file__).parents[2] / "config" / "nginx"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx here: apt-get install nginx-light")


class Gateway:
    """Use as a context manager.

    `replicas`: host:port of each. `edits`: text in the configuration -> what to put there. `tls`: a folder with
    certificate.pem and key.pem.
    """

    def __init__(
        self, replicas: Sequence[str], edits: Mapping[str, str] | None = None, *, tls: Path | None = None
    ) -> None:
        self.port, self.tls_port = _free_port(), _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # As root, nginx's workers run under an account of their own, which must be able to enter the folder.
        self._temporary = tempfile.TemporaryDirectory(prefix="gateway")
        self._folder = Path(self._temporary.name)
        self._folder.chmod(0o755)
        self._config, self._log = self._folder / "config", self._folder / "access.log"
        self._errors = self._folder / "error.log"
        shutil.copytree(CONFIG, self._config)
        (self._config / "listen.conf").write_text(f"listen 127.0.0.1:{self.port};\n")
        if tls is not None:
            shutil.copytree(tls, self._config / "tls", dirs_exist_ok=True)
            example = (self._config / "tls" / "https.conf.example").read_text()
            (self._config / "tls" / "https.conf").write_text(example.replace("8443", f"127.0.0.1:{self.tls_port}"))
        for path in self._config.glob("*.conf"):
            for old, new in (edits or {}).items():
                path.write_text(path.read_text().replace(old, new))
        self._write(replicas)

    def __enter__(self) -> Self:
        assert NGINX is not None
        command = [NGINX, "-p", f"{self._folder}/", "-c", str(self._config / "nginx.conf"), "-e", "stderr"]
        with self._log.open("wb") as out, self._errors.open("wb") as errors:
            self._process = subprocess.Popen([*command, "-g", "daemon off;"], stdout=out, stderr=errors)
        try:
            self._until(self._answers)
        except AssertionError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._temporary.cleanup()

    def use(self, replicas: Sequence[str]) -> None:
        """These from now on. What runs on the old ones is answered; returns when new workers have begun."""
        before = self._workers()
        self._write(replicas)
        self._process.send_signal(signal.SIGHUP)
        self._until(lambda: bool(self._workers() - before))

    def entries(self) -> list[dict[str, Any]]:
        """The access log so far, in whole lines."""
        whole, _, _ = self._log.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def first(self, path: str) -> dict[str, Any]:
        """The first entry of a path; nginx writes it when the answer is gone."""
        self._until(lambda: any(entry["path"] == path for entry in self.entries()))
        return next(entry for entry in self.entries() if entry["path"] == path)

    def logs(self) -> str:
        return self._log.read_text() + self._errors.read_text()

    def _write(self, replicas: Sequence[str]) -> None:
        """upstream.conf with these servers instead of the name that Docker's DNS knows."""
        text = (CONFIG / "upstream.conf").read_text()
        (line,) = (line for line in text.splitlines() if line.strip().startswith("server "))
        servers = [line.replace("replica:8000 resolve", replica) for replica in replicas]
        kept = [other for other in text.replace(line, "\n".join(servers)).splitlines() if "resolver" not in other]
        (self._config / "upstream.conf").write_text("\n".join(kept))

    def _workers(self) -> set[str]:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return set(children.read_text().split())

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/gateway/health").is_success
        except httpx.TransportError:
            return False

    def _until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not holds():
            assert self._process.poll() is None, self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
