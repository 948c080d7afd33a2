"""How contexts are named: by id, by name, by name and version."""

import re

from app.domain import ContextRef
from app.errors import InvalidRequest

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_ID = re.compile(r"ctx_[0-9a-f]{32}")
_VERSIONED = re.compile(rf"({NAME.pattern})\.([1-9][0-9]{{0,8}})")


def parse_ref(text: str, *, param: str | None = "context") -> ContextRef:
    """An id, a name or name.version. Raises InvalidRequest."""
    if _ID.fullmatch(text):
        return ContextRef(text, id=text)
    if NAME.fullmatch(text):
        return ContextRef(text, name=text)
    versioned = _VERSIONED.fullmatch(text)
    if versioned:
        return ContextRef(text, name=versioned[1], version=int(versioned[2]))
    raise InvalidRequest(
        "A context is named by its id (ctx_…), its name (a-z, 0-9, '_' and '-', at most 63, beginning with a letter "
        "or digit) or name.version.",
        param=param,
    )


def check_name(name: str) -> None:
    """A name a new context may have. Raises InvalidRequest."""
    if not NAME.fullmatch(name) or name.startswith("ctx_"):
        raise InvalidRequest(
            "Invalid 'name': a context's name is made of a-z, 0-9, '_' and '-', at most 63 of them, and begins with a "
            "letter or digit, and not with ctx_.",
            param="name",
        )
