"""The README's tables, made from the code: `python -m tests.docs` prints them."""

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from app.api.openai_errors import FRAMEWORK, INVALID, TABLE
from app.settings import ModelSettings, Settings


def settings_rows() -> list[str]:
    rows = ["| setting | default | |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, BaseModel):
            rows += [_row(f"{name}.{part}", inner) for part, inner in type(default).model_fields.items()]
        elif name == "models":
            rows += [_row(f"models[].{part}", inner) for part, inner in ModelSettings.model_fields.items()]
        else:
            rows.append(_row(name, field))
    return rows


def _row(name: str, field: FieldInfo) -> str:
    default = field.default
    shown = (
        ""
        if default is None or default == ()
        else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    )
    return f"| `{name}` | {shown} | {field.description} |"


def error_rows() -> list[str]:
    """One row a status and code, with the docstring of the first class that has them."""
    rows = {(status, code or "", kind): cls.__doc__ or "" for cls, (status, kind, code) in [*TABLE.items()][::-1]}
    rows |= {(status, code, INVALID): when for status, (code, when) in FRAMEWORK.items()}
    lines = [f"| {s} | `{k}` | {f'`{c}`' if c else 'null'} | {rows[s, c, k]} |" for s, c, k in sorted(rows)]
    return ["| status | type | code | when |", "|---|---|---|---|", *lines]


if __name__ == "__main__":
    print("\n".join([*settings_rows(), "", *error_rows()]))  # noqa: T201
