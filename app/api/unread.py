"""Answers that nobody reads do not stay in memory for ever: their connection is cut."""

import asyncio
import fcntl
import sys
import termios
from collections.abc import Callable
from contextlib import suppress

from app.settings import LimitSettings


class UnreadAnswers:
    """What waits to be sent on one connection, for the event loop that it is made on. `cut` is called when its client
    has read too little of it for `limits.stall_seconds`."""

    def __init__(self, transport: asyncio.Transport, limits: LimitSettings, cut: Callable[[], None]) -> None:
        self._transport = transport
        self._limits = limits
        self._cut = cut
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """Until nothing waits."""
        if self._transport.get_write_buffer_size() and self._timer is None:
            self._timer = self._loop.call_later(self._limits.stall_seconds, self._look, self._unread())

    def watch_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, before: int) -> None:
        self._timer = None
        least = self._limits.stall_seconds * self._limits.min_bytes_per_second
        if self._transport.get_write_buffer_size() and before - self._unread() < least:
            self._cut()
        else:
            self.watch()

    def _unread(self) -> int:
        """What is on its way: also from the kernel's buffer, of which a slow reader may take megabytes, and minutes,
        before the kernel asks for more."""
        size = bytearray(4)
        with suppress(OSError, ValueError):  # the connection is gone
            fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, size)
        return self._transport.get_write_buffer_size() + int.from_bytes(size, sys.byteorder)
