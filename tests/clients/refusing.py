"""A gateway in front of the server that refuses a few requests first, in the server's own words."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

import httpx

from app.api.openai_errors import response_of
from app.errors import RetryableError


class Refusing:
    """Answers `error` to the first `times` requests and passes the rest on; counts them in `requests`."""

    def __init__(self, base: str, error: RetryableError, *, times: int) -> None:
        refusal, left = response_of(error), iter(range(times))
        self.requests = 0
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                gateway.requests += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if next(left, None) is not None:
                    self.answer(refusal.status_code, dict(refusal.headers), bytes(refusal.body))
                    return
                headers = {"Content-Type": "application/json"}
                passed = httpx.post(f"{origin}{self.path}", content=body, headers=headers, timeout=60)
                self.answer(passed.status_code, {"Content-Type": "application/json"}, passed.content)

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in (headers | {"content-length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
                pass

        parts = urlsplit(base)
        origin = f"{parts.scheme}://{parts.netloc}"
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base = f"http://127.0.0.1:{self._server.server_port}{parts.path}"

    def __enter__(self) -> "Refusing":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
