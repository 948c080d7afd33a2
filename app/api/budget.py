"""Bytes that requests hold of the process's memory, or disk, and what each caller may have of them."""

from collections import Counter

from starlette.types import Scope

from app.errors import BodiesFull, RequestTooLarge


class Budget:
    """Bytes that all requests hold together. For one event loop.

    No caller holds more than is left free: alone half of all, and less where others hold much. So whoever comes next
    finds room.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._of: Counter[str] = Counter()

    def take(self, caller: str, size: int) -> None:
        """Raises BodiesFull."""
        if self._of[caller] + size > self.limit - self._used - size:
            raise BodiesFull("The server holds as many bytes for you as it can at the moment. Please try again.")
        self._used += size
        self._of[caller] += size

    def give_back(self, caller: str, size: int) -> None:
        self._used -= size
        self._of[caller] -= size
        if not self._of[caller]:
            del self._of[caller]


class Share:
    """What one request holds of a budget, for its caller: the key, or where there are no keys the address."""

    def __init__(self, budget: Budget, scope: Scope) -> None:
        self._budget = budget
        self._scope = scope
        self._caller = ""
        self._size = 0

    def hold(self, size: int) -> None:
        """So many bytes, or as many as before, if that was more. For requests whose key has been looked at.

        Raises BodiesFull; RequestTooLarge for what a caller can never have.
        """
        if size > self._budget.limit // 2:
            raise RequestTooLarge("The request needs more memory than one caller may take. Send or ask for less.")
        if size > self._size:
            self._caller = self._caller or _caller(self._scope)
            self._budget.take(self._caller, size - self._size)
            self._size = size

    def release(self) -> None:
        if self._size:
            self._budget.give_back(self._caller, self._size)
            self._size = 0


def _caller(scope: Scope) -> str:
    """Not the connection, as for the device: it is held, not waited for, and opening more must not give more."""
    key = scope["state"].get("key_name")
    return f"key {key}" if key is not None else f"address {(scope.get('client') or ('',))[0]}"
