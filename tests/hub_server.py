"""A Hugging Face Hub on loopback: the part of its HTTP API that `huggingface_hub` needs to download a file.

Repositories are folders. As on the Hub, large files (here: *.safetensors) are answered with a redirect to another
origin that carries their hash, and a missing file is a 404 that names the commit.
"""

import hashlib
import re
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self, cast
from urllib.parse import unquote

_RESOLVE = re.compile(r"/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_CDN = "/cdn/"


@dataclass
class _Repository:
    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False


class HubServer:
    """Use as a context manager; `stop` and `start` keep the port, so that clients see one Hub go down and come back."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        """`GET /owner/name/resolve/main/config.json`, in order of arrival, answered or not."""
        self.broken: HTTPStatus | None = None
        """Answer every request with this."""
        self.dies_after: int | None = None
        """Send so many bytes of the next large file, then go down."""
        self._repositories: dict[str, _Repository] = {}
        self._blobs: dict[str, Path] = {}
        self._hub: _Server | None = None
        self._cdn: _Server | None = None
        self._port = 0
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def add(self, repo: str, folder: Path, refs: tuple[str, ...] = ("main",), *, gated: bool = False) -> str:
        """Commits `folder` to `repo`, moves `refs` (branches and tags) there and gives the commit's id."""
        content = hashlib.sha1(repo.encode())
        for path in sorted(folder.iterdir()):
            content.update(path.name.encode() + path.read_bytes())
        commit = content.hexdigest()
        repository = self._repositories.setdefault(repo, _Repository())
        repository.gated = gated
        repository.commits[commit] = folder
        repository.refs.update(dict.fromkeys(refs, commit))
        return commit

    def remove(self, repo: str) -> None:
        self._repositories.pop(repo, None)

    def count(self, method: str, path_part: str = "") -> int:
        return sum(line.startswith(method) and path_part in line for line in self.requests)

    def start(self) -> None:
        if self._hub is None:
            self._hub, self._cdn = _Server(self, self._port), _Server(self, 0)
            self._port = self._hub.server_port

    def stop(self) -> None:
        for server in (self._hub, self._cdn):
            if server is not None:
                server.close()
        self._hub = self._cdn = None

    def find(self, path: str) -> "_Answer":
        """What the Hub says to a request: the status, its headers, and the file it is about."""
        if self.broken:
            return _Answer(self.broken, {})
        if path.startswith(_CDN):
            return _Answer(HTTPStatus.OK, {}, self._blobs[path.removeprefix(_CDN)])
        match = _RESOLVE.fullmatch(path)
        repository = self._repositories.get(match["repo"]) if match else None
        if match is None or repository is None:
            return _refusal(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        if repository.gated:
            return _refusal(HTTPStatus.FORBIDDEN, "GatedRepo", "You are not in the authorized list.")
        revision = unquote(match["revision"])
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return _refusal(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self._file(repository.commits[commit] / unquote(match["file"]), commit)

    def _file(self, path: Path, commit: str) -> "_Answer":
        if not path.is_file():
            return _refusal(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        etag = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix != ".safetensors":
            return _Answer(HTTPStatus.OK, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, path)
        self._blobs[etag] = path
        assert self._cdn is not None
        headers = {
            "Location": f"http://127.0.0.1:{self._cdn.server_port}{_CDN}{etag}",
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(path.stat().st_size),
            "X-Repo-Commit": commit,
        }
        return _Answer(HTTPStatus.FOUND, headers)


@dataclass(frozen=True)
class _Answer:
    status: HTTPStatus
    headers: dict[str, str]
    body: Path | None = None


def _refusal(status: HTTPStatus, code: str, message: str, headers: dict[str, str] | None = None) -> _Answer:
    return _Answer(status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: HubServer, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: one request a connection, so that a stopped server is down for clients that talked to it before."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        """Nothing on the console."""

    def _answer(self) -> None:
        hub = cast("_Server", self.server).hub
        hub.requests.append(f"{self.command} {self.path}")
        answer = hub.find(self.path)
        body = answer.body.read_bytes() if answer.body else b""
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        status, sent = answer.status, body
        if start and answer.body:
            status, sent = HTTPStatus.PARTIAL_CONTENT, body[int(start[1]) :]
        self.send_response(status)
        for name, value in {**answer.headers, "Content-Length": str(len(sent))}.items():
            self.send_header(name, value)
        if status is HTTPStatus.PARTIAL_CONTENT:
            self.send_header("Content-Range", f"bytes {len(body) - len(sent)}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "GET":
            self._send(hub, sent)

    def _send(self, hub: HubServer, body: bytes) -> None:
        if hub.dies_after is None or not self.path.startswith(_CDN):
            self.wfile.write(body)
            return
        self.wfile.write(body[: hub.dies_after])
        hub.dies_after = None
        hub.stop()
