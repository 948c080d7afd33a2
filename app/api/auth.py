"""API keys: SHA-256 digests in a TOML file, compared in constant time, reloaded when the file changes.

[[keys]]
name = "search-team"
sha256 = "…"                       # printf %s "$KEY" | sha256sum
scopes = ["embed", "contexts:read", "contexts:write"]
namespace = "search-team"          # absent: the contexts that all keys without one share
"""

import hashlib
import hmac
import logging
import threading
import tomllib
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from app.domain import SHARED
from app.errors import ConfigError, InsufficientScope, Unauthenticated

log = logging.getLogger(__name__)

Scope = Literal["embed", "contexts:read", "contexts:write"]
ALL_SCOPES: tuple[Scope, ...] = ("embed", "contexts:read", "contexts:write")


class Key(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-fA-F]{64}$", to_lower=True)]
    scopes: tuple[Scope, ...] = ALL_SCOPES
    namespace: str = Field(SHARED, pattern="^[a-z0-9][a-z0-9_-]{0,62}$")


class _KeysFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: tuple[Key, ...] = Field(min_length=1)

    @field_validator("keys")
    @classmethod
    def _told_apart(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        """Two of one name are a key and its successor; two of one digest would be one key with two sets of rights."""
        for digest, times in Counter(key.sha256 for key in keys).items():
            if times > 1:
                names = ", ".join(key.name for key in keys if key.sha256 == digest)
                raise PydanticCustomError("twice", "the keys {names} are the same key", {"names": names})
        return keys


class Keyring:
    """The keys of a file; a file that is wrong after a change leaves the keys as they were."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError."""
        self._path = path
        self._lock = threading.Lock()
        self._stamp = _stamp(path)
        self._keys = _read(path)

    def find(self, secret: str) -> Key | None:
        digest = hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
        found = None
        for key in self._current():  # all of them: the time taken tells nothing
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found

    def _current(self) -> tuple[Key, ...]:
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            with self._lock:
                self._stamp = stamp
                try:
                    self._keys = _read(self._path)
                except ConfigError as error:
                    log.error("the keys stay as they were: %s", error)
        return self._keys


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Also of a file that was put in its place with the same size and time."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev


def _read(path: Path) -> tuple[Key, ...]:
    try:
        return _KeysFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig"))).keys
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _require(request: Request, scope: Scope | None) -> None:
    keyring: Keyring | None = request.app.state.keyring
    if keyring is None:
        return
    header = request.headers.get("authorization", "")
    kind, _, secret = header.partition(" ")
    if kind.lower() != "bearer" or not secret.strip():
        wrong = "The Authorization header is not as expected" if header else "You didn't provide an API key"
        raise Unauthenticated(f"{wrong}: send 'Authorization: Bearer YOUR_KEY'.")
    key = keyring.find(secret.strip())
    if key is None:
        raise Unauthenticated("Incorrect API key provided. Check the key, or ask the operator of this server for one.")
    request.state.key_name, request.state.namespace = key.name, key.namespace
    if scope is not None and scope not in key.scopes:
        raise InsufficientScope(f"This key lacks the scope '{scope}'. Ask the operator of this server for one with it.")


def _scope(scope: Scope | None) -> object:
    async def check(request: Request) -> None:
        _require(request, scope)

    return Depends(check)


AnyKey = Annotated[None, _scope(None)]
CanEmbed = Annotated[None, _scope("embed")]
CanReadContexts = Annotated[None, _scope("contexts:read")]
CanWriteContexts = Annotated[None, _scope("contexts:write")]
