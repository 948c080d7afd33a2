"""uvicorn, with an end in order: not ready, then refusing, then gone; and nothing lost that was taken."""

import asyncio
import errno
import logging
import os
import signal
import socket
from contextlib import suppress
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from app.errors import StartupError
from app.lifecycle import LAST_BATCH_SECONDS, LAST_WRITE_SECONDS, Server
from app.serving import server_config
from app.settings import ServerSettings

log = logging.getLogger(__name__)

FLUSH_SECONDS = 3
"""For answers that are written, and not yet read by their client."""
LAST_CALL_SECONDS = 0.2
"""A closed port resets connections that nobody has accepted, a closed connection what nobody has read."""
BACKLOG = 2048


class DrainingServer(uvicorn.Server):
    """Serves until `end` is called or a signal comes; a second signal ends the process where it stands.

    The first one: `/ready` says 503 at once, and requests are still taken for `server.grace_seconds` (SIGINT: for
    none); then new ones get 503, and those that were taken are answered for up to `server.drain_seconds`; what is left
    then gets 503. Every answer meanwhile says `Connection: close`, and the port stays open until the last one is given.
    """

    def __init__(self, app: ASGIApp, lifecycle: Server) -> None:
        settings = lifecycle.settings
        super().__init__(server_config(app, settings, timeout_graceful_shutdown=FLUSH_SECONDS))
        self._lifecycle = lifecycle
        self._grace, self._drain = settings.server.grace, settings.server.drain_seconds
        self._signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()

    def end(self) -> None:
        """Begins the end; from any thread, or a signal handler."""
        if self._loop is None:  # nothing is served yet
            self.should_exit = True
        else:
            with suppress(RuntimeError):  # the loop is closed: the end is behind us
                self._loop.call_soon_threadsafe(self._ended.set)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Runs wherever the main thread happens to be: no locks, and so no logging, in here."""
        self._signals += 1
        if self._signals > 1:
            os.write(2, b"A second signal: what was being answered is given up.\n")
            os._exit(128 + sig)
        if sig == signal.SIGINT:  # somebody at a terminal, not a balancer that has to notice
            self._grace = 0.0
        self._lifecycle.leave()
        self.end()

    async def main_loop(self) -> None:
        """uvicorn's, until all is answered."""
        self._loop = asyncio.get_running_loop()
        ending = asyncio.create_task(self._end_in_order())
        await super().main_loop()
        ending.cancel()

    async def _end_in_order(self) -> None:
        await self._ended.wait()
        if self._lifecycle.is_leaving and self._grace:  # not in the middle of a start, or of a failure
            log.info("not ready any more; requests are taken for another %g s", self._grace)
            await asyncio.sleep(self._grace)
        self._lifecycle.refuse()
        taken = set(self.server_state.tasks)  # whatever begins from here on is refused
        log.info("requests are refused; %d are being answered", len(taken))
        if taken:
            _, left = await asyncio.wait(taken, timeout=self._drain)
            await self._give_up(left)
        await asyncio.sleep(LAST_CALL_SECONDS)  # who connected before is accepted by now
        for server in self.servers:
            server.close()
        await asyncio.sleep(LAST_CALL_SECONDS)  # and who connected since has asked
        self.should_exit = True

    async def _give_up(self, left: set[asyncio.Task[None]]) -> None:
        if not left:
            return
        log.warning("%d requests were not answered within server.drain_seconds (%g s)", len(left), self._drain)
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=FLUSH_SECONDS)


def longest_end(settings: ServerSettings) -> float:
    """Seconds from SIGTERM to the end at the latest; who sends SIGKILL after it should wait longer."""
    waits = 2 * LAST_CALL_SECONDS + 2 * FLUSH_SECONDS  # around the refusals; for what is given up, and by uvicorn
    return settings.grace + settings.drain_seconds + waits + LAST_WRITE_SECONDS + LAST_BATCH_SECONDS


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets on all addresses of `host`. Raises StartupError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartupError(f"server.host {host!r} is no address of this machine: {error}") from error
    sockets: list[socket.socket] = []
    problem: OSError | None = None
    for family, address in dict.fromkeys((family, address) for family, *_, address in found):
        try:
            sockets.append(socket.create_server(address, family=family, backlog=BACKLOG))
        except OSError as error:
            problem = error
            if error.errno != errno.EADDRNOTAVAIL:  # as "localhost" has an IPv6 address where IPv6 is off
                for opened in sockets:
                    opened.close()
                sockets.clear()
                break
    if not sockets:
        reason = problem.strerror if problem else "it has no address"
        raise StartupError(f"The server cannot listen on {host}, port {port}: {reason}") from problem
    for opened in sockets:
        name = opened.getsockname()
        where = f"[{name[0]}]" if opened.family == socket.AF_INET6 else name[0]
        log.info("listening on http://%s:%d", where, name[1])
    return sockets
