"""What can be wrong with a store, as far as it makes a difference to who calls or runs the server.

StoreError
├── StoreAway
├── StoreBusy
├── StoreFull
├── StoreReadOnly
├── StoreRefuses
├── StoreDamaged
└── PayloadDamaged
"""

from app.errors import StoreError


class StoreAway(StoreError):
    """The database server is down or does not answer in time, or the database's file cannot be opened."""

    kind = "away"
    answer = "The context store cannot be reached at the moment. Contexts in memory are served on. Please try again."


class StoreBusy(StoreError):
    """Another process or transaction has locked the database, or it is overloaded."""

    kind = "busy"
    answer = "The context store is locked by another process or overloaded. Please try again."


class StoreFull(StoreError):
    """The database's disk is full: reads go on."""

    kind = "full"
    answer = (
        "The disk of the context store is full: nothing can be created, changed or deleted until there is room. "
        "What is stored can be read and used."
    )
    retry_after = 10.0


class StoreReadOnly(StoreError):
    """The database, or its disk, takes no writes: reads go on where the database can read."""

    kind = "read_only"
    answer = (
        "The context store is read-only: nothing can be created, changed or deleted until that is put right. "
        "What is stored can be read and used."
    )
    retry_after = 10.0


class StoreRefuses(StoreError):
    """A row breaks a rule of the database, again and again: no other writer is to blame, and no time will help."""

    kind = "refused"
    answer = "The context store refuses what was to be stored; the server's log says why."
    passes = False


class StoreDamaged(StoreError):
    """The database's file is damaged where it was read or written."""

    kind = "damaged"
    answer = "The context store is damaged: the operator's `cde-server contexts check` says where, and what to do."
    passes = False
    retry_after = 60.0


class PayloadDamaged(StoreError):
    """What is stored of one context, or of one file, is not what was put in; the others are whole."""

    kind = "payload"
    passes = False
    retry_after = 60.0

    def __init__(self, answer: str) -> None:
        super().__init__(answer)
        self.answer = answer
