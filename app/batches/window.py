"""Lines of a batch in memory: on the engine, or answered and not stored yet."""

from collections.abc import Iterable, Iterator

from app.batches.lines import Line, LineTooLong
from app.errors import StoreError

WINDOW_LINES, WINDOW_TEXTS, WINDOW_BYTES = 64, 256, 4 * 2**20
"""No further line is read when so many are held."""


class Window:
    """Over the lines that are left. Of one thread at a time."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._held: dict[int, Line] = {}
        self._error: Exception | None = None

    def more(self) -> list[Line]:
        """The lines there is room for; empty: there is no room, or no line. Raises what reading raises, when all lines
        before have been given."""
        if self._error is not None:
            raise self._error
        found: list[Line] = []
        while self._has_room():
            try:
                line = next(self._lines, None)
            except (LineTooLong, StoreError) as error:  # for the next call
                self._error = error
                break
            if line is None:
                break
            self._held[line.number] = line
            found.append(line)
        if self._error is not None and not self._held:
            raise self._error
        return found

    def stored(self, numbers: Iterable[int]) -> None:
        """The answers to these lines are."""
        for number in numbers:
            del self._held[number]

    def _has_room(self) -> bool:
        texts, size = sum(line.inputs for line in self._held.values()), sum(line.size for line in self._held.values())
        return len(self._held) < WINDOW_LINES and texts < WINDOW_TEXTS and size < WINDOW_BYTES
