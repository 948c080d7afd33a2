"""Contexts: every row makes sense, names point at what is there, and arrays are what was put in."""

import hashlib
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import orjson
from sqlalchemy import Connection, RowMapping, select

from app.domain import DATASET_EMBEDDINGS, ContextInfo, ContextStatus
from app.errors import StoreError
from app.payloads import from_safetensors
from app.stores import rows
from app.stores.checks.findings import Finding, one, one_by_one, only_room
from app.stores.faults import words_of
from app.stores.tables import names, payloads, texts, versions

AGAIN = "Delete it and create it again from its documents, or import it again."

Names = dict[tuple[str, str, str], list[ContextInfo]]


def check_contexts(connection: Connection, checked: dict[str, int]) -> Iterator[Finding]:
    """Raises SQLAlchemyError where a table cannot be read at all."""
    infos: Names = defaultdict(list)
    holders: dict[str, list[ContextInfo]] = defaultdict(list)
    for seq, row in one_by_one(connection, versions, versions.c.seq):
        checked["versions"] += 1
        info = _info(row)
        if isinstance(info, str):
            yield Finding(
                f"version {_called(connection, seq)}", f"Its row cannot be read: {info}.", f"{AGAIN} By the name alone."
            )
            continue
        infos[info.space.namespace, info.space.model, info.name].append(info)
        holders[info.id].append(info)
    yield from _names(connection, infos, checked)
    yield from _payloads(connection, holders, checked)
    yield from _texts(connection)


def _called(connection: Connection, seq: int) -> str:
    """A version, by name and number where these can be read."""
    row = one(connection, select(versions.c.name, versions.c.version).where(versions.c.seq == seq))
    return f"{row['name']}.{row['version']}" if isinstance(row, RowMapping) else f"number {seq}"


def _info(row: RowMapping | Exception | None) -> ContextInfo | str:
    """Or what is wrong."""
    if not isinstance(row, RowMapping):
        return words_of(row) if row else "it is gone"
    try:
        return rows.info_of(row)
    except StoreError as error:
        return words_of(error)


def _names(connection: Connection, infos: Names, checked: dict[str, int]) -> Iterator[Finding]:
    found: dict[tuple[str, str, str], RowMapping] = {}
    for named in connection.execute(select(names)).mappings():
        found[named["namespace"], named["model"], named["name"]] = named
        checked["names"] += named["version"] > 0
    for key in sorted(found.keys() | infos.keys()):
        row, there = found.get(key), infos.get(key, [])
        name = f"name {key[2]} of {key[1]}" + (f" in {key[0]}" if key[0] else "")
        if row is None or row["version"] == 0:
            if there:
                held = ", ".join(f"{info.name}.{info.version}" for info in there)
                yield Finding(name, f"It is not there, and has versions: {held}.", "Create it anew, and delete it.")
            continue
        yield from _pointing(name, row, there)


def _pointing(name: str, row: RowMapping, there: Sequence[ContextInfo]) -> Iterator[Finding]:
    completed = [info.version for info in there if info.status is ContextStatus.COMPLETED]
    aimed = next((info for info in there if info.version == row["version"]), None)
    back = f"POST /v1/contexts/{row['name']}/rollback to one of {completed}." if completed else "Delete the name."
    if aimed is None:
        yield Finding(name, f"It points at version {row['version']}, which is not there.", back)
    elif completed and aimed.version not in completed:
        yield Finding(name, f"It points at version {aimed.version}, which is {aimed.status.value}.", back)
    highest = max((info.version for info in there), default=0)
    if highest > row["last_version"]:
        problem = f"Its next version would be {row['last_version'] + 1}, and version {highest} is there."
        yield Finding(name, problem, "Delete the name and create it again.")


def _payloads(
    connection: Connection, holders: dict[str, list[ContextInfo]], checked: dict[str, int]
) -> Iterator[Finding]:
    seen, held = set(), set(connection.scalars(select(versions.c.id)))  # by versions that cannot be read as well
    for context_id in connection.scalars(select(payloads.c.id).order_by(payloads.c.id)).all():
        seen.add(context_id)
        if context_id not in held:
            yield Finding(f"arrays {context_id}", "No version holds them.", only_room(payloads, "id", context_id))
            continue
        held_by = holders.get(context_id, [])
        row = one(connection, select(payloads).where(payloads.c.id == context_id))
        checked["arrays"] += 1
        problem = _payload_problem(row, held_by)
        if problem is not None:
            yield Finding(_label(context_id, held_by), problem, AGAIN)
    for context_id in sorted(holders.keys() - seen):
        yield Finding(_label(context_id, holders[context_id]), "Its arrays are not there.", AGAIN)


def _label(context_id: str, held_by: Sequence[ContextInfo]) -> str:
    held = ", ".join(f"{info.name}.{info.version} of {info.space.model}" for info in held_by)
    return f"context {context_id} ({held or 'of a version that cannot be read'})"


def _payload_problem(row: RowMapping | Exception | None, held_by: Sequence[ContextInfo]) -> str | None:
    if not isinstance(row, RowMapping):
        return f"Its arrays cannot be read: {words_of(row) if row else 'they are gone'}."
    data, done = row["data"], [info for info in held_by if info.status is ContextStatus.COMPLETED]
    if data is None:
        return "It is completed, and its arrays are not there." if done else None
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        return "Its arrays fail their checksum."
    return _arrays_problem(data, done)


def _arrays_problem(data: bytes, done: Sequence[ContextInfo]) -> str | None:
    try:
        arrays = from_safetensors(data)
    except ValueError as error:
        return f"Its arrays cannot be read: {error}."
    embeddings = arrays.get(DATASET_EMBEDDINGS)
    if embeddings is None:
        return f"It has no {DATASET_EMBEDDINGS}."
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        return f"It holds NaN or infinite values in {', '.join(sorted(broken))}."
    for info in done:
        if embeddings.shape != (info.corpus_size, info.dimensions):
            return f"Its arrays have shape {list(embeddings.shape)}, not {[info.corpus_size, info.dimensions]}."
        if info.usage_bytes != len(data):
            return (
                f"Its arrays have {len(data)} bytes, not the {info.usage_bytes} that {info.name}.{info.version} says."
            )
    return None


def _texts(connection: Connection) -> Iterator[Finding]:
    for seq, row in one_by_one(connection, texts, texts.c.version_seq):
        problem = _texts_problem(row)
        if problem is not None:
            yield Finding(f"documents of version {_called(connection, seq)}", problem, AGAIN)


def _texts_problem(row: RowMapping | Exception | None) -> str | None:
    if not isinstance(row, RowMapping):
        return f"They cannot be read: {words_of(row) if row else 'they are gone'}."
    try:
        kept = orjson.loads(zlib.decompress(row["data"]))
    except (zlib.error, ValueError) as error:
        return f"They cannot be read: {error}."
    good = isinstance(kept, list) and all(isinstance(text, str) for text in kept)
    return None if good else "They are no list of texts."
