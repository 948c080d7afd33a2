"""kill -9 at random moments while clients create, import, move and delete contexts; then the store is looked through.

    python -m tests.load.crashes --rounds 200 --database sqlite        # or postgres

A round starts a real server process, lets the clients work, and kills it. Behind it the store opens; every version a
client was answered about is there, with the arrays that were sent; what was cut off was done or not done, and nothing
between; `contexts check` finds nothing.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from app.context_refs import parse_ref
from app.domain import DATASET_EMBEDDINGS, ContextStatus, Space
from app.stores.checks.database import check_store
from app.stores.database import Database
from app.stores.sql import SqlContextStore
from tests.live import V1
from tests.load.crash_clients import SHAPE, Client, Name, Tally
from tests.postgres import new_database, own_postgres
from tests.processes import ForkedServer

CLIENTS = 4
MOST_ANSWERS = 60
"""Before a kill; it comes at a random moment behind the last of them."""
WHILE_STARTING = 0.1
"""So many of the kills come before the server is ready."""
SPACE = Space(V1)


class Verifier:
    """Holds the store against what the clients know, and takes over what became of the unanswered."""

    def __init__(self, url: str, tally: Tally) -> None:
        self._url = url
        self._tally = tally

    def verify(self, clients: Sequence[Client]) -> None:
        store = SqlContextStore(Database(self._url))
        for client in clients:
            for name in client.names:
                self._name(store, client, name)
        store.close()
        for finding in check_store(self._url).findings:
            self._tally.wrong.append(f"contexts check: {finding.what}: {finding.problem}")

    def _name(self, store: SqlContextStore, client: Client, name: Name) -> None:
        found = store.versions(SPACE, name.text)
        done = {info.version: info.id for info in found if info.status is ContextStatus.COMPLETED}
        pointed = store.get(SPACE, parse_ref(name.text))
        current = pointed.version if pointed is not None and pointed.status is ContextStatus.COMPLETED else None
        new = sorted(done.keys() - name.versions.keys())
        if (done, current) == (name.versions, name.current):
            if name.pending is not None:
                self._tally.count("cut off: not done")
        elif _explained(name, done, current, new):
            self._tally.count("cut off: done")
            if name.pending is not None and name.pending[0] == "import":
                client.rows[done[new[0]]] = name.pending[1]
        else:
            was = f"{name.versions} at {name.current}, with {name.pending} under way"
            self._tally.wrong.append(f"{name.text} was {was}; it is {done} at {current}")
        for version, context_id in done.items():
            self._arrays(store, client, f"{name.text}.{version}", context_id)
        name.versions, name.current, name.pending = done, current, None
        name.highest = max([name.highest, *(info.version for info in found)])

    def _arrays(self, store: SqlContextStore, client: Client, label: str, context_id: str) -> None:
        arrays = store.arrays(context_id)
        rows = None if arrays is None else arrays[DATASET_EMBEDDINGS]
        if rows is None or rows.shape != SHAPE:
            self._tally.wrong.append(f"{label} has not the arrays of a context")
        elif not np.array_equal(client.rows.setdefault(context_id, rows), rows):
            self._tally.wrong.append(f"{label} has other arrays than were put in")
        self._tally.count("arrays compared")


def _explained(name: Name, done: dict[int, str], current: int | None, new: Sequence[int]) -> bool:
    """Whether the unanswered request, done as a whole, makes the difference."""
    was = name.versions
    match name.pending:
        case ("create" | "import", _):
            old = {version: context_id for version, context_id in done.items() if version not in new}
            return old == was and len(new) == 1 and current == new[0] > name.highest
        case ("move", version):
            return (done, current) == (was, version)
        case ("delete version", version):
            return (done, current) == ({v: i for v, i in was.items() if v != version}, name.current)
        case ("delete name", _):
            return not done
    return False


class Rounds:
    """Starts, lets work, kills, verifies."""

    def __init__(self, folder: Path, url: str, seed: int) -> None:
        self.tally = Tally()
        self._folder = folder
        self._url = url
        self._choose = random.Random(seed)
        self._clients = [Client(i, seed, self.tally) for i in range(CLIENTS)]
        self._verifier = Verifier(url, self.tally)
        self._verified = True

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            self._round()
            self.tally.count("rounds")
            if self.tally.wrong:
                return
        with self._server() as server:
            self._verify(server.when_ready().url)
            server.process.terminate()
            code = server.process.wait(60)
            if code != 0:
                self.tally.wrong.append(f"the last server, which was asked to end, ended with {code}")

    def _round(self) -> None:
        with self._server() as server:
            if self._choose.random() < WHILE_STARTING:
                time.sleep(self._choose.uniform(0, 2))
                self.tally.count("killed while starting")
            else:
                url = server.when_ready().url
                self._verify(url)
                working = [threading.Thread(target=client.work, args=(url,)) for client in self._clients]
                for thread in working:
                    thread.start()
                enough = self.tally.answers + self._choose.randrange(MOST_ANSWERS)
                while self.tally.answers < enough and any(thread.is_alive() for thread in working):
                    time.sleep(0.002)
                time.sleep(self._choose.uniform(0, 0.1))
                server.process.kill()
                for thread in working:
                    thread.join()
                self._verified = False
                if self.tally.wrong:
                    self.tally.wrong.append(f"the server's log: {server.log}")
        if self._choose.random() < 0.5:  # else the next server is the first that opens the store
            self._verify()

    def _server(self) -> ForkedServer:
        return ForkedServer(self._folder, CDE__CONTEXTS__DATABASE_URL=self._url)

    def _verify(self, url: str | None = None) -> None:
        """`url`: of a server that has opened the store already; what it has is used as well."""
        if not self._verified:
            self._verifier.verify(self._clients)
            self._verified = True
        if url is not None:
            for client in self._clients:
                self._use(url, self._choose.choice(client.names))

    def _use(self, url: str, name: Name) -> None:
        if name.current is None:
            return
        context_id = name.versions[name.current]
        for ref in (name.text, context_id):
            answer = httpx.post(f"{url}/v1/embeddings", json={"model": V1, "input": "owl", "context": ref}, timeout=60)
            if answer.headers.get("x-context-id") != context_id:
                self.tally.wrong.append(f"{ref} cannot be used: {answer.status_code} {answer.text[:200]}")
            self.tally.count("used")


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty one."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'contexts.sqlite3'}"
    else:
        with own_postgres() as server:
            yield new_database(server.url)


def run(rounds: int, kind: str, seed: int) -> Tally:
    with tempfile.TemporaryDirectory(prefix="crashes") as name, database(kind, Path(name)) as url:
        made = Rounds(Path(name), url, seed)
        made.run(rounds)
        return made.tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    started = time.monotonic()
    tally = run(given.rounds, given.database, given.seed)
    table = Table("what", given.database, title=f"kill -9, seed {given.seed}")
    for what, count in sorted(tally.counts.items()):
        table.add_row(what, str(count))
    table.add_row("seconds", f"{time.monotonic() - started:.0f}")
    table.add_row("wrong", str(len(tally.wrong)))
    console = Console()
    console.print(table)
    for line in tally.wrong:
        console.print(line, markup=False)
    sys.exit(bool(tally.wrong))


if __name__ == "__main__":
    main()
